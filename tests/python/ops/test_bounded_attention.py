"""bounded_attention: the bounded layer over whole sequences, as one function and as its two ops."""

import dataclasses
from unittest import mock

import pytest
import torch
from cases import (CONFIGS, CORNERS, CONTENTS, Case, Shape, assert_same_memory, cases, compiled, cpu, error, examples, far_cases,
                   few_examples, flat, gradients, moved, repeatable, vacant)
from hypothesis import given, strategies as st
from torch.testing import assert_close

from coda_attn import CodaConfig, State, functional as F, reference

all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def read(p, device, fn=F.bounded_attention, **options):
    """(y, state) on the CPU, computed on a device."""
    y, state = p.to(device).call(fn, **options)
    return y.cpu(), state.map(torch.Tensor.cpu)


def everything(p, **options):
    """The outputs, for gradients: y and the live contents of the new state."""
    y, state = p.call(**options)
    return [y, *flat(state, p.config)]


def expected_of(p):
    """Outputs of the chunk-parallel reference, the fast one."""
    snapshots, state = p.reference_scan()
    return [p.reference_attend(snapshots), *flat(state, p.config)]


def in_pieces(p, cuts):
    """Reads every sequence in calls of its own sizes: cuts[n] lists the ends of sequence n's calls."""
    y, state, starts = torch.zeros_like(p.q), p.state, p.cu_seqlens.tolist()
    steps = list(zip(*([0, *ends] for ends in cuts)))
    for before, after in zip(steps, steps[1:]):
        spans = [torch.arange(s + a, s + b, device=p.q.device) for s, a, b in zip(starts, before, after)]
        tokens = torch.cat(spans)
        piece, state = p.take(tokens, [len(span) for span in spans], state).call()
        y = y.index_copy(0, tokens, piece)
    return y, state


class TestAgainstTheReference:
    @examples
    @given(cases())
    def test_outputs_and_memory(self, device, case):
        p = case.make()
        (y, state), (expected, memory) = read(p, device), p.call(reference.bounded_attention)
        assert_close(y, expected)
        assert_same_memory(state, memory, case.config)

    @pytest.mark.parametrize("config", CORNERS.values(), ids=CORNERS)
    @pytest.mark.parametrize("seen, fresh", [((0, 0, 0), (1, 0, 33)), ((0, 3, 9), (17, 16, 0)), ((4, 8, 5), (4, 1, 22))])
    def test_corners(self, device, config, seen, fresh):
        p = Case(config, seen=seen, fresh=fresh).make()
        assert_close(read(p, device)[0], expected_of(p)[0])

    @examples
    @given(cases(longest=16))
    def test_gradients(self, device, case):
        p = case.make()
        assert_close(cpu(gradients(p.to(device), everything)), gradients(p, expected_of))

    @all_configs
    @pytest.mark.parametrize("shape", [Shape(4, 2, 64), Shape(4, 1, 130), Shape(2, 2, 256)], ids=str)
    def test_long_sequences_and_large_heads(self, device, config, shape):
        big = dataclasses.replace(config, window=64, chunk=16, exact_slots=40, summary_slots=config.summary_slots * 4)
        p = Case(big, shape, seen=(0, 110), fresh=(100, 70)).make()
        assert_close(cpu(gradients(p.to(device), everything)), gradients(p, expected_of))
        assert_close(read(p, device)[0], expected_of(p)[0])

    @few_examples
    @given(cases(), st.sampled_from([0.1, 1.7]))
    def test_scale(self, device, case, scale):
        p = case.make()
        assert_close(read(p, device, scale=scale)[0], p.call(reference.bounded_attention, scale=scale)[0])

    @few_examples
    @given(cases())
    def test_dense_is_packed(self, device, case):
        n, length = len(case.seen), case.fresh[0]
        p = case._replace(fresh=(length,) * n).make().to(device)
        dense = dataclasses.replace(p, **{name: t.unflatten(0, (n, length)) for name, t in p.leaves().items()
                                          if name in ("q", "k", "v", "lam", "gate")})
        (y, state), (packed, memory) = dense.call(cu_seqlens=None), p.call()
        assert torch.equal(y.flatten(0, 1), packed)
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), memory.tensors()))


class TestTheTwoOps:
    @examples
    @given(cases())
    def test_attention_over_the_scan_s_snapshots(self, device, case):
        p = case.make()
        on_device = p.to(device)
        snapshots, _ = on_device.scan()
        assert torch.equal(on_device.attend(snapshots), on_device.call()[0])
        assert_close(on_device.attend(snapshots).cpu(), p.reference_attend(tuple(t.cpu() for t in snapshots)))

    @all_configs
    def test_gradcheck(self, device, config):
        p = Case(config, seen=(30, 26), fresh=(6, 9)).make().to(device)
        (index, *summaries), _ = p.scan()
        # the unused rows hold masses of 0, at which a slot only begins to count
        rows = torch.cat([torch.arange(*span) for span in ((0, 2), (3, 6))]).to(device)
        leaves = {name: t for name, t in p.leaves().items() if not name.startswith("state.summary") and t.numel()}
        leaves |= {name: t[rows] for name, t in zip(("summary_k", "summary_v", "summary_mass"), summaries) if t.numel()}
        leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}

        def attend(*tensors):
            given = dict(zip(leaves, tensors))
            snapshots = [t.index_copy(0, rows, given.pop(name)) if name in given else t
                         for name, t in zip(("summary_k", "summary_v", "summary_mass"), summaries)]
            return p.with_leaves(given).attend((index, *snapshots))

        assert torch.autograd.gradcheck(attend, list(leaves.values()), fast_mode=True)

    def test_higher_derivatives_are_refused(self, device):
        p = Case(CONFIGS["per_head"]).make().to(device)
        p.q.requires_grad_()
        grad, = torch.autograd.grad(p.call()[0].sum(), p.q, create_graph=True)
        with pytest.raises(RuntimeError, match="bounded_attention is differentiable once"):
            grad.sum().backward()


class TestInvariants:
    @examples
    @given(cases(), st.data())
    def test_any_split_into_calls_gives_the_same(self, device, case, data):
        p = case.make().to(device)
        y, state = p.call()
        calls = data.draw(st.integers(1, 4))
        cuts = [[*sorted(data.draw(st.lists(st.integers(0, n), min_size=calls, max_size=calls))), n] for n in case.fresh]
        pieces, stepped = in_pieces(p, cuts)
        assert_close(pieces, y)
        assert_same_memory(stepped, state, case.config, same_device=True)

    @few_examples
    @given(cases(longest=12), st.data())
    def test_gradients_do_not_depend_on_the_split(self, device, case, data):
        p = case.make().to(device)
        cuts = [[data.draw(st.integers(0, n)), n] for n in case.fresh]

        def split(p):
            y, state = in_pieces(p, cuts)
            return [y, *flat(state, p.config)]

        assert_close(gradients(p, split), gradients(p, everything))

    @examples
    @given(cases(), st.integers(1, 20))
    def test_segments_bound_memory_and_change_nothing(self, device, case, segment):
        p = case.make().to(device)
        (y, state), (segmented, memory) = p.call(), p.call(segment=segment)
        assert_close(segmented, y)
        assert_same_memory(memory, state, case.config, same_device=True)
        assert_close(gradients(p, lambda p: everything(p, segment=segment)), gradients(p, everything))
        with torch.no_grad():  # written in place
            in_place, memory = p.call(segment=segment)
        assert torch.equal(in_place, segmented)
        assert_same_memory(memory, state, case.config, same_device=True)

    @examples
    @given(cases(), st.integers(1, 9))
    def test_within_the_ring_it_is_diff_attention(self, device, case, chunk):
        config = dataclasses.replace(case.config, window=24 * chunk, chunk=chunk)
        p = case._replace(config=config, seen=(0,) * len(case.seen)).make().to(device)
        unbounded = F.diff_attention(p.q, p.k, p.v, p.lam, p.theta, theta_pairs=config.theta_pairs, norm_weight=p.norm_weight,
                                     norm_eps=config.norm_eps, cu_seqlens_q=p.cu_seqlens, cu_seqlens_k=p.cu_seqlens)
        assert_close(p.call()[0], unbounded)

    @examples
    @given(cases(longest=40), dtypes, st.sampled_from([3, 2 ** 63 - 1]), st.randoms(use_true_random=False))
    def test_a_sequence_does_not_depend_on_the_others(self, device, case, dtype, segment, random):
        p = case.make(dtype).to(device)
        y, state = p.call(segment=segment)
        ends, order = p.cu_seqlens.tolist(), random.sample(range(len(case.fresh)), len(case.fresh))
        for n in order:
            alone, own = p.sequence(n).call(segment=segment)
            assert torch.equal(alone, y[ends[n]:ends[n + 1]])
            assert all(torch.equal(mine[0], theirs[n]) for mine, theirs in zip(own.tensors(), state.tensors()))
        tokens = torch.cat([torch.arange(ends[n], ends[n + 1], device=device) for n in order])
        reordered = p.take(tokens, [case.fresh[n] for n in order], p.state.map(lambda t: t[order]))
        assert torch.equal(reordered.call(segment=segment)[0], y[tokens])

    @few_examples
    @given(far_cases())
    def test_nothing_depends_on_how_far_the_sequence_has_come(self, device, case):
        p = case.make()
        far = moved(p, 1000 * p.config.window)
        assert_close(read(far, device)[0], read(p, device)[0])

    @pytest.mark.parametrize("config", [*CORNERS.values(), CONFIGS["per_head"], CONFIGS["retention"]], ids=[*CORNERS, "per_head", "retention"])
    def test_every_query_sees_its_ring_its_bank_and_nothing_else(self, device, config):
        """Read off the gradients: which values an output depends on."""
        c = dataclasses.replace(config, summary_slots=0)
        p, novelty = Case(c, seen=(0,), fresh=(33,)).make().to(device), c.policy == "novelty_lru"
        p.v.requires_grad_()
        y, _ = p.call()
        (index, *_), _ = p.scan()
        weight = torch.randn(y.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
        for t in range(33):
            grad, = torch.autograd.grad((y[t] * weight).sum(), p.v, retain_graph=True)
            start = t // c.chunk * c.chunk
            for head in range(p.k.shape[1]):
                group = min(head, p.gate.shape[1] - 1)
                if novelty:  # the scan has tests of its own
                    banked = [s - c.window - c.exact_slots for s in index[t // c.chunk, 0].tolist() if s >= 0]
                else:
                    banked = reference.retention_bank(p.gate[:, group].cpu(), max(0, start - c.window + c.chunk), c)
                expected = {*banked, *range(max(0, start - c.window + c.chunk), t + 1)}
                assert set(grad[:, head].any(-1).nonzero()[:, 0].tolist()) == expected
                assert len(expected) <= c.slots


class TestEdges:
    @examples
    @given(cases(longest=16))
    def test_what_no_token_wrote_is_never_read(self, device, case):
        p = case.make()
        holes = vacant(p.state, case.config)
        poisoned = {f"state.{name}": getattr(p.state, name).masked_fill(getattr(holes, name), torch.nan) for name in CONTENTS}
        clean, dirty = p.to(device), p.with_leaves(poisoned).to(device)
        (y, state), (expected, memory) = dirty.call(), clean.call()
        assert bool(y.isfinite().all()) and torch.equal(y, expected)
        assert_same_memory(state, memory, case.config, same_device=True)
        grads, clean_grads = gradients(dirty, everything), gradients(clean, everything)
        assert all(torch.equal(grads[name], clean_grads[name]) for name in grads)

    @pytest.mark.parametrize("lengths", [(0,), (0, 0, 0)])
    def test_no_tokens(self, device, lengths):
        p = Case(CONFIGS["retention"], seen=(19,) * len(lengths), fresh=lengths).make().to(device)
        y, state = p.call()
        assert y.shape == p.q.shape
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), p.state.tensors()))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(state.tensors(), p.state.tensors()) if a.numel())

    @all_configs
    def test_large_logits(self, device, config):
        p = Case(dataclasses.replace(config, head_norm="identity")).make()
        p = dataclasses.replace(p, q=p.q * 2000)
        assert_close(read(p, device)[0], expected_of(p)[0])
        assert all(bool(g.isfinite().all()) for g in gradients(p.to(device), everything).values())

    @few_examples
    @given(cases())
    def test_int32_offsets_and_non_contiguous_inputs(self, device, case):
        p = case.make().to(device)
        other = dataclasses.replace(p.map(lambda t: torch.stack([t, t], -1)[..., 0]), cu_seqlens=p.cu_seqlens.int())
        assert torch.equal(other.call()[0], p.call()[0])

    @all_configs
    def test_arguments_stay_as_they_were(self, device, config):
        p = Case(config).make().to(device)
        before = p.map(torch.clone)
        p.call()
        tensors = zip((*p.leaves().values(), *p.state.tensors()), (*before.leaves().values(), *before.state.tensors()))
        assert all(torch.equal(a, b) for a, b in tensors)

    def test_gates_of_another_dtype(self, device):
        p = Case(CONFIGS["per_head"]).make(torch.bfloat16).to(device)
        half = dataclasses.replace(p, gate=p.gate.bfloat16())
        assert torch.equal(half.call()[0], p.call()[0])
        assert gradients(half, everything)["gate"].dtype == torch.bfloat16


class TestLowPrecision:
    @all_configs
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_at_most_twice_the_error_of_plain_pytorch(self, device, config, dtype):
        big = dataclasses.replace(config, window=32, chunk=8, exact_slots=16, summary_slots=config.summary_slots * 2)
        p = Case(big, Shape(4, 2, 32), seen=(60, 90), fresh=(70, 50)).make(dtype)
        (exact_snapshots, _), (snapshots, _) = p.to(torch.float64).reference_scan(), p.reference_scan()
        assert torch.equal(exact_snapshots[0], snapshots[0])  # one choice of tokens, so that only rounding differs

        def exact(p):
            p = p.to(torch.float64)
            return [p.reference_attend(p.reference_scan()[0])]

        def plain(p):
            """The reference in nothing but the model's dtype, gates and summaries too."""
            narrow = p.with_leaves({name: t.to(dtype) for name, t in p.leaves().items()})
            with mock.patch.object(reference, "_wide", lambda t: t):
                return [narrow.reference_attend((snapshots[0], *(t.to(dtype) for t in snapshots[1:])))]

        ours, reached = read(p, device)[0], exact(p)[0]
        assert ours.dtype == dtype
        assert error(ours, reached) <= 2 * error(plain(p)[0], reached)
        exact_grads, plain_grads = gradients(p, exact), gradients(p, plain)
        for name, grad in gradients(p.to(device), lambda p: [p.call()[0]]).items():
            # plain PyTorch takes the snapshots' prototypes as constants
            if grad.numel() and not (big.summary_slots and name in ("k", "v", "gate", "eta_logit")) and "summary" not in name:
                assert error(grad, exact_grads[name]) <= 2 * error(plain_grads[name], exact_grads[name]), name

    @repeatable
    @given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def test_memory_is_that_of_the_reference(self, device, case, dtype):
        p = case.make(dtype)
        (y, state), (expected, memory) = read(p, device), p.call(reference.bounded_attention)
        assert_close(y, expected)
        assert_same_memory(state, memory, case.config)


class TestRegistration:
    @all_configs
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_opcheck(self, device, config, dtype):
        p = Case(config).make(dtype).to(device)
        snapshots, _ = p.scan()
        p = p.with_leaves({name: t.requires_grad_() for name, t in p.leaves().items()})
        torch.library.opcheck(torch.ops.coda.bounded_attention.default, p.attention_args(snapshots), p.attention_options())

    @all_configs
    @pytest.mark.parametrize("segment", [32768, 9])
    def test_opcheck_of_both_together(self, device, config, segment):
        p = Case(config).make().to(device)
        p = p.with_leaves({name: t.requires_grad_() for name, t in p.leaves().items()})
        args = (p.q, p.k, p.v, p.lam, p.theta, p.norm_weight, p.gate, p.cu_seqlens, p.state.tensors(), p.eta_logit, p.inv_freq)
        torch.library.opcheck(torch.ops.coda.bounded_forward.default, args, p.attention_options() | dict(segment=segment))

    @all_configs
    def test_opcheck_of_reading(self, device, config):
        p = Case(config).make().to(device)
        args = (p.q, p.k, p.v, p.lam, p.theta, p.norm_weight, p.gate, p.cu_seqlens, p.state.tensors(), p.eta_logit, p.inv_freq)
        torch.library.opcheck(torch.ops.coda._bounded_read.default, args, p.attention_options())

    @all_configs
    def test_compile(self, device, config):
        attend, p = compiled(F.bounded_attention), Case(config).make().to(device)
        (y, state), (expected, memory) = p.call(attend), p.call()
        assert torch.equal(y, expected)
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), memory.tensors()))
        assert_close(gradients(p, lambda p: everything(p, fn=attend)), gradients(p, everything))

    @all_configs
    def test_compile_of_segments(self, device, config):
        attend, p = compiled(F.bounded_attention), Case(config).make().to(device)
        with torch.no_grad():
            (y, state), (expected, memory) = p.call(attend, segment=9), p.call(segment=9)
        assert torch.equal(y, expected)
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), memory.tensors()))

    def test_compile_with_dynamic_lengths(self, device):
        attend = compiled(F.bounded_attention, dynamic=True)
        for fresh in ((13, 22), (5, 9), (30, 1)):
            p = Case(CONFIGS["retention"], fresh=fresh).make().to(device)
            assert_close(gradients(p, lambda p: everything(p, fn=attend)), gradients(p, everything))
