"""diff_attention: dense and packed, one stream and two, against the reference."""

from __future__ import annotations

from typing import NamedTuple, Optional
from unittest import mock

import pytest
import torch
from cases import SHAPES, Shape, compiled, cpu, cumulative, error, examples, few_examples, seeds
from hypothesis import given, strategies as st
from torch.testing import assert_close

from coda_attn import functional as F, reference


class Call(NamedTuple):
    """One call in a form that reads well where a test fails."""

    shape: Shape = SHAPES[0]
    lq: tuple[int, ...] = (5, 5)  #: queries per sequence
    lk: tuple[int, ...] = (9, 9)  #: keys per sequence
    packed: bool = False
    streams: int = 2
    norm: bool = False
    options: dict = {}
    seed: int = 0

    def make(self, device: torch.device, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        (h, hkv, d), generator = self.shape, torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        tq, tk = sum(self.lq), sum(self.lk)
        made = dict(q=randn(tq, h, d), k=randn(tk, hkv, d), v=randn(tk, hkv, d))
        if self.streams == 2:
            made |= dict(lam=randn(tq, h).sigmoid(), theta=randn(h, d // 2))
        if self.norm:
            made |= dict(norm_weight=1 + 0.3 * randn(d))
        if not self.packed:
            made |= {name: t.unflatten(0, (len(self.lq), -1)) for name, t in made.items() if name in ("q", "k", "v", "lam")}
        return {name: t.to(device, dtype) for name, t in made.items()}

    def run(self, tensors: dict[str, torch.Tensor], fn=F.diff_attention) -> torch.Tensor:
        device, ends = tensors["q"].device, {}
        if self.packed:
            ends = dict(cu_seqlens_q=cumulative(self.lq).to(device), cu_seqlens_k=cumulative(self.lk).to(device, torch.int32))
        return fn(**tensors, **ends, **self.options)


@st.composite
def calls(draw, longest: int = 12) -> Call:
    packed, length = draw(st.booleans()), st.integers(0, longest)
    n = draw(st.integers(1, 3))
    if packed:
        lq, lk = (tuple(draw(st.lists(length, min_size=n, max_size=n))) for _ in range(2))
    else:
        lq, lk = ((draw(st.integers(1, longest)),) * n for _ in range(2))
    options = dict(causal=draw(st.booleans()), scale=draw(st.sampled_from([None, 0.1, 1.7])),
                   theta_pairs=draw(st.sampled_from(["half", "interleaved"])), norm_eps=draw(st.sampled_from([1e-6, 0.1])))
    return Call(draw(st.sampled_from(SHAPES)), lq, lk, packed, draw(st.sampled_from([1, 2])), draw(st.booleans()), options,
                draw(seeds))


def gradients(call: Call, tensors: dict[str, torch.Tensor], fn=F.diff_attention,
              grad_y: Optional[torch.Tensor] = None) -> dict[str, torch.Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    y = call.run(leaves, fn)
    if grad_y is None:
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_y.to(y), materialize_grads=True)))


KINDS = {
    "one stream": Call(streams=1),
    "two streams": Call(),
    "norm": Call(norm=True, options=dict(theta_pairs="interleaved", scale=0.7)),
    "not causal": Call(options=dict(causal=False)),
    "packed, more queries than keys": Call(lq=(4, 0, 3), lk=(6, 2, 1), packed=True, norm=True),
}
kinds = pytest.mark.parametrize("call", KINDS.values(), ids=KINDS)


class TestAgainstTheReference:
    @examples
    @given(calls())
    def test_outputs(self, device, call):
        tensors = call.make(device)
        assert_close(call.run(tensors).cpu(), call.run(cpu(tensors), reference.diff_attention))

    @examples
    @given(calls())
    def test_gradients(self, device, call):
        tensors = call.make(device)
        assert_close(cpu(gradients(call, tensors)), gradients(call, cpu(tensors), reference.diff_attention))

    @few_examples
    @given(st.sampled_from([1, 63, 64, 65, 130]), st.sampled_from([1, 127, 513, 600]), st.booleans(), seeds)
    def test_many_keys(self, device, lq, lk, causal, seed):
        """Longer than one tile of queries and of keys."""
        call = Call(lq=(lq,), lk=(lk,), norm=True, options=dict(causal=causal), seed=seed)
        tensors = call.make(device)
        assert_close(call.run(tensors).cpu(), call.run(cpu(tensors), reference.diff_attention))
        assert_close(cpu(gradients(call, tensors)), gradients(call, cpu(tensors), reference.diff_attention))

    @pytest.mark.parametrize("dim", [2, 64, 128, 130, 256])
    def test_head_dims(self, device, dim):
        call = Call(Shape(4, 2, dim), norm=True)
        tensors = call.make(device)
        assert_close(call.run(tensors).cpu(), call.run(cpu(tensors), reference.diff_attention))
        assert_close(cpu(gradients(call, tensors)), gradients(call, cpu(tensors), reference.diff_attention))

    @few_examples
    @given(calls())
    def test_non_contiguous(self, device, call):
        tensors = call.make(device)
        strided = {name: torch.stack([t, t.flip(-1)], -1)[..., 0] for name, t in tensors.items()}
        assert not any(t.is_contiguous() for t in strided.values() if t.numel())
        y = call.run(tensors)
        assert torch.equal(call.run(strided), y)
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y)
        leaves, expected = {name: t.requires_grad_() for name, t in strided.items()}, gradients(call, tensors)
        grads = torch.autograd.grad(call.run(leaves), list(leaves.values()), grad_y, materialize_grads=True)
        assert all(torch.equal(grad, expected[name]) for name, grad in zip(leaves, grads))

    def test_heads_before_tokens(self, device):
        call = KINDS["norm"]
        tensors = call.make(device)
        moved = {name: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 4 else t for name, t in tensors.items()}
        assert torch.equal(call.run(moved), call.run(tensors))

    def test_expanded_gradient(self, device):
        call = KINDS["two streams"]
        tensors = call.make(device)
        one = torch.ones((), dtype=torch.float64, device=device)
        y = call.run(tensors)
        assert_close(gradients(call, tensors, grad_y=one.expand(y.shape)), gradients(call, tensors, grad_y=torch.ones_like(y)))


class TestEdges:
    @pytest.mark.parametrize("norm", [False, True])
    def test_rows_without_a_key_are_zero_and_so_are_their_gradients(self, device, norm):
        call = Call(lq=(7, 7), lk=(3, 3), norm=norm)
        tensors = call.make(device)
        assert not call.run(tensors)[:, :4].any() and bool(call.run(tensors)[:, 4:].any())
        grads = gradients(call, tensors)
        assert not grads["q"][:, :4].any() and not grads["lam"][:, :4].any()
        assert_close(cpu(grads), gradients(call, cpu(tensors), reference.diff_attention))

    @pytest.mark.parametrize("packed", [False, True])
    def test_no_keys_at_all(self, device, packed):
        call = Call(lq=(3, 3), lk=(0, 0), packed=packed, norm=True)
        tensors = call.make(device)
        assert not call.run(tensors).any()
        assert not any(g.any() for g in gradients(call, tensors).values())

    def test_no_queries(self, device):
        call = Call(lq=(0, 0), lk=(3, 3))
        tensors = call.make(device) | dict(q=torch.zeros(2, 0, 4, 6, device=device).double(), lam=torch.zeros(2, 0, 4, device=device).double())
        assert call.run(tensors).shape == (2, 0, 4, 6)
        assert not any(g.any() for g in gradients(call, tensors).values())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_large_logits(self, device, dtype):
        """Logits in the thousands: each row is the value of its best key, with no overflow on the way."""
        call = Call(lq=(9,), lk=(9,), streams=1)
        tensors = call.make(device, dtype)
        tensors["q"] = tensors["q"] * 2000
        exact = call.run({name: t.cpu().double() for name, t in tensors.items()}, reference.diff_attention)
        assert_close(call.run(tensors).cpu(), exact.to(dtype))
        grads = gradients(call, tensors)
        assert all(bool(g.isfinite().all()) for g in grads.values())

    def test_one_token(self, device):
        call = Call(lq=(1,), lk=(1,), streams=1)
        tensors = call.make(device)
        assert_close(call.run(tensors), tensors["v"].repeat_interleave(2, 2))


def plain(call, tensors, grad_y=None):
    """The reference in nothing but the inputs' dtype."""
    with mock.patch.object(reference, "_wide", lambda t: t):
        return call.run(tensors, reference.diff_attention), gradients(call, tensors, reference.diff_attention, grad_y)


class TestLowPrecision:
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [Shape(4, 2, 64), Shape(3, 1, 24)], ids=["D64", "D24"])
    def test_at_most_twice_the_error_of_plain_pytorch(self, device, shape, dtype, norm):
        call = Call(shape, (70, 70), (90, 90), norm=norm)
        tensors = call.make(device, dtype)
        wide = {name: t.double() for name, t in cpu(tensors).items()}
        (baseline, baseline_grads), exact_grads = plain(call, tensors), gradients(call, wide, reference.diff_attention)
        ours, exact = call.run(tensors), call.run(wide, reference.diff_attention)
        assert ours.dtype == dtype
        assert error(ours, exact) <= 2 * error(baseline, exact)
        for name, grad in gradients(call, tensors).items():
            assert error(grad, exact_grads[name]) <= 2 * error(baseline_grads[name], exact_grads[name]), name

    def test_parameters_may_be_wider_than_the_model(self, device):
        call = KINDS["norm"]
        tensors = call.make(device, torch.bfloat16)
        mixed = {name: t.float() if name in ("theta", "norm_weight") else t for name, t in tensors.items()}
        assert torch.equal(call.run(mixed), call.run(tensors))
        grads = gradients(call, mixed)
        assert grads["theta"].dtype == grads["norm_weight"].dtype == torch.float32 and grads["q"].dtype == torch.bfloat16


class TestRowIndependence:
    @few_examples
    @given(st.lists(st.integers(0, 150), min_size=1, max_size=4), st.booleans(), st.booleans(), seeds,
           st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def test_packed_rows(self, device, lengths, norm, causal, seed, dtype):
        call = Call(lq=tuple(lengths), lk=tuple(n + 3 for n in lengths), packed=True, norm=norm, options=dict(causal=causal), seed=seed)
        tensors = call.make(device, dtype)
        y = call.run(tensors).split(lengths)
        for n, (a, b) in enumerate(zip(cumulative(call.lq)[:-1].tolist(), cumulative(call.lk)[:-1].tolist())):
            rows = dict(q=slice(a, a + call.lq[n]), lam=slice(a, a + call.lq[n]), k=slice(b, b + call.lk[n]), v=slice(b, b + call.lk[n]))
            alone = {name: t[rows[name]] if name in rows else t for name, t in tensors.items()}
            assert torch.equal(call._replace(lq=call.lq[n:n + 1], lk=call.lk[n:n + 1]).run(alone), y[n])
            dense = {name: t[None] if name in rows else t for name, t in alone.items()}
            if lengths[n]:
                assert torch.equal(call._replace(packed=False).run(dense)[0], y[n])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dense_rows_in_any_order(self, device, dtype):
        call = Call(Shape(4, 2, 64), (70,) * 3, (90,) * 3)
        tensors, order = call.make(device, dtype), [2, 0, 1]
        moved = {name: t if name == "theta" else t[order] for name, t in tensors.items()}
        y = call.run(tensors)
        assert torch.equal(call.run(moved), y[order])
        one = {name: t if name == "theta" else t[1:2] for name, t in tensors.items()}
        assert torch.equal(call.run(one), y[1:2])


class TestRegistration:
    @kinds
    def test_gradcheck(self, device, call):
        tensors = call.make(device)
        leaves = [t.requires_grad_() for t in tensors.values()]
        assert torch.autograd.gradcheck(lambda *ts: call.run(dict(zip(tensors, ts))), leaves, fast_mode=True)

    def test_gradients_where_only_some_are_asked_for(self, device):
        call = KINDS["norm"]
        tensors = call.make(device)
        everything = gradients(call, tensors)
        for name in tensors:
            one = {key: t.detach().requires_grad_(key == name) for key, t in tensors.items()}
            y = call.run(one)
            grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y)
            assert torch.equal(torch.autograd.grad(y, one[name], grad_y)[0], everything[name])

    def test_higher_derivatives_are_refused(self, device):
        tensors = KINDS["two streams"].make(device)
        q = tensors["q"].requires_grad_()
        grad, = torch.autograd.grad(KINDS["two streams"].run(tensors).sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="diff_attention is differentiable once"):
            grad.sum().backward()

    @kinds
    def test_opcheck(self, device, call):
        tensors = call.make(device)
        ends = (cumulative(call.lq).to(device), cumulative(call.lk).to(device)) if call.packed else (None, None)
        args = [tensors.get(name) for name in ("q", "k", "v", "lam", "theta", "norm_weight")]
        leaves = [None if t is None else t.requires_grad_() for t in args]
        torch.library.opcheck(torch.ops.coda.diff_attention.default, (*leaves, *ends), call.options)

    @pytest.mark.parametrize("name", ["norm", "packed, more queries than keys"])
    def test_compile(self, device, name):
        call = KINDS[name]
        tensors = call.make(device)
        attend = compiled(F.diff_attention)
        assert_close(call.run(tensors, attend), call.run(tensors))
        assert_close(gradients(call, tensors, attend), gradients(call, tensors))

    def test_compile_with_dynamic_lengths(self, device):
        attend = compiled(F.diff_attention, dynamic=True)
        for length in (3, 5, 8):
            call = Call(lq=(length,) * 2, lk=(length + 2,) * 2)
            tensors = call.make(device)
            assert_close(gradients(call, tensors, attend), gradients(call, tensors))
