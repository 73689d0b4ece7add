"""The specification in code: its two forms agree, and it has the properties that make the method what it is."""

import dataclasses
import math

import pytest
import torch
from cases import (CONFIGS, CORNERS, SHAPES, Case, cases, configs, examples, far_cases, few_examples, flat, gradients, moved,
                   seeds)
from hypothesis import given, strategies as st
from torch.testing import assert_close

from coda_attn import CodaConfig, functional as F, reference

def by_chunks(p):
    snapshots, state = p.reference_scan()
    return p.reference_attend(snapshots), state


class TestTwoForms:
    @examples
    @given(cases(), st.lists(st.integers(0, 9), min_size=3, max_size=3))
    def test_random_memories_over_two_calls(self, case, lengths):
        p = case.make()
        y, state = p.call(reference.bounded_attention)
        chunked, chunk_state = by_chunks(p)
        assert_close(chunked, y)
        more = case._replace(seen=tuple(a + b for a, b in zip(case.seen, case.fresh)), fresh=tuple(lengths[:len(case.seen)])).make()
        again, _ = dataclasses.replace(more, state=state).call(reference.bounded_attention)
        assert_close(by_chunks(dataclasses.replace(more, state=chunk_state))[0], again)

    @pytest.mark.parametrize("config", CORNERS.values(), ids=CORNERS)
    @pytest.mark.parametrize("seen, fresh", [((0, 0, 0), (1, 0, 17)), ((4, 8, 5), (4, 1, 11))])
    def test_corners(self, config, seen, fresh):
        p = Case(config, seen=seen, fresh=fresh).make()
        assert_close(by_chunks(p)[0], p.call(reference.bounded_attention)[0])

    @few_examples
    @given(cases(longest=12, sequences=2))
    def test_gradients(self, case):
        p = case.make()

        def outputs(form):
            def read(p):
                y, state = form(p)
                return [y, *flat(state, p.config)]
            return read

        assert_close(gradients(p, outputs(by_chunks)), gradients(p, outputs(lambda p: p.call(reference.bounded_attention))))

    @pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
    def test_gradients_reach_everything(self, config):
        grads = gradients(Case(config, seen=(30, 26)).make(), lambda p: [by_chunks(p)[0]])
        assert all(bool(g.any()) for g in grads.values() if g.numel())


class TestAgainstPyTorch:
    @pytest.mark.parametrize("lq, lk", [(7, 7), (1, 1), (3, 9)])
    def test_one_stream_is_scaled_dot_product_attention(self, lq, lk):
        torch.manual_seed(0)
        q, k, v = torch.randn(2, lq, 4, 6).double(), torch.randn(2, lk, 2, 6).double(), torch.randn(2, lk, 2, 6).double()
        mask = torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, enable_gqa=True).transpose(1, 2)
        assert_close(reference.diff_attention(q, k, v), expected)

    def test_two_streams_and_norm(self):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 5, n, 6).double() for n in (4, 2, 2))
        lam, theta, weight = torch.rand(2, 5, 4).double(), torch.randn(4, 3).double(), torch.randn(6).double()
        # a complex number per pair of dimensions, turned by its angle
        turned = torch.view_as_complex(q.unflatten(-1, (3, 2))) * torch.polar(torch.ones_like(theta), theta)
        second = torch.view_as_real(turned).flatten(-2)
        y = reference.diff_attention(q, k, v) - lam[..., None] * reference.diff_attention(second, k, v)
        assert_close(reference.diff_attention(q, k, v, lam, theta, theta_pairs="interleaved"), y)
        assert_close(reference.diff_attention(q, k, v, lam, theta, theta_pairs="interleaved", norm_weight=weight),
                     torch.nn.functional.rms_norm(y, (6,), weight, eps=1e-6))

    def test_the_ring_alone_is_full_attention(self):
        p = Case(CodaConfig(window=24, chunk=4), seen=(0, 0), fresh=(24, 9)).make()
        expected = reference.diff_attention(p.q, p.k, p.v, p.lam, p.theta, cu_seqlens_q=p.cu_seqlens, cu_seqlens_k=p.cu_seqlens)
        assert_close(p.call(reference.bounded_attention)[0], expected)


class TestRotations:
    @examples
    @given(st.sampled_from(["half", "interleaved"]), st.sampled_from(SHAPES), seeds)
    def test_theta_commutes_with_rope(self, pairs, shape, seed):
        torch.manual_seed(seed)
        q, theta = torch.randn(5, shape.heads, shape.dim).double(), torch.randn(shape.heads, shape.dim // 2).double()
        positions, inv_freq = torch.randint(0, 10 ** 6, (5,)), F.rope_inv_freq(shape.dim)

        def rope(x):
            return reference.apply_rope(x, positions, inv_freq, pairs=pairs)

        assert_close(reference.rotate(rope(q), theta, pairs), rope(reference.rotate(q, theta, pairs)))

    def test_other_pairs_do_not_commute(self):
        torch.manual_seed(0)
        q, theta = torch.randn(1, 1, 6).double(), torch.randn(1, 3).double()
        position, inv_freq = torch.tensor([5]), F.rope_inv_freq(6)
        one = reference.rotate(reference.apply_rope(q, position, inv_freq), theta, "interleaved")
        other = reference.apply_rope(reference.rotate(q, theta, "interleaved"), position, inv_freq)
        assert not torch.allclose(one, other)

    def test_pairs(self):
        x, quarter = torch.arange(1.0, 5.0), torch.full((2,), math.pi / 2).double()
        assert_close(reference.rotate(x, quarter, "half"), torch.tensor([-3.0, -4.0, 1.0, 2.0]))
        assert_close(reference.rotate(x, quarter, "interleaved"), torch.tensor([-2.0, 1.0, -4.0, 3.0]))

    @examples
    @given(st.sampled_from(["half", "interleaved"]), st.integers(0, 10 ** 6), seeds)
    def test_scores_depend_on_relative_positions_alone(self, pairs, shift, seed):
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, 7, n, 6).double() for n in (4, 2, 2))
        lam, theta, inv_freq = torch.rand(1, 7, 4).double(), torch.randn(4, 3).double(), F.rope_inv_freq(6)

        def attend(start):
            turned = (reference.apply_rope(t, torch.arange(start, start + 7)[None], inv_freq, pairs=pairs) for t in (q, k))
            return reference.diff_attention(*turned, v, lam, theta, theta_pairs=pairs)

        assert_close(attend(shift), attend(0))


@st.composite
def retention(draw):
    return draw(configs(policy=st.just("retention")))


class TestRetention:
    @examples
    @given(cases(retention(), longest=40))
    def test_every_snapshot_is_the_top_k_from_scratch(self, case):
        p, c = case._replace(seen=(0,) * len(case.seen)).make(), case.config
        (index, *_), _ = p.reference_scan()
        for n, (a, b) in enumerate(zip(p.cu_seqlens[:-1].tolist(), p.cu_seqlens[1:].tolist())):
            for i, start in enumerate(range(0, b - a, c.chunk)):
                for r, row in enumerate(index[a // c.chunk + 2 * n + i].tolist()):
                    # With a fresh state every source is a new token.
                    held = sorted(s - c.window - c.exact_slots for s in row if s >= 0)
                    assert held == reference.retention_bank(p.gate[a:b, r], max(0, start - c.window + c.chunk), c)

    def test_by_hand(self):
        c = CodaConfig(window=2, chunk=1, exact_slots=3, num_sinks=1, age_decay=0.5)
        gate = torch.tensor([-9.0, 2.0, 1.5, -3.0, 0.5, 0.0])
        # keys 2.5, 2.5, -1.5, 2.5, 2.5 of positions 1 to 5: ties go to the later ones
        assert [reference.retention_bank(gate, n, c) for n in range(7)] == [
            [], [0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 2, 4], [0, 4, 5]]

    @examples
    @given(retention(), st.integers(0, 40), st.integers(0, 40), seeds, st.booleans())
    def test_the_banks_of_two_spans_merge(self, config, first, second, seed, coarse):
        gate = torch.randn(first + second, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gate, position = gate.round() if coarse else gate, torch.arange(first + second)

        def bank(among):
            """The bank of the positions in `among`."""
            masked = torch.where(among | (position < config.num_sinks), gate, -math.inf)
            return [p for p in reference.retention_bank(masked, len(gate), config) if masked[p] > -math.inf]

        halves = bank(position < first) + bank(position >= first)
        assert bank(torch.isin(position, torch.tensor(halves, dtype=torch.int64))) == bank(position >= 0)


class TestNoveltyByHand:
    def test_known_values_touch_and_new_ones_replace_the_least_recent(self):
        c = CodaConfig(window=1, chunk=1, exact_slots=2, num_sinks=0, policy="novelty_lru", gates="shared", bank_distance=None)
        basis = torch.eye(4).double()
        # evicted one by one: a, b, a again, c (replaces b), a closed gate, b (replaces a)
        v = torch.stack([basis[0], basis[1], basis[0], basis[2], basis[3], basis[1], basis[3]])[:, None]
        gate = torch.tensor([0.0, 0.0, 0.0, 0.0, -9.0, 0.0, 0.0]).double()[:, None]
        p = Case(c, SHAPES[1]._replace(kv_heads=1), seen=(0,), fresh=(7,)).make()
        _, state = dataclasses.replace(p, v=v, gate=gate).reference_scan()
        assert state.exact_pos.tolist() == [[[5, 3]]]
        assert state.last_touch.tolist() == [[5, 3]] and state.counts.tolist() == [[4, 1]]


@pytest.mark.parametrize("by", [24, 24000])
@few_examples
@given(far_cases())
def test_nothing_depends_on_how_far_the_sequence_has_come(by, case):
    p = case.make()
    far = moved(p, by * p.config.window)
    assert_close(far.call(reference.bounded_attention)[0], p.call(reference.bounded_attention)[0])
    if p.config.bank_distance is not None:
        assert_close(by_chunks(far)[0], by_chunks(p)[0])


def test_bank_keys_stand_at_one_distance():
    """With bank_distance, what a query sees of a slot is the token as if it had been read that far before the chunk."""
    c = CodaConfig(window=4, chunk=2, exact_slots=3, num_sinks=0, bank_distance=9, gate_bias=False, differential=False)
    p = Case(c, seen=(0,), fresh=(20,)).make()
    y, state = p.call(reference.bounded_attention)
    start, hkv, group = 18, 2, 2
    for h in range(hkv):
        banked = [q for q in state.exact_pos[0, h].tolist()]
        # unrotated keys, then placed
        bare = reference.apply_rope(p.k[banked, h:h + 1], torch.tensor(banked), p.inv_freq, inverse=True)
        placed = reference.apply_rope(bare, torch.full((3,), start - 9), p.inv_freq)
        k = torch.cat([placed, p.k[16:20, h:h + 1]])
        v = torch.cat([p.v[banked, h:h + 1], p.v[16:20, h:h + 1]])
        expected = reference.diff_attention(p.q[None, 19:20, h * group:(h + 1) * group], k[None], v[None], causal=False)
        assert_close(y[19:20, h * group:(h + 1) * group], expected[0])
