"""decode_step_: one token per sequence, in place, equal to bounded_attention."""

import pytest
import torch
from cases import CONFIGS, Case, Shape, assert_same_memory, cases, compiled, examples, repeatable
from hypothesis import given, strategies as st
from torch.testing import assert_close

from coda_attn import CodaConfig, State, functional as F

all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
STEPS = 21  # several chunks of every configuration here


def steps(p, state, n=STEPS):
    """The problem of every step, all over one state: its sequences have n new tokens each."""
    starts = p.cu_seqlens[:-1]
    return [p.take(starts + t, [1] * len(starts), state) for t in range(n)]


def make(config, device, dtype=torch.float64, seen=(11, 0, 30)):
    return Case(config, seen=seen, fresh=(STEPS,) * len(seen)).make(dtype).to(device)


class TestAgainstBoundedAttention:
    @examples
    @given(cases(longest=20))
    def test_token_by_token(self, device, case):
        p = case._replace(fresh=(STEPS,) * len(case.seen)).make().to(device)
        stepped, state = p.state.clone(), p.state
        for step in steps(p, stepped):
            y = step.step_()
            expected, state = step.take(torch.arange(len(y), device=device), [1] * len(y), state).call()
            assert_close(y, expected)
            assert_same_memory(stepped, state, case.config, same_device=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @repeatable
    @given(cases(longest=20))
    def test_a_whole_prefill_in_low_precision(self, device, dtype, case):
        p = case._replace(fresh=(STEPS,) * len(case.seen)).make(dtype).to(device)
        expected, state = p.call()
        stepped = p.state.clone()
        y = torch.stack([step.step_() for step in steps(p, stepped)], 1).flatten(0, 1)
        assert_close(y, expected)
        assert_same_memory(stepped, state, case.config, same_device=True)

    @all_configs
    def test_from_an_empty_state(self, device, config):
        p = make(config, device, seen=(0, 0))
        expected, state = p.call()
        stepped = State.empty(2, p.k.shape[1], p.k.shape[2], config, dtype=torch.float64, device=device)
        assert_close(torch.stack([step.step_() for step in steps(p, stepped)], 1).flatten(0, 1), expected)
        assert_same_memory(stepped, state, config, same_device=True)

    # More slots than are read at once, and a head dimension of several registers and a rest.
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("differential", [True, False])
    @pytest.mark.parametrize("slots", [
        dict(window=144, chunk=16, exact_slots=90, num_sinks=3),
        dict(window=96, chunk=32, exact_slots=70, summary_slots=67, policy="novelty_lru", gates="shared", num_sinks=0,
             bank_distance=None, mass_bias=True, tau_novel=0.99, tau_spawn=0.99)])
    def test_many_slots(self, device, dtype, differential, slots):
        config = CodaConfig(**slots, differential=differential)
        p = Case(config, Shape(6, 2, 44), seen=(430, 75), fresh=(STEPS, STEPS)).make(dtype).to(device)
        assert (p.state.exact_pos >= 0).sum() > 64
        expected, state = p.call()
        stepped = p.state.clone()
        y = torch.stack([step.step_() for step in steps(p, stepped)], 1).flatten(0, 1)
        assert_close(y, expected)
        assert_same_memory(stepped, state, config, same_device=True)

    @all_configs
    def test_scale(self, device, config):
        p = next(iter(steps(make(config, device), make(config, device).state)))
        expected, _ = p.call(scale=1.7)
        assert_close(torch.ops.coda.decode_step_(*p.step_args(), **p.attention_options(), scale=1.7), expected)


class TestInPlace:
    @all_configs
    def test_the_state_stays_where_it_is(self, device, config):
        p = make(config, device)
        state = p.state.clone()
        where, size = [t.data_ptr() for t in state.tensors()], state.nbytes()
        for step in steps(p, state):
            step.step_()
        assert [t.data_ptr() for t in state.tensors()] == where and state.nbytes() == size
        assert state.tokens_seen.tolist() == [11 + STEPS, STEPS, 30 + STEPS]

    @all_configs
    def test_a_sequence_does_not_depend_on_the_others(self, device, config):
        for dtype in (torch.float32, torch.bfloat16):
            p, order = make(config, device, dtype), torch.tensor([2, 0, 1], device=device)
            state, moved = p.state.clone(), p.state.map(lambda t: t[order].clone())
            alone = p.state.map(lambda t: t[2:3].clone())
            for step in steps(p, state):
                y = step.step_()
                assert torch.equal(step.take(order, [1] * 3, moved).step_(), y[order])
                assert torch.equal(step.take(order[:1], [1], alone).step_()[0], y[2])
            assert all(torch.equal(a[order], b) for a, b in zip(state.tensors(), moved.tensors()))

    @all_configs
    def test_non_contiguous_tokens(self, device, config):
        p = make(config, device)
        state, other = p.state.clone(), p.state.clone()
        for step, twin in zip(steps(p, state), steps(p.map(lambda t: torch.stack([t, t], -1)[..., 0]), other)):
            assert torch.equal(step.step_(), twin.step_())
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), other.tensors()))

    @pytest.mark.gpu
    @all_configs
    def test_a_captured_step_replays_over_chunk_starts(self, config):
        device = torch.device("cuda")
        p = make(config, device, torch.bfloat16)
        eager, replayed = p.state.clone(), p.state.clone()
        expected = [step.step_() for step in steps(p, eager)]
        static = steps(p, replayed)[0].map(torch.clone)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # a first run, then the state as it was
            static.step_()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = static.step_()
        static.state.copy_(p.state)
        for step, wanted in zip(steps(p, replayed), expected):
            for name in ("q", "k", "v", "lam", "gate"):
                if getattr(step, name) is not None:
                    getattr(static, name).copy_(getattr(step, name))
            graph.replay()
            assert torch.equal(y, wanted)
        assert all(torch.equal(a, b) for a, b in zip(static.state.tensors(), eager.tensors()))


class TestAutograd:
    @pytest.mark.parametrize("leaf", ["q", "k", "v", "lam", "gate", "theta", "norm_weight", "eta_logit", "state.k", "state.gate"])
    def test_inputs_that_require_grad_are_refused(self, device, leaf):
        p = steps(make(CONFIGS["retention"], device), make(CONFIGS["retention"], device).state)[0]
        p = p.with_leaves({leaf: p.leaves()[leaf].clone().requires_grad_()})
        before = p.state.clone()
        with pytest.raises(RuntimeError, match="decode_step_ changes the state in place and is not differentiable, .* use "
                                               "bounded_attention to train"):
            p.step_()
        assert all(torch.equal(a, b) for a, b in zip(p.state.tensors(), before.tensors()))
        with torch.no_grad():
            p.step_()

    def test_a_graph_that_needs_the_old_contents_notices(self, device):
        p = steps(make(CONFIGS["retention"], device), make(CONFIGS["retention"], device).state)[0]
        weight = torch.ones_like(p.state.k, requires_grad=True)
        loss = (weight * p.state.k).sum()
        p.step_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_inference_mode(self, device):
        p = make(CONFIGS["retention"], device)
        expected, _ = p.call()
        with torch.inference_mode():
            y = torch.stack([step.step_() for step in steps(p, p.state.clone())], 1).flatten(0, 1)
        assert_close(y.clone(), expected)


class TestRegistration:
    @all_configs
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_opcheck(self, device, config, dtype):
        p = make(config, device, dtype)
        torch.library.opcheck(torch.ops.coda.decode_step_.default, steps(p, p.state)[0].step_args(), p.attention_options())

    @all_configs
    def test_compile(self, device, config):
        p = make(config, device)
        eager, state = p.state.clone(), p.state.clone()
        where = [t.data_ptr() for t in state.tensors()]
        decode = compiled(F.decode_step_)
        for step, twin in zip(steps(p, eager), steps(p, state)):
            assert torch.equal(twin.step_(decode), step.step_())
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), eager.tensors()))
        assert [t.data_ptr() for t in state.tensors()] == where
