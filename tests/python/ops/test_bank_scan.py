"""bank_scan: what every chunk reads from the banks, and the memory afterwards."""

import dataclasses

import pytest
import torch
from cases import (CONFIGS, CORNERS, Case, assert_same_memory, cases, compiled, contents, cpu, examples, few_examples, flat,
                   gradients, prototypes, repeatable, vacant)
from hypothesis import given, strategies as st
from torch.testing import assert_close

from coda_attn import State, functional as F

all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def scan(p, device):
    """The op on a device, its results on the CPU."""
    snapshots, state = p.to(device).scan()
    return tuple(t.cpu() for t in snapshots), state.map(torch.Tensor.cpu)


def assert_same_snapshots(mine, theirs, config):
    index, expected = mine[0], theirs[0]
    if config.policy == "retention":  # beyond the sinks, a set
        assert torch.equal(index[..., :config.num_sinks], expected[..., :config.num_sinks])
        index, expected = index.sort(-1).values, expected.sort(-1).values
    assert torch.equal(index, expected)
    assert_close(prototypes(*mine[1:]), prototypes(*theirs[1:]))


def outputs(scan):
    """Everything floating-point that a scan returns, in an order that does not depend on that of the slots."""
    def read(p):
        snapshots, state = scan(p)
        return [*prototypes(*snapshots[1:]), *flat(state, p.config)]
    return read


class TestAgainstTheReference:
    @examples
    @given(cases())
    def test_decisions_and_memory(self, device, case):
        p = case.make()
        (snapshots, state), (expected, memory) = scan(p, device), p.reference_scan()
        assert_same_snapshots(snapshots, expected, case.config)
        assert_same_memory(state, memory, case.config)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @repeatable
    @given(cases())
    def test_decisions_and_memory_in_low_precision(self, device, dtype, case):
        p = case.make(dtype)
        (snapshots, state), (expected, memory) = scan(p, device), p.reference_scan()
        assert_same_snapshots(snapshots, expected, case.config)
        assert_same_memory(state, memory, case.config)

    @pytest.mark.parametrize("config", CORNERS.values(), ids=CORNERS)
    @pytest.mark.parametrize("seen, fresh", [((0, 0, 0), (1, 0, 33)), ((0, 3, 9), (17, 16, 0)), ((4, 8, 5), (4, 1, 22))])
    def test_corners(self, device, config, seen, fresh):
        p = Case(config, seen=seen, fresh=fresh).make()
        (snapshots, state), (expected, memory) = scan(p, device), p.reference_scan()
        assert_same_snapshots(snapshots, expected, config)
        assert_same_memory(state, memory, config)

    @all_configs
    def test_a_long_sequence_with_many_slots(self, device, config):
        big = dataclasses.replace(config, window=64, chunk=16, exact_slots=40, summary_slots=config.summary_slots * 4)
        p = Case(big, seen=(0, 100), fresh=(500, 300)).make()
        (snapshots, state), (expected, memory) = scan(p, device), p.reference_scan()
        assert_same_snapshots(snapshots, expected, big)
        assert_same_memory(state, memory, big)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @repeatable
    @given(cases(longest=80))
    def test_the_gpu_decides_as_the_cpu(self, dtype, case):
        p = case.make(dtype)
        (mine, state), (theirs, memory) = scan(p, torch.device("cuda")), scan(p, torch.device("cpu"))
        assert_same_snapshots(mine, theirs, case.config)
        assert_same_memory(state, memory, case.config)

    @examples
    @given(cases(longest=16))
    def test_gradients(self, device, case):
        p = case.make()
        assert_close(cpu(gradients(p.to(device), outputs(lambda p: p.scan()))), gradients(p, outputs(lambda p: p.reference_scan())))


class TestMemory:
    @examples
    @given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def test_exact_slots_hold_tokens_seen(self, device, case, dtype):
        p, c = case._replace(seen=(0,) * len(case.seen)).make(dtype).to(device), case.config
        _, state = p.scan()
        for i, group in enumerate(contents(state, c)):
            n, r = divmod(i, p.gate.shape[1])
            heads = [r] if c.gates == "per_head" else slice(None)
            for (place, position), (k, v, gate) in group.items():
                t = int(p.cu_seqlens[n]) + position
                assert torch.equal(v, p.v[t, heads]) and torch.equal(gate, p.gate[t, r])
                expected = p.k[t]
                if place == "bank" and c.bank_distance is not None:
                    expected = F.apply_rope(expected, torch.tensor(position, device=device), p.inv_freq, pairs=c.rope_pairs, inverse=True)
                assert torch.equal(k, expected[heads])

    @examples
    @given(cases(), st.data())
    def test_any_split_into_calls_gives_the_same_memory(self, device, case, data):
        p = case.make().to(device)
        _, state = p.scan()
        cuts = [data.draw(st.integers(0, n)) for n in case.fresh]
        starts, held = p.cu_seqlens[:-1].tolist(), p.state
        for first in (True, False):
            spans = [(s, s + m) if first else (s + m, s + n) for s, m, n in zip(starts, cuts, case.fresh)]
            tokens = torch.cat([torch.arange(*span, device=device) for span in spans])
            _, held = p.take(tokens, [b - a for a, b in spans], held).scan()
        assert_same_memory(held, state, case.config, same_device=True)

    @all_configs
    def test_arguments_stay_as_they_were_and_share_nothing_with_the_results(self, device, config):
        p = Case(config).make().to(device)
        before = p.map(torch.clone)
        snapshots, state = p.scan()
        inputs, theirs = ([p.k, p.v, p.gate, *p.state.tensors()] for p in (p, before))
        assert all(torch.equal(a, b) for a, b in zip(inputs, theirs))
        mine, made = ([t.data_ptr() for t in tensors if t.numel()] for tensors in (inputs, (*snapshots, *state.tensors())))
        assert len(set(made)) == len(made) and not set(made) & set(mine)

    @examples
    @given(cases())
    def test_what_no_token_wrote_is_never_read(self, device, case):
        p = case.make().to(device)
        holes = vacant(p.state.map(torch.Tensor.cpu), case.config).map(lambda t: t.to(device))
        poisoned = State(*(t.masked_fill(hole, torch.nan) if t.is_floating_point() else t
                           for t, hole in zip(p.state.tensors(), holes.tensors())))
        (snapshots, state), (expected, memory) = dataclasses.replace(p, state=poisoned).scan(), p.scan()
        assert all(torch.equal(a, b) for a, b in zip(prototypes(*snapshots[1:]), prototypes(*expected[1:])))
        assert torch.equal(snapshots[0], expected[0])
        assert_same_memory(state, memory, case.config, same_device=True)

    @few_examples
    @given(cases())
    def test_int32_offsets_and_non_contiguous_inputs(self, device, case):
        p = case.make().to(device)
        def strided(t):
            return torch.stack([t, t], -1)[..., 0]
        other = dataclasses.replace(p.map(strided), cu_seqlens=p.cu_seqlens.int())
        (snapshots, state), (expected, memory) = other.scan(), p.scan()
        assert all(torch.equal(a, b) for a, b in zip(snapshots, expected))
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), memory.tensors()))

    @few_examples
    @given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    def test_a_sequence_does_not_depend_on_the_others(self, device, case, dtype):
        p = case.make(dtype).to(device)
        (index, *_), state = p.scan()
        for n, length in enumerate(case.fresh):
            (alone, *_), own = p.sequence(n).scan()
            row, rows = int(p.cu_seqlens[n]) // case.config.chunk + 2 * n, length // case.config.chunk + 1
            assert torch.equal(alone[:rows], index[row:row + rows])
            assert all(torch.equal(mine[0], theirs[n]) for mine, theirs in zip(own.tensors(), state.tensors()))


class TestRegistration:
    @all_configs
    def test_gradcheck(self, device, config):
        # every summary slot is taken: there is no derivative at the mass at which a slot begins to count
        p = Case(config, seen=(30, 26), fresh=(6, 15)).make().to(device)
        assert bool((p.state.summary_mass > 0).all())
        read = ("k", "v", "gate", "eta_logit", "state.")
        leaves = {name: t.requires_grad_() for name, t in p.leaves().items() if name.startswith(read) and t.numel()}

        def scan(*tensors):
            results = outputs(lambda p: p.scan())(p.with_leaves(dict(zip(leaves, tensors))))
            return torch.cat([t.flatten() for t in results if t.is_floating_point()])

        assert torch.autograd.gradcheck(scan, list(leaves.values()), fast_mode=True)

    def test_selection_is_a_constant(self, device):
        """Integers carry no gradient; without summary slots the snapshots have none to give."""
        p = Case(CONFIGS["per_head"]).make().to(device)
        p = p.with_leaves({name: t.requires_grad_() for name, t in p.leaves().items()})
        snapshots, state = p.scan()
        assert not any(t.requires_grad for t in (snapshots[0], state.exact_pos, state.tokens_seen, state.last_touch, state.counts))
        assert state.k.requires_grad and state.v.requires_grad and state.gate.requires_grad

    def test_higher_derivatives_are_refused(self, device):
        p = Case(CONFIGS["retention"]).make().to(device)
        p.k.requires_grad_()
        (_, summary_k, *_), _ = p.scan()
        grad, = torch.autograd.grad(summary_k.square().sum(), p.k, create_graph=True)
        with pytest.raises(RuntimeError, match="bank_scan is differentiable once"):
            grad.sum().backward()

    @all_configs
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_opcheck(self, device, config, dtype):
        p, op = Case(config).make(dtype).to(device), torch.ops.coda.bank_scan.default
        torch.library.opcheck(op, p.scan_args(), config.memory_args())
        # opcheck cannot differentiate an op whose first result is an integer; test_compile does
        p = p.with_leaves({name: t.requires_grad_() for name, t in p.leaves().items()})
        torch.library.opcheck(op, p.scan_args(), config.memory_args(),
                              test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))

    @all_configs
    def test_compile(self, device, config):
        def by_compiled(p):
            *snapshots, state = op(*p.scan_args(), **config.memory_args())
            return tuple(snapshots), State.from_tensors(state)

        op = compiled(torch.ops.coda.bank_scan)
        p = Case(config).make().to(device)
        (snapshots, state), (expected, memory) = by_compiled(p), p.scan()
        assert all(torch.equal(a, b) for a, b in zip((*snapshots, *state.tensors()), (*expected, *memory.tensors())))
        assert_close(gradients(p, outputs(by_compiled)), gradients(p, outputs(lambda p: p.scan())))
