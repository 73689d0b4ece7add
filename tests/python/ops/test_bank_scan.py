"""bank_scan: what every chunk reads from the banks, and the memory afterwards."""

import dataclasses
import itertools

import pytest
import torch
from cases import (CONFIGS, CORNERS, Case, Shape, assert_same_memory, cases, compiled, contents, cpu, examples, few_examples, flat,
                   gradients, prototypes, repeatable, vacant)
from hypothesis import given, strategies as st
from torch.testing import assert_close

from coda_attn import CodaConfig, State, functional as F

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

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [Shape(1, 1, 64), Shape(6, 3, 128), Shape(8, 8, 128), Shape(9, 9, 64)], ids=str)
    def test_the_gpu_decides_as_the_cpu_in_clusters(self, dtype, shape):
        """Head dimensions that have kernels of their own, with more heads than a cluster has blocks among them."""
        config = dataclasses.replace(CodaConfig.paper("medium"), window=128, exact_slots=24, summary_slots=16)
        p = Case(config, shape, seen=(100, 0, 70, 300), fresh=(300, 1, 129, 0)).make(dtype)
        (mine, state), (theirs, memory) = scan(p, torch.device("cuda")), scan(p, torch.device("cpu"))
        assert_same_snapshots(mine, theirs, config)
        assert_same_memory(state, memory, config)

    @examples
    @given(cases(longest=16))
    def test_gradients(self, device, case):
        p = case.make()
        assert_close(cpu(gradients(p.to(device), outputs(lambda p: p.scan()))), gradients(p, outputs(lambda p: p.reference_scan())))


MANY_CHUNKS = {
    "default proportions": CodaConfig(window=32, chunk=4, exact_slots=20, num_sinks=3, bank_distance=64),
    "shared gates": CodaConfig(window=32, chunk=8, exact_slots=90, num_sinks=4, gates="shared", bank_distance=64),
    "chunks of twelve, many sinks": CodaConfig(window=48, chunk=12, exact_slots=60, num_sinks=20, gates="shared",
                                               bank_distance=64),
    "chunks of one": CodaConfig(window=3, chunk=1, exact_slots=6, num_sinks=1, bank_distance=None),
    "a chunk as long as the window": CodaConfig(window=40, chunk=40, exact_slots=33, num_sinks=0, bank_distance=None),
    "chunks of hundreds": CodaConfig(window=600, chunk=300, exact_slots=70, num_sinks=2, bank_distance=600),
    "more slots than tokens": CodaConfig(window=8, chunk=4, exact_slots=1500, num_sinks=2, bank_distance=None),
    "one slot beside the sinks": CodaConfig(window=16, chunk=8, exact_slots=3, num_sinks=2, bank_distance=None),
    "nothing but sinks": CodaConfig(window=16, chunk=8, exact_slots=3, num_sinks=3, bank_distance=None),
    "keys that do not age": CodaConfig(window=32, chunk=4, exact_slots=20, num_sinks=3, age_decay=0.0, bank_distance=64),
}
GATES = {
    "random": lambda gate: gate,
    "constant": lambda gate: torch.full_like(gate, 0.25),
    "with ties": lambda gate: gate.round(),
    "falling": lambda gate: -0.01 * torch.arange(len(gate), dtype=gate.dtype)[:, None].expand_as(gate),
    "not always numbers": lambda gate: gate.round().masked_fill(gate > 1, torch.nan).masked_fill(gate < -2, -torch.inf),
}


def retained(p, n, r):
    """What each chunk of sequence n reads from the bank of gate group r, from the rule itself: the sinks' sources and those of the
    other slots in ascending order, chunk by chunk, and how many tokens came in."""
    c, (a, b) = p.config, p.cu_seqlens[n:n + 2].tolist()
    seen, free = int(p.state.tokens_seen[n]), c.exact_slots - c.num_sinks
    positions = p.state.exact_pos[n, r]
    held = c.num_sinks + (positions[c.num_sinks:] >= 0).nonzero()[:, 0]
    sinks = torch.where(positions[:c.num_sinks] >= 0, c.window + torch.arange(c.num_sinks), -1)

    def entries(position, gate, source):
        key = gate.double() + c.age_decay * position.double()
        return torch.stack([key.nan_to_num(-torch.inf, torch.inf, -torch.inf), position.double(), source.double()])

    pool = entries(positions[held], p.state.gate[n, r, c.window + held], c.window + held)
    entered = 0
    for start in range(seen // c.chunk * c.chunk, seen + b - a, c.chunk) if b > a else ():
        if start >= max(seen, c.window):
            position = torch.arange(start - c.window, start - c.window + c.chunk)
            fresh = position >= seen
            source = torch.where(fresh, c.window + c.exact_slots + position - seen, position % c.window)
            gate = torch.where(fresh, p.gate[(a + position - seen).clamp(min=a), r], p.state.gate[n, r, position % c.window])
            pinned = int((position < c.num_sinks).sum())
            sinks = sinks.index_copy(0, position[:pinned], source[:pinned])
            pool = torch.cat([pool, entries(position[pinned:], gate[pinned:], source[pinned:])], 1)
            pool = pool[:, pool[1].argsort(descending=True)]
            pool = pool[:, pool[0].sort(descending=True, stable=True).indices[:free]]
            entered += pinned + int((pool[1] >= position[0]).sum())
        yield sinks, torch.cat([torch.full((free - pool.shape[1],), -1), pool[2].long().sort().values]), entered


class TestRetentionOverManyChunks:
    """Sequences long enough that a scan may cut them into pieces."""

    @pytest.fixture(params=MANY_CHUNKS.values(), ids=MANY_CHUNKS)
    def config(self, request):
        return request.param

    @pytest.fixture(params=GATES.values(), ids=GATES)
    def problem(self, request, config):
        p = Case(config, shape=Shape(2, 2, 2), seen=(0, 70, 3, 0, 45), fresh=(1700, 0, 5, 1, 900)).make()
        return dataclasses.replace(p, gate=request.param(p.gate))

    def test_every_chunk_reads_the_best_tokens_before_it(self, device, config, problem):
        (index, *_), state = scan(problem, device)
        rows = torch.full_like(index, -1)
        entered = torch.zeros(len(state.tokens_seen), dtype=torch.int64)
        for n, r in itertools.product(range(len(entered)), range(index.shape[1])):
            row, inserts = int(problem.cu_seqlens[n]) // config.chunk + 2 * n, 0
            for sinks, others, inserts_so_far in retained(problem, n, r):
                rows[row, r] = torch.cat([sinks, others])
                row, inserts = row + 1, inserts_so_far
            entered[n] += inserts
        assert torch.equal(index[..., :config.num_sinks], rows[..., :config.num_sinks])
        assert torch.equal(index[..., config.num_sinks:].sort(-1).values, rows[..., config.num_sinks:])
        assert torch.equal(state.counts[:, 0], problem.state.counts[:, 0] + entered)

    def test_a_source_keeps_its_slot(self, device, config, problem):
        (index, *_), state = scan(problem, device)
        for n, length in enumerate(problem.cu_seqlens.diff().tolist()):
            row = int(problem.cu_seqlens[n]) // config.chunk + 2 * n
            mine = index[row:row + length // config.chunk + 2].transpose(0, 1)  # (R, rows, Me)
            for r, held in enumerate(mine):
                slots = torch.arange(config.exact_slots)
                before = torch.where(problem.state.exact_pos[n, r] >= 0, config.window + slots, -1)
                held = torch.cat([before[None], held])
                slots = slots.expand_as(held)
                pairs = torch.stack([held[held >= 0], slots[held >= 0]]).unique(dim=1)
                assert len(pairs[0].unique()) == pairs.shape[1]

    def test_the_memory_is_what_the_last_chunk_would_read(self, device, config, problem):
        (index, *_), state = scan(problem, device)
        for n, length in enumerate(problem.cu_seqlens.diff().tolist()):
            seen, first = int(state.tokens_seen[n]), int(problem.state.tokens_seen[n])
            if length == 0:
                assert torch.equal(state.exact_pos[n], problem.state.exact_pos[n])
                continue
            last = int(problem.cu_seqlens[n]) // config.chunk + 2 * n + (seen - 1) // config.chunk - first // config.chunk
            for r, source in enumerate(index[last].long()):
                fresh = source - config.window - config.exact_slots + first
                ring = first - 1 - (first - 1 - source) % config.window
                carried = problem.state.exact_pos[n, r][(source - config.window).clamp(0, config.exact_slots - 1)]
                position = torch.where(source >= config.window + config.exact_slots, fresh,
                                       torch.where(source >= config.window, carried, ring))
                assert torch.equal(state.exact_pos[n, r], torch.where(source >= 0, position, -1))

    def test_a_sequence_does_not_depend_on_the_others(self, device, config, problem):
        p = problem.to(device)
        (index, *_), state = p.scan()
        for n, length in enumerate(p.cu_seqlens.diff().tolist()):
            (alone, *_), own = p.sequence(n).scan()
            row, rows = int(p.cu_seqlens[n]) // config.chunk + 2 * n, length // config.chunk + 1
            assert torch.equal(alone[:rows], index[row:row + rows])
            assert torch.equal(own.exact_pos[0], state.exact_pos[n])


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
    def test_sequences_of_one_length_need_no_ends(self, device, config):
        p = Case(config, seen=(11, 0, 4), fresh=(13, 13, 13)).make().to(device)
        (snapshots, state), ends = p.scan(), p.cu_seqlens
        p = dataclasses.replace(p, cu_seqlens=ends[:0])
        again, memory = p.scan()
        for a, b in zip((*snapshots, *state.tensors()), (*again, *memory.tensors())):
            assert torch.equal(a, b)
        assert torch.equal(p.attend(again), dataclasses.replace(p, cu_seqlens=ends).attend(snapshots))
        with pytest.raises(ValueError, match="38 tokens are no multiple of 3 sequences"):
            dataclasses.replace(p, k=p.k[:38], v=p.v[:38], gate=p.gate[:38]).scan()

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
