"""diff_attention on a GPU: which kernels serve a call, and the same demands on each of them."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LOW, PATHS, Shape, cumulative, deterministic, error, poisoned_memory, take_path
from test_diff_attention import Call, gradients, plain

from coda_attn import functional as F, reference

pytestmark = pytest.mark.gpu

CASES = {
    "norm": Call(Shape(4, 2, 128), (300, 300), (300, 300), norm=True),
    "half pairs, D 64": Call(Shape(4, 2, 64), (300,), (300,), norm=True),
    "interleaved pairs": Call(Shape(4, 1, 128), (257,), (257,), options=dict(theta_pairs="interleaved")),
    "interleaved pairs, D 64": Call(Shape(4, 1, 64), (257,), (257,), options=dict(theta_pairs="interleaved")),
    "prefix": Call(Shape(4, 2, 128), (90,), (700,), norm=True),
    "rows without a key": Call(Shape(4, 2, 128), (200,), (90,)),
    "not causal": Call(Shape(3, 3, 128), (129,), (517,), norm=True, options=dict(causal=False, scale=0.05)),
    "not causal, D 64": Call(Shape(3, 3, 64), (129,), (517,), options=dict(causal=False)),
    "one token": Call(Shape(2, 2, 128), (1,), (1,)),
    "one head": Call(Shape(1, 1, 128), (65,), (65,)),
    "group of 12": Call(Shape(12, 1, 64), (70, 70), (70, 70), norm=True),
    "one stream": Call(Shape(4, 2, 128), (300, 300), (300, 300), streams=1),
    "one stream, norm, D 64": Call(Shape(4, 2, 64), (190,), (300,), streams=1, norm=True),
    "packed": Call(Shape(4, 2, 128), (70, 0, 3, 200), (90, 5, 1, 260), packed=True, norm=True),
    "packed, D 64": Call(Shape(4, 2, 64), (7, 64, 65), (128, 0, 130), packed=True, options=dict(causal=False)),
    "packed, one stream": Call(Shape(4, 2, 128), (1, 128, 129), (1, 128, 129), packed=True, streams=1),
    # Blocks attend several items each.
    "many heads": Call(Shape(32, 4, 128), (300, 300), (300, 300), norm=True),
    "many heads, D 64": Call(Shape(32, 4, 64), (300, 300), (300, 300), norm=True),
    "many heads, one stream, D 64": Call(Shape(48, 8, 64), (250, 250), (250, 250), streams=1),
    "many heads, rows without a key, D 64": Call(Shape(64, 8, 64), (200,), (90,), norm=True),
}
cases = pytest.mark.parametrize("call", CASES.values(), ids=CASES)


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda")


@pytest.fixture(params=PATHS)
def path(request, device, monkeypatch):
    """Every path of this GPU in turn."""
    best = F.diff_attention_path(torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=device))
    return take_path(request.param, best, "CODA_DIFF_ATTENTION_PATH", monkeypatch)


def rows_of(call: Call, n: int) -> dict[str, slice]:
    """What sequence n of a packed call owns of each tensor."""
    a, b = (int(cumulative(lengths)[n]) for lengths in (call.lq, call.lk))
    tokens, keys = slice(a, a + call.lq[n]), slice(b, b + call.lk[n])
    return dict(q=tokens, lam=tokens, k=keys, v=keys)


class TestEveryPath:
    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("packed", [False, True])
    def test_small_problem(self, device, path, dim, packed):
        """Everything at once on few tokens: what compute-sanitizer has the time for."""
        call = Call(Shape(2, 1, dim), (70, 3) if packed else (70,), (90, 200) if packed else (150,), packed=packed, norm=True)
        tensors = call.make(torch.device("cpu"), torch.bfloat16)
        exact = call.run({name: t.double() for name, t in tensors.items()}, reference.diff_attention)
        on_gpu = {name: t.to(device).requires_grad_() for name, t in tensors.items()}
        y = call.run(on_gpu)
        y.backward(torch.ones(y.shape, dtype=y.dtype).to(device))
        torch.testing.assert_close(y.detach().cpu(), exact.bfloat16(), rtol=2e-2, atol=2e-2)
        assert all(bool(t.grad.cpu().isfinite().all()) for t in on_gpu.values())

    @cases
    @pytest.mark.parametrize("dtype", LOW)
    def test_at_most_twice_the_error_of_plain_pytorch(self, device, path, call, dtype):
        tensors = call.make(device, dtype)
        exact_inputs = {name: t.double() for name, t in tensors.items()}
        grad_y = torch.randn(tensors["q"].shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        exact = call.run(exact_inputs, reference.diff_attention)
        exact_grads = gradients(call, exact_inputs, reference.diff_attention, grad_y)
        baseline, baseline_grads = plain(call, tensors, grad_y)
        with poisoned_memory(), torch.no_grad():
            y = call.run(tensors)
        with poisoned_memory():
            grads = gradients(call, tensors, grad_y=grad_y)
        assert y.dtype == dtype and error(y, exact) <= 2 * error(baseline, exact)
        # Where a row has a single key, dS is a difference of two equal numbers, which plain PyTorch takes before rounding them.
        rounding = torch.finfo(dtype).eps * exact_grads["v"].abs().max().item() if call.lk == (1,) else 0.0
        for name, grad in grads.items():
            allowed = 2 * error(baseline_grads[name], exact_grads[name]) + rounding
            # In float16 plain PyTorch may overflow.
            assert math.isnan(allowed) and bool(grad.isfinite().all()) or error(grad, exact_grads[name]) <= allowed, name

    @cases
    def test_with_and_without_autograd_are_the_same(self, device, path, call):
        tensors = call.make(device, torch.bfloat16)
        with torch.no_grad():
            y = call.run(tensors)
        assert torch.equal(call.run({name: t.requires_grad_() for name, t in tensors.items()}), y)

    @pytest.mark.parametrize("name", ["packed", "packed, D 64", "packed, one stream"])
    def test_a_sequence_does_not_feel_its_neighbours(self, device, path, name):
        """Bit for bit alone and in a batch, even beside one that is not a number."""
        call = CASES[name]
        tensors = call.make(device, torch.bfloat16)
        for n in range(len(call.lq)):
            mine = rows_of(call, n)
            alone = {key: t[mine[key]] if key in mine else t for key, t in tensors.items()}
            beside = {key: torch.full_like(t, float("nan")) if key in mine else t for key, t in tensors.items()}
            for key, rows in mine.items():
                if key in tensors:
                    beside[key][rows] = tensors[key][rows]
            one = call._replace(lq=call.lq[n:n + 1], lk=call.lk[n:n + 1])
            y = one.run(alone)
            assert torch.equal(call.run(tensors)[mine["q"]], y)
            assert torch.equal(call.run(beside)[mine["q"]], y)
            grad_y = torch.randn(tensors["q"].shape, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
            expected, got = gradients(one, alone, grad_y=grad_y[mine["q"]]), gradients(call, beside, grad_y=grad_y)
            for key, rows in mine.items():
                if key in tensors:
                    torch.testing.assert_close(got[key][rows], expected[key])

    @pytest.mark.parametrize("dim", [64, 128])
    def test_slices_of_one_projection(self, device, path, dim):
        """q, k and v as views of one tensor give the same as copies, and on the fast paths are not copied."""
        call = Call(Shape(8, 2, dim), (512,) * 4, (512,) * 4)
        tensors = call.make(device, torch.bfloat16)
        joint = torch.cat([tensors[name].flatten(2) for name in "qkv"], -1)
        views = joint.split([8 * dim, 2 * dim, 2 * dim], -1)
        strided = tensors | {name: t.unflatten(-1, (-1, dim)) for name, t in zip("qkv", views)}
        with torch.no_grad():
            y = call.run(tensors)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            from_views = call.run(strided)
            peak = torch.cuda.max_memory_allocated() - before
        assert torch.equal(from_views, y)
        if path != "portable":
            assert peak < 1.5 * y.nbytes
        a, b = gradients(call, strided), gradients(call, tensors)
        for name in a:
            torch.testing.assert_close(a[name], b[name])

    def test_rows_that_begin_anywhere(self, device, path):
        """Rows off a multiple of 16 bytes, and expanded heads."""
        call = CASES["norm"]
        tensors = call.make(device, torch.bfloat16)
        shifted = dict(tensors)
        for name in "qkv":
            flat = torch.empty(tensors[name].numel() + 1, dtype=torch.bfloat16, device=device)[1:]
            shifted[name] = flat.view_as(tensors[name]).copy_(tensors[name])
        assert torch.equal(call.run(shifted), call.run(tensors))
        same = tensors | {name: tensors[name][:, :, :1].expand_as(tensors[name]) for name in "kv"}
        assert torch.equal(call.run(same), call.run({name: t.contiguous() for name, t in same.items()}))

    @pytest.mark.parametrize("packed", [False, True])
    def test_no_keys_at_all(self, device, path, packed):
        call = Call(Shape(4, 2, 64), (70, 3) if packed else (70,), (0, 0) if packed else (0,), packed=packed, norm=True)
        tensors = call.make(device, torch.bfloat16)
        with poisoned_memory():
            assert not call.run(tensors).any()
            assert not any(g.any() for g in gradients(call, tensors).values())

    @pytest.mark.parametrize("dim", [64, 128])
    def test_large_logits(self, device, path, dim):
        call = Call(Shape(4, 2, dim), (200,), (200,), streams=1)
        tensors = call.make(device, torch.bfloat16)
        tensors["q"] = tensors["q"] * 1000
        exact = call.run({name: t.double() for name, t in tensors.items()}, reference.diff_attention)
        torch.testing.assert_close(call.run(tensors), exact.bfloat16(), rtol=2e-2, atol=2e-2)
        assert all(bool(g.isfinite().all()) for g in gradients(call, tensors).values())

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    @pytest.mark.parametrize("streams", [1, 2])
    def test_what_is_not_a_number_stays_with_those_who_see_it(self, device, path, name, streams):
        tensors = (call := Call(Shape(4, 2, 64), (200,), (200,), streams=streams)).make(device, torch.bfloat16)
        y = call.run(tensors)
        tensors[name][0, 130, 1] = math.nan  # token 130 of head 1
        bad = call.run(tensors).isnan().all(-1)[0]
        must, may = torch.zeros_like(bad), torch.zeros_like(bad)
        if name == "q":
            must[130, 1] = may[130, 1] = True
        else:
            must[130:, 2:] = may[130:, 2:] = True  # causal; query heads 2 and 3 read KV head 1
        if name == "v":
            may[:, 2:] = True  # a weight of 0 times NaN, as in plain PyTorch
        assert bool(bad[must].all()) and not bool(bad[~may].any())
        assert torch.equal(call.run(tensors)[0][~may], y[0][~may])

    @pytest.mark.parametrize("name", [name for name in CASES if name.startswith("many heads")])
    def test_every_repeat_is_the_same(self, device, path, name):
        """Often, since what a block still reads of one item while the next one arrives is a matter of luck."""
        call = CASES[name]
        tensors = call.make(device, torch.bfloat16)
        with torch.no_grad():
            y = call.run(tensors)
            assert all(torch.equal(call.run(tensors), y) for _ in range(100))

    def test_repeats(self, device, path):
        """Bit for bit; the sm90 path, which adds shares of grad_q in any order, where it is asked to."""
        call = Call(Shape(8, 2, 128), (1000,), (1000,), norm=True)
        tensors = call.make(device, torch.bfloat16)
        assert torch.equal(call.run(tensors), call.run(tensors))
        with deterministic():
            a, b = gradients(call, tensors), gradients(call, tensors)
        assert all(torch.equal(a[name], b[name]) for name in a)
        for name, grad in gradients(call, tensors).items():
            assert torch.equal(grad, a[name]) or path == "sm90", name
            torch.testing.assert_close(grad, a[name], rtol=2e-2, atol=1e-2 * float(a[name].abs().max()))


class TestChoice:
    def test_low_precision_goes_to_tensor_cores(self, device):
        major, _ = torch.cuda.get_device_capability(device)
        q = torch.empty(1, 1, 1, 64, dtype=torch.float16, device=device)
        assert F.diff_attention_path(q).path == ("sm90" if major == 9 else "sm80" if major >= 8 else "portable")

    @pytest.mark.parametrize("dtype, dim, scale, reason", [
        (torch.float32, 128, None, "float32"), (torch.bfloat16, 96, None, "head dimensions"), (torch.bfloat16, 64, -1.0, "positive scale")])
    def test_everything_else_is_served_and_says_why(self, device, dtype, dim, scale, reason):
        choice = F.diff_attention_path(torch.empty(1, 1, 1, dim, dtype=dtype, device=device), scale=scale)
        assert choice.path == "portable" and reason in choice.reason

    def test_a_negative_scale(self, device):
        call = Call(Shape(4, 2, 64), (70,), (70,), options=dict(scale=-0.125))
        tensors = call.make(device, torch.bfloat16)
        exact = call.run({name: t.double() for name, t in tensors.items()}, reference.diff_attention)
        torch.testing.assert_close(call.run(tensors), exact.bfloat16(), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("name", ["sm90", "fast"])
    def test_a_path_that_cannot_serve_is_refused(self, device, monkeypatch, name):
        monkeypatch.setenv("CODA_DIFF_ATTENTION_PATH", name)
        with pytest.raises(ValueError, match=f"CODA_DIFF_ATTENTION_PATH={name}"):
            F.diff_attention(*(torch.randn(1, 3, 2, 64, device=device) for _ in range(3)))
