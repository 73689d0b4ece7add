"""route_exact_bank against the rule of the semantics, section 3.4, written out as a loop."""

import math
from typing import NamedTuple

import pytest
import torch
from cases import compiled, examples, repeatable, seeds
from hypothesis import given, strategies as st

from coda_attn import functional as F

SKIP, INSERT, TOUCH, REFRESH = range(4)


class Route(NamedTuple):
    batch: int = 2
    heads: int = 2
    dim: int = 5
    candidates: int = 9
    slots: int = 4
    free: float = 0.3  #: share of free slots
    noise: float = 0.2  #: 0: candidates and slots repeat each other
    options: dict = {}
    seed: int = 0

    def make(self, device, dtype=torch.float64):
        b, h, d, t, m = self[:5]
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def choose(high, *shape):
            return torch.randint(high, shape, generator=generator)

        themes = torch.cat([randn(4, h, d), torch.zeros(1, h, d)])  # and the value with no direction

        def values(n):
            return (themes[choose(5, b, n)] + self.noise * randn(b, n, h, d)).transpose(1, 2).to(device, dtype)

        gate = torch.rand(b, t, generator=generator, dtype=torch.float64).square()
        position = 100 + torch.cumsum(1 + choose(3, b, t), 1)
        used = torch.rand(b, m, generator=generator) >= self.free
        # few times of last touch, so that there are ties
        return values(t), gate.to(device), position.to(device), values(m), used.to(device), choose(3, b, m).to(device)

    def run(self, device, dtype=torch.float64):
        return tuple(t.cpu() for t in F.route_exact_bank(*self.make(device, dtype), **self.options))


@st.composite
def routes(draw, noise=st.sampled_from([0.2, 0.2, 0.5])):
    slots = draw(st.integers(0, 7))
    options = dict(tau_exact=draw(st.sampled_from([0.0, 0.1, 0.5])), tau_novel=draw(st.sampled_from([0.3, 0.7])),
                   tau_match=draw(st.sampled_from([0.3, 0.9])), refresh_on_hit=draw(st.booleans()),
                   num_sinks=draw(st.integers(0, min(2, slots))))
    return Route(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 12)), slots,
                 draw(st.sampled_from([0.0, 0.3, 1.0])), draw(noise), options, draw(seeds))


@st.composite
def wide_routes(draw):
    """Sizes that GPUs serve by tensor cores. Little noise: cosines at rounding distance from each other."""
    slots = draw(st.sampled_from([1, 7, 64, 128]))
    options = dict(tau_exact=draw(st.sampled_from([0.0, 0.1])), tau_novel=draw(st.sampled_from([-2.0, 0.3, 0.7, 1.5])),
                   tau_match=draw(st.sampled_from([0.3, 0.9])), refresh_on_hit=draw(st.booleans()),
                   num_sinks=draw(st.integers(0, min(2, slots))))
    return Route(draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([64, 128])),
                 draw(st.sampled_from([1, 7, 8, 19, 32])), slots, draw(st.sampled_from([0.0, 0.3, 1.0])),
                 draw(st.sampled_from([0.0, 3e-3, 0.2, 0.5, 4.0])), options, draw(seeds))


def by_the_rule(value, gate, position, bank_value, used, last_touch, *, tau_exact=0.10, tau_novel=0.70, tau_match=0.90,
                refresh_on_hit=False, num_sinks=0):
    batch, candidates = gate.shape
    slots = used.shape[1]
    slot, action, touched = torch.full((batch, candidates), -1), torch.zeros(batch, candidates, dtype=torch.int64), last_touch.clone()

    def direction(x):
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    for b in range(batch):
        held = [direction(bank_value[b, :, j].double()) if used[b, j] else None for j in range(slots)]
        for i in range(candidates):
            if gate[b, i] < tau_exact or num_sinks == slots:
                continue
            mine = direction(value[b, :, i].double())
            # A slot's score; equal contents tie exactly, so the lowest wins.
            score = {j: float((mine * x).sum(-1).mean()) for j, x in enumerate(held) if x is not None}
            # NaN ranks below every number, and is not below a threshold.
            best = max(score, key=lambda j: (-math.inf if math.isnan(score[j]) else score[j], -j), default=None)
            if best is None or score[best] < tau_novel:
                free = [j for j in range(num_sinks, slots) if held[j] is None]
                j = free[0] if free else min(range(num_sinks, slots), key=lambda j: (int(touched[b, j]), j))
                action[b, i] = INSERT
            else:
                j = best
                action[b, i] = REFRESH if refresh_on_hit and score[best] >= tau_match and best >= num_sinks else TOUCH
            if action[b, i] != TOUCH:
                held[j] = mine
            slot[b, i], touched[b, j] = j, position[b, i]
    return slot, action, touched


def assert_same(decisions, expected):
    for name, mine, theirs in zip(("slot", "action", "last_touch"), decisions, expected):
        assert mine.tolist() == theirs.tolist(), name


def assert_by_the_rule(route, device, dtype):
    assert_same(route.run(device, dtype), by_the_rule(*route.make(torch.device("cpu"), dtype), **route.options))


class TestTheRule:
    @examples
    @given(routes())
    def test_random(self, device, route):
        assert_by_the_rule(route, device, torch.float64)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @repeatable
    @given(routes())
    def test_random_in_low_precision(self, device, dtype, route):
        assert_by_the_rule(route, device, dtype)

    @repeatable
    @given(routes(noise=st.just(0.0)))
    def test_repeated_values_tie_and_the_lowest_slot_wins(self, device, route):
        assert_by_the_rule(route, device, torch.float64)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @repeatable
    @given(wide_routes(), st.sampled_from([1.0, 1e-5, 3e3]), st.sampled_from([0, 200]))
    def test_as_on_the_cpu(self, dtype, route, scale, back):
        """To the last bit of the cosines, however close they are. `back`: some slots were touched later than the candidates."""
        value, gate, position, bank, used, touched = route.make(torch.device("cpu"), dtype)
        tensors = value * scale, gate, position, bank * scale, used, touched * back + torch.arange(touched.shape[1]) % 3
        assert_same((t.cpu() for t in F.route_exact_bank(*(t.cuda() for t in tensors), **route.options)),
                    F.route_exact_bank(*tensors, **route.options))

    @pytest.mark.gpu
    def test_as_on_the_cpu_at_any_address(self):
        value, gate, position, bank, used, touched = Route(2, 8, 128, 8, 64).make(torch.device("cpu"), torch.bfloat16)

        def moved(t):
            return torch.cat([t.new_zeros(1), t.flatten()]).cuda()[1:].view(t.shape)

        assert_same((t.cpu() for t in F.route_exact_bank(*map(moved, (value, gate, position, bank, used, touched)))),
                    F.route_exact_bank(value, gate, position, bank, used, touched))

    @pytest.mark.gpu
    def test_calls_in_a_row_see_what_was_written_before(self):
        """A kernel may start while the one before it ends."""
        value, gate, position, bank, used, touched = (t.cuda() for t in Route(2, 8, 128, 8, 64).make(torch.device("cpu"), torch.bfloat16))
        right = [F.route_exact_bank(value * sign, gate, position, bank, used, touched) for sign in (1, -1)]
        buffer, results = value.clone(), []
        for i in range(100):
            buffer.copy_(value).mul_((1, -1)[i % 2])
            results.append(F.route_exact_bank(buffer, gate, position, bank, used, touched))
        for i, result in enumerate(results):
            assert all(torch.equal(a, b) for a, b in zip(result, right[i % 2]))

    def test_many_slots_and_candidates(self, device):
        assert_by_the_rule(Route(2, 3, 64, 100, 70, options=dict(num_sinks=4, refresh_on_hit=True, tau_exact=0.0)), device, torch.float32)

    @pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_gate_threshold_is_inclusive(self, device, gate_dtype):
        value, _, position, bank, used, touched = Route(1, 1, 2, 3, 3).make(device)
        gate = torch.tensor([[0.25, 0.2490234375, 0.5]], device=device).to(gate_dtype)
        _, action, _ = F.route_exact_bank(value, gate, position, bank, used, touched, tau_exact=0.25)
        assert (action != SKIP).tolist() == [[True, False, True]]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("dim", [6, 64])
    @pytest.mark.parametrize("bad", [(0,), (0, 3), (1, 2, 3), (0, 1, 2, 3)])
    def test_what_is_not_a_number_ranks_last(self, device, dtype, dim, bad):
        value, gate, position, bank, used, touched = Route(2, 2, dim, 7, 4, free=0.0).make(torch.device("cpu"), dtype)
        bank[:, 0, list(bad), 1] = math.nan
        value[1, :, 2] = math.nan
        tensors = value, torch.ones_like(gate), position, bank, used, touched
        for options in ({}, {"refresh_on_hit": True}):
            assert_same(F.route_exact_bank(*(t.to(device) for t in tensors), **options), by_the_rule(*tensors, **options))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_slots_touched_at_the_end_of_time(self, device, dtype):
        value, gate, position, bank, used, _ = Route(1, 2, 64, 5, 4, free=0.0).make(torch.device("cpu"), dtype)
        touched = torch.full(used.shape, torch.iinfo(torch.int64).max)
        tensors = value, torch.ones_like(gate), position, bank, used, touched
        options = {"tau_novel": 1.5, "num_sinks": 1}
        assert_same(F.route_exact_bank(*(t.to(device) for t in tensors), **options), by_the_rule(*tensors, **options))

    def test_by_hand(self, device):
        east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        north_east = torch.tensor([1.0, 0.2])  # cosine 0.98 to east
        value = torch.stack([north_east, north, -east, east, -north]).view(1, 1, 5, 2).to(device)
        bank = torch.stack([east, torch.zeros(2), torch.zeros(2)]).view(1, 1, 3, 2).to(device)
        gate = torch.tensor([[0.9, 0.9, 0.05, 0.9, 0.9]], device=device)
        position, touched = torch.arange(10, 15, device=device)[None], torch.tensor([[3, 0, 0]], device=device)
        used = torch.tensor([[True, False, False]], device=device)
        slot, action, last = F.route_exact_bank(value, gate, position, bank, used, touched, refresh_on_hit=True)
        assert slot.tolist() == [[0, 1, -1, 0, 2]]
        assert action.tolist() == [[REFRESH, INSERT, SKIP, REFRESH, INSERT]] and last.tolist() == [[13, 11, 14]]
        # full and pinned: the one slot that may change takes every new value
        slot, action, last = F.route_exact_bank(value[:, :, 1:2], gate[:, :1], position[:, :1], bank[:, :, :1].expand(1, 1, 2, 2),
                                                used[:, :1].expand(1, 2), touched[:, :2], num_sinks=1)
        assert (slot.tolist(), action.tolist(), last.tolist()) == ([[1]], [[INSERT]], [[3, 10]])


class TestRegistration:
    def test_arguments_stay_as_they_were(self, device):
        tensors = Route().make(device)
        before = [t.clone() for t in tensors]
        results = F.route_exact_bank(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before))
        assert not {t.data_ptr() for t in results} & {t.data_ptr() for t in tensors}

    def test_what_no_slot_holds_is_never_read(self, device):
        value, gate, position, bank, used, touched = Route().make(device)
        poisoned = bank.masked_fill(~used[:, None, :, None], torch.nan)
        results = F.route_exact_bank(value, gate, position, poisoned, used, touched)
        assert all(torch.equal(a, b) for a, b in zip(results, F.route_exact_bank(value, gate, position, bank, used, touched)))

    def test_non_contiguous(self, device):
        tensors = Route().make(device)
        strided = [torch.stack([t, t], -1)[..., 0] for t in tensors]
        assert all(torch.equal(a, b) for a, b in zip(F.route_exact_bank(*strided), F.route_exact_bank(*tensors)))

    def test_routing_is_a_constant(self, device):
        value, gate, *rest = Route().make(device)
        assert not any(t.requires_grad for t in F.route_exact_bank(value.requires_grad_(), gate.requires_grad_(), *rest))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_opcheck(self, device, dtype):
        options = dict(refresh_on_hit=True, num_sinks=1)
        torch.library.opcheck(torch.ops.coda.route_exact_bank.default, Route().make(device, dtype), options)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, device, dynamic):
        route = compiled(F.route_exact_bank, dynamic=dynamic)
        for candidates in (3, 9):
            tensors = Route(candidates=candidates).make(device)
            assert all(torch.equal(a, b) for a, b in zip(route(*tensors), F.route_exact_bank(*tensors)))
