"""The bounded layer on a GPU in low precision: which kernels serve a call, and the same demands on each of them."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Callable, NamedTuple
from unittest import mock

import pytest
import torch
from cases import (CONTENTS, LOW, PATHS, TOKENS, Case, Problem, Shape, assert_same_memory, deterministic, error, gradients,
                   poisoned_memory, take_path)
from test_bounded_attention import everything, in_pieces
from torch import Tensor
from torch.testing import assert_close

from coda_attn import CodaConfig, functional as F, reference

pytestmark = pytest.mark.gpu
DEFAULT, PAPER = CodaConfig(), CodaConfig.paper("medium")
# The presets with as many keys a chunk, on fewer tokens.
SHORT = dataclasses.replace(DEFAULT, window=64, exact_slots=40)
SHORT_PAPER = dataclasses.replace(PAPER, window=128, exact_slots=24, summary_slots=16)
EVERYTHING = dataclasses.replace(SHORT, summary_slots=24, gates="shared", mass_bias=True, head_norm="rms", theta_pairs="interleaved",
                                 rope_pairs="interleaved", summary_routing="low_freq_key")

CASES = {
    "default": Case(DEFAULT, Shape(8, 2, 128), seen=(70,), fresh=(530,)),
    "default, D 64": Case(DEFAULT, Shape(8, 2, 64), seen=(0, 300), fresh=(333, 100)),
    "paper": Case(PAPER, Shape(4, 1, 128), seen=(200,), fresh=(330,)),
    "paper, D 64": Case(PAPER, Shape(4, 1, 64), seen=(150, 0), fresh=(200, 290)),
    "everything": Case(EVERYTHING, Shape(4, 2, 128), seen=(100, 0), fresh=(120, 131)),
    "everything, D 64": Case(EVERYTHING, Shape(4, 2, 64), seen=(100, 0), fresh=(120, 131)),
    "one stream": Case(dataclasses.replace(SHORT, differential=False), Shape(4, 2, 128), seen=(90,), fresh=(200,)),
    "true positions": Case(dataclasses.replace(SHORT, bank_distance=None), Shape(4, 2, 128), seen=(90,), fresh=(200,)),
    "no slots": Case(dataclasses.replace(SHORT, exact_slots=0, num_sinks=0), Shape(4, 2, 128), seen=(90,), fresh=(200,)),
    "one head": Case(SHORT, Shape(1, 1, 128), seen=(0,), fresh=(150,)),
    "group of 12": Case(SHORT, Shape(12, 1, 64), seen=(70,), fresh=(90,)),
    "chunks of one": Case(dataclasses.replace(SHORT, window=16, chunk=1, exact_slots=9), Shape(4, 2, 128), seen=(20,), fresh=(50,)),
    "chunks of 5": Case(dataclasses.replace(SHORT, window=40, chunk=5, exact_slots=130), Shape(6, 2, 128), seen=(3,), fresh=(190,)),
    # Blocks attend several items each.
    "many items": Case(DEFAULT, Shape(32, 8, 128), seen=(300,), fresh=(1200,)),
    "many items, D 64": Case(PAPER, Shape(32, 8, 64), seen=(0, 300), fresh=(900, 500)),
    "many short sequences": Case(SHORT, Shape(4, 2, 128), seen=(0, 5, 0, 33, 200), fresh=(1, 0, 17, 70, 3)),
}
BOTH = {"default": Case(SHORT, Shape(8, 2, 128), seen=(70, 0, 200, 31), fresh=(100, 0, 65, 210)),
        "paper": Case(SHORT_PAPER, Shape(4, 2, 128), seen=(70, 0, 200, 63), fresh=(100, 0, 65, 210)),
        # 57 slots: what a sequence holds begins at no multiple of 16 bytes.
        "odd slots, D 64": Case(dataclasses.replace(SHORT, window=48, chunk=16, exact_slots=9), Shape(8, 2, 64), seen=(70, 0, 200, 31),
                                fresh=(100, 0, 65, 210)),
        "interleaved, shared gates": Case(dataclasses.replace(SHORT, rope_pairs="interleaved", theta_pairs="interleaved", gates="shared"),
                                          Shape(8, 2, 128), seen=(70, 0, 200, 31), fresh=(100, 0, 65, 210))}
both = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda")


@pytest.fixture(params=PATHS)
def path(request, device, monkeypatch):
    """Every path of this GPU in turn."""
    best = F.bounded_attention_path(torch.empty(1, 128, dtype=torch.bfloat16, device=device))
    return take_path(request.param, best, "CODA_BOUNDED_ATTENTION_PATH", monkeypatch)


# --- the attention op on snapshots that are given -----------------------------------------------------------------------

SUMMARIES = ("summary_k", "summary_v", "summary_mass")


def attended(p: Problem, leaves: dict[str, Tensor], attend: Callable[[Problem, tuple[Tensor, ...]], Tensor], index: Tensor,
             grad_y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of one form of the op, and the gradient of everything that it reads."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    rest = {name: t for name, t in leaves.items() if name not in SUMMARIES}
    y = attend(p.with_leaves(rest), (index, *(leaves[name] for name in SUMMARIES)))
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y.to(y), materialize_grads=True)))


class Known(NamedTuple):
    """One call of the op, and what it gives in float64 and in plain PyTorch of its own dtype."""

    problem: Problem
    leaves: dict[str, Tensor]
    index: Tensor
    grad_y: Tensor
    exact: tuple[Tensor, dict[str, Tensor]]
    plain: tuple[Tensor, dict[str, Tensor]]


@functools.cache
def known(case: Case, dtype: torch.dtype) -> Known:
    p = case.make(dtype).to(torch.device("cuda"))
    (index, *summaries), _ = p.scan()
    # The carried prototypes reach the queries through the snapshots alone.
    leaves = {name: t for name, t in p.leaves().items() if name != "eta_logit" and not name.startswith("state.summary")}
    leaves |= dict(zip(SUMMARIES, summaries))
    grad_y = torch.randn(p.q.shape, generator=torch.Generator().manual_seed(3)).to(p.q)
    wider = {name: t.double() for name, t in leaves.items()}
    narrow = {name: t.to(dtype) for name, t in leaves.items()}
    with torch.device("cuda"):  # where the reference makes what it needs
        exact = attended(p, wider, Problem.reference_attend, index, grad_y)
        with mock.patch.object(reference, "_wide", lambda t: t):
            plain = attended(p, narrow, Problem.reference_attend, index, grad_y)
    return Known(p, leaves, index, grad_y, exact, plain)


class TestEveryPath:
    @pytest.mark.parametrize("dim", [64, 128])
    @pytest.mark.parametrize("config", [SHORT, SHORT_PAPER], ids=["default", "paper"])
    def test_small_problem(self, device, path, config, dim):
        """Everything at once on few tokens: what compute-sanitizer has the time for."""
        config = dataclasses.replace(config, window=32, chunk=16, exact_slots=12, head_norm="rms")
        case = Case(config, Shape(4, 2, dim), seen=(30, 0), fresh=(40, 3))
        q = case.make(torch.bfloat16).to(device)
        q = q.with_leaves({name: t.requires_grad_() for name, t in q.leaves().items()})
        y, _ = q.call()
        with poisoned_memory(), torch.no_grad():
            assert torch.equal(q.call()[0], y)
        y.backward(torch.ones(y.shape, dtype=y.dtype).to(device))
        (exact, _), (plain, _) = known(case, torch.bfloat16)[-2:]
        assert error(y, exact) <= 2 * error(plain, exact)
        assert all(t.grad is None or bool(t.grad.cpu().isfinite().all()) for t in q.leaves().values())

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("dtype", LOW)
    def test_at_most_twice_the_error_of_plain_pytorch(self, device, path, name, dtype):
        p, leaves, index, grad_y, (exact, exact_grads), (plain, plain_grads) = known(CASES[name], dtype)
        with poisoned_memory():
            y, grads = attended(p, leaves, Problem.attend, index, grad_y)
        assert y.dtype == dtype and error(y, exact) <= 2 * error(plain, exact)
        for leaf, grad in grads.items():
            allowed = 2 * error(plain_grads[leaf].to(dtype), exact_grads[leaf]) if grad.numel() else 0.0
            # In float16 plain PyTorch may overflow.
            assert bool(grad.isfinite().all()), leaf
            assert grad.numel() == 0 or math.isnan(allowed) or error(grad.to(dtype), exact_grads[leaf]) <= allowed, leaf

    @both
    def test_with_and_without_autograd_are_the_same(self, device, path, case):
        p = case.make(torch.bfloat16).to(device)
        with torch.no_grad():
            y, state = p.call()
        learned, memory = p.with_leaves({name: t.detach().requires_grad_() for name, t in p.leaves().items()}).call()
        assert torch.equal(learned, y) and all(torch.equal(a, b) for a, b in zip(memory.tensors(), state.tensors()))

    @both
    def test_a_sequence_does_not_feel_its_neighbours(self, device, path, case):
        """Bit for bit alone and in a batch, even beside one that is not a number."""
        p = case.make(torch.bfloat16).to(device)
        (y, state), ends = p.call(), p.cu_seqlens.tolist()
        for n, (a, b) in enumerate(zip(ends, ends[1:])):
            beside = p.map(torch.clone)
            for name in TOKENS:
                getattr(beside, name)[:a] = getattr(beside, name)[b:] = torch.nan
            for name in CONTENTS:
                getattr(beside.state, name)[:n] = getattr(beside.state, name)[n + 1:] = torch.nan
            (alone, own), (poisoned, kept) = p.sequence(n).call(), beside.call()
            assert torch.equal(alone, y[a:b]) and torch.equal(poisoned[a:b], y[a:b])
            for mine, batch, among in zip(own.tensors(), state.tensors(), kept.tensors()):
                assert torch.equal(mine[0], batch[n]) and torch.equal(among[n], batch[n])
            grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
            expected, got = token_gradients(p.sequence(n), grad_y[a:b]), token_gradients(beside, grad_y)
            for name in TOKENS:
                assert_close(got[name][a:b], expected[name])

    @both
    def test_any_split_into_calls_gives_the_same(self, device, path, case):
        p = case.make(torch.bfloat16).to(device)
        y, state = p.call()
        cuts = [[min(n, cut) for cut in (1, 33, 64, 150)] + [n] for n in case.fresh]
        pieces, stepped = in_pieces(p, cuts)
        assert_close(pieces, y, rtol=2e-2, atol=2e-2)
        assert_same_memory(stepped, state, case.config, same_device=True)
        segmented, memory = p.call(segment=64)
        assert_close(segmented, y, rtol=2e-2, atol=2e-2)
        assert_same_memory(memory, state, case.config, same_device=True)

    @both
    def test_slices_of_one_projection(self, device, path, case):
        """q, k and v as views of one tensor, or at rows that begin anywhere, give the same as copies."""
        p = case.make(torch.bfloat16).to(device)
        heads, hkv, dim = case.shape
        joint = torch.cat([t.flatten(1) for t in (p.q, p.k, p.v)], -1)
        views = [t.unflatten(-1, (-1, dim)) for t in joint.split([heads * dim, hkv * dim, hkv * dim], -1)]
        shifted = []
        for t in (p.q, p.k, p.v):
            shifted.append(torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:].view_as(t).copy_(t))
        y, _ = p.call()
        for q, k, v in (views, shifted):
            other = dataclasses.replace(p, q=q, k=k, v=v)
            assert torch.equal(other.call()[0], y)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
        expected, got = (token_gradients(x, grad_y) for x in (p, dataclasses.replace(p, **dict(zip("qkv", views)))))
        for name in TOKENS:
            assert_close(got[name], expected[name])

    @both
    def test_large_logits(self, device, path, case):
        """Nothing overflows. Which key wins is decided by how the bank's keys were rounded."""
        p = case.make(torch.bfloat16).to(device)
        p = dataclasses.replace(p, q=p.q * 1000)
        assert bool(p.call()[0].isfinite().all())
        assert all(bool(g.isfinite().all()) for g in gradients(p, everything).values())

    @pytest.mark.parametrize("name", [name for name in CASES if name.startswith("many items")])
    def test_every_repeat_is_the_same(self, device, path, name):
        """Often, since what a block still reads of one item while the next one arrives is a matter of luck."""
        p = CASES[name].make(torch.bfloat16).to(device)
        with torch.no_grad():
            y, _ = p.call()
            assert all(torch.equal(p.call()[0], y) for _ in range(50))

    @both
    def test_repeats(self, device, path, case):
        """Bit for bit: the forward always, the backward where it is asked to."""
        p = case.make(torch.bfloat16).to(device)
        assert torch.equal(p.call()[0], p.call()[0])
        with deterministic():
            a, b = gradients(p, everything), gradients(p, everything)
        assert all(torch.equal(a[name], b[name]) for name in a)
        for name, grad in gradients(p, everything).items():
            if grad.numel():
                assert_close(grad, a[name], rtol=2e-2, atol=1e-2 * float(a[name].abs().max()))

    @pytest.mark.parametrize("config", [SHORT, SHORT_PAPER], ids=["default", "paper"])
    def test_extra_memory_does_not_grow_with_the_input(self, device, path, config):
        def extra(length: int) -> int:
            """Peak beyond inputs and output."""
            p = dataclasses.replace(
                Case(config, Shape(4, 2, 64), seen=(0,), fresh=(1,)).make(torch.bfloat16).to(device),
                **{name: torch.rand(1, length, *tail, device=device).to(dtype) for name, tail, dtype in (
                    ("q", (4, 64), torch.bfloat16), ("k", (2, 64), torch.bfloat16), ("v", (2, 64), torch.bfloat16),
                    ("lam", (4,), torch.bfloat16), ("gate", (config.gate_groups(2),), torch.float32))})
            peaks = []
            with torch.no_grad():
                for _ in range(2):  # the first call also fills caches
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    y, state = p.call(cu_seqlens=None, segment=1024)
                    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
                    del y  # which may lie in a block that the allocator had at hand, up to a MB larger
                    peaks.append(peak - before - (after - torch.cuda.memory_allocated()))
                    del state
            return peaks[-1]

        assert extra(16384) <= extra(4096) + 4096


def token_gradients(p: Problem, grad_y: Tensor) -> dict[str, Tensor]:
    """Gradients of what each token brings."""
    leaves = {name: getattr(p, name).detach().requires_grad_() for name in TOKENS}  # views stay views
    y, _ = dataclasses.replace(p, **leaves).call()
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y, materialize_grads=True)))


class TestChoice:
    def test_low_precision_goes_to_tensor_cores(self, device):
        major, _ = torch.cuda.get_device_capability(device)
        q = torch.empty(1, 1, 64, dtype=torch.float16, device=device)
        assert F.bounded_attention_path(q).path == ("sm90" if major == 9 else "sm80" if major >= 8 else "portable")

    @pytest.mark.parametrize("dtype, dim, scale, reason", [
        (torch.float32, 128, None, "float32"), (torch.bfloat16, 96, None, "head dimensions"), (torch.bfloat16, 64, -1.0, "positive scale")])
    def test_everything_else_is_served_and_says_why(self, device, dtype, dim, scale, reason):
        choice = F.bounded_attention_path(torch.empty(1, 1, dim, dtype=dtype, device=device), scale=scale)
        assert choice.path == "portable" and reason in choice.reason

    def test_a_negative_scale(self, device):
        p = CASES["group of 12"].make(torch.bfloat16)
        exact, _ = p.to(torch.float64).to(device).call(scale=-0.125)
        assert_close(p.to(device).call(scale=-0.125)[0], exact.bfloat16(), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("name", ["sm90", "fast"])
    def test_a_path_that_cannot_serve_is_refused(self, device, monkeypatch, name):
        p = CASES["group of 12"].make(torch.float32).to(device)
        monkeypatch.setenv("CODA_BOUNDED_ATTENTION_PATH", name)
        with pytest.raises(ValueError, match=f"CODA_BOUNDED_ATTENTION_PATH={name}"):
            p.call()
