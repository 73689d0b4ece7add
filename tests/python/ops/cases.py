"""Random small problems for the ops of the bounded memory, what a memory holds, and the paths of an op on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional

import pytest
import torch
from hypothesis import settings, strategies as st
from torch import Tensor
from torch.testing import assert_close

from coda_attn import CodaConfig, State, functional as F, reference

examples = settings(max_examples=20, deadline=None)
few_examples = settings(max_examples=10, deadline=None)
# In low precision a similarity at rounding distance from its threshold has no right side: always the same examples, then.
repeatable = settings(max_examples=20, deadline=None, derandomize=True)

TOKENS = ("q", "k", "v", "lam", "gate")
WEIGHTS = ("theta", "norm_weight", "eta_logit")
CONTENTS = ("k", "v", "gate", "summary_k", "summary_v", "summary_mass")


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    dim: int


SHAPES = [Shape(4, 2, 6), Shape(2, 2, 4), Shape(3, 1, 2), Shape(6, 3, 8)]
seeds = st.integers(0, 2 ** 32 - 1)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def cumulative(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@st.composite
def configs(draw, policy=st.sampled_from(["retention", "novelty_lru"])) -> CodaConfig:
    chunk, exact = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(0, 6))
    fields: dict[str, Any] = dict(
        chunk=chunk, window=chunk * draw(st.integers(1, 4)), exact_slots=exact, num_sinks=draw(st.integers(0, min(exact, 3))),
        policy=draw(policy), bank_distance=draw(st.sampled_from([None, 0, 7, 64])), differential=draw(st.booleans()),
        head_norm=draw(st.sampled_from(["identity", "rms"])), norm_eps=draw(st.sampled_from([1e-6, 0.1])),
        theta_pairs=draw(st.sampled_from(["half", "interleaved"])), rope_pairs=draw(st.sampled_from(["half", "interleaved"])),
        gate_bias=draw(st.sampled_from([None, True, False])), mass_bias=draw(st.booleans()))
    if fields["policy"] == "retention":
        fields |= dict(gates=draw(st.sampled_from(["per_head", "shared"])), age_decay=draw(st.sampled_from([0.0, 1e-3, 0.2])))
    else:
        fields |= dict(gates="shared", exact_candidates=draw(st.integers(0, 4)), refresh_on_hit=draw(st.booleans()),
                       tau_exact=draw(st.sampled_from([0.0, 0.1, 0.5])), tau_novel=draw(st.sampled_from([0.3, 0.7])),
                       tau_match=draw(st.sampled_from([0.3, 0.9])))
    if fields["gates"] == "shared":
        fields |= dict(summary_slots=draw(st.integers(0, 3)), summary_routing=draw(st.sampled_from(["value", "low_freq_key"])),
                       tau_summary=draw(st.sampled_from([0.0, 0.05, 0.5])), tau_spawn=draw(st.sampled_from([0.5, 0.9])))
    return CodaConfig(**fields)


# Both policies with everything in use that they have.
RETENTION = CodaConfig(window=8, chunk=4, exact_slots=5, summary_slots=2, gates="shared", num_sinks=2, bank_distance=16,
                       mass_bias=True, head_norm="rms", summary_routing="low_freq_key")
PER_HEAD = dataclasses.replace(RETENTION, summary_slots=0, gates="per_head", theta_pairs="interleaved")
PAPER = CodaConfig(window=8, chunk=4, exact_slots=4, summary_slots=2, policy="novelty_lru", gates="shared", num_sinks=1,
                   bank_distance=None, gate_bias=True, mass_bias=True, refresh_on_hit=True, tau_match=0.8, rope_pairs="interleaved")
CONFIGS = {"retention": RETENTION, "per_head": PER_HEAD, "novelty_lru": PAPER}

# The corners of the configuration space that random ones rarely meet together.
CORNERS = {
    "chunks of one": CodaConfig(window=4, chunk=1, exact_slots=3, num_sinks=1, bank_distance=8),
    "one chunk in the ring": CodaConfig(window=4, chunk=4, exact_slots=3, num_sinks=0, bank_distance=None),
    "no exact slots": CodaConfig(window=4, chunk=2, exact_slots=0, summary_slots=2, num_sinks=0, gates="shared"),
    "no slots": CodaConfig(window=4, chunk=2, exact_slots=0, num_sinks=0),
    "nothing but sinks": CodaConfig(window=4, chunk=2, exact_slots=3, num_sinks=3),
    "nothing but sinks, novelty": CodaConfig(window=4, chunk=2, exact_slots=3, num_sinks=3, gates="shared", policy="novelty_lru"),
    "sinks over several chunks": CodaConfig(window=4, chunk=2, exact_slots=6, num_sinks=5, bank_distance=0),
}


@dataclasses.dataclass
class Problem:
    """A packed batch of new tokens and everything that the memory ops take beside them."""

    config: CodaConfig
    q: Tensor  #: (T, H, D)
    k: Tensor  #: (T, Hkv, D)
    v: Tensor  #: (T, Hkv, D)
    lam: Optional[Tensor]  #: (T, H)
    gate: Tensor  #: (T, R)
    theta: Optional[Tensor]  #: (H, D/2)
    norm_weight: Optional[Tensor]  #: (D,)
    eta_logit: Optional[Tensor]  #: (Hkv,)
    inv_freq: Tensor  #: (D/2,)
    cu_seqlens: Tensor  #: (N + 1,)
    state: State

    def map(self, fn: Callable[[Tensor], Tensor]) -> Problem:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: fn(value) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed, state=self.state.map(fn))

    def to(self, target: torch.device | torch.dtype) -> Problem:
        """On another device, or in another floating dtype with gates and summaries as wide as that asks."""
        if isinstance(target, torch.device):
            return self.map(lambda t: t.to(target))
        changed = {name: getattr(self, name).to(target) for name in ("q", "k", "v", "lam", *WEIGHTS)
                   if getattr(self, name) is not None}
        held = {name: getattr(self.state, name).to(target if name in ("k", "v") else wide(target)) for name in CONTENTS}
        return dataclasses.replace(self, **changed, gate=self.gate.to(wide(target)),
                                   state=dataclasses.replace(self.state, **held))

    def take(self, tokens: Tensor, lengths: Iterable[int], state: State) -> Problem:
        """The same layer over some of the tokens, in sequences of the given lengths."""
        picked = {name: getattr(self, name)[tokens] for name in TOKENS if getattr(self, name) is not None}
        return dataclasses.replace(self, **picked, cu_seqlens=cumulative(lengths).to(tokens.device), state=state)

    def sequence(self, n: int) -> Problem:
        a, b = self.cu_seqlens[n:n + 2].tolist()
        return self.take(torch.arange(a, b, device=self.q.device), [b - a], self.state.map(lambda t: t[n:n + 1]))

    def call(self, fn: Callable = F.bounded_attention, **options: Any) -> tuple[Tensor, State]:
        """(y, new state) of ``functional.bounded_attention`` or of its reference."""
        options = dict(cu_seqlens=self.cu_seqlens) | options
        return fn(self.q, self.k, self.v, self.lam, self.theta, self.gate, self.state, inv_freq=self.inv_freq,
                  config=self.config, norm_weight=self.norm_weight, eta_logit=self.eta_logit, **options)

    def step_args(self) -> tuple:
        return (self.q, self.k, self.v, self.lam, self.theta, self.norm_weight, self.gate, self.state.tensors(), self.eta_logit,
                self.inv_freq)

    def step_(self, fn: Callable = F.decode_step_) -> Tensor:
        """One token per sequence; the state changes in place."""
        return fn(self.q, self.k, self.v, self.lam, self.theta, self.gate, self.state, inv_freq=self.inv_freq, config=self.config,
                  norm_weight=self.norm_weight, eta_logit=self.eta_logit)

    def scan_args(self) -> tuple:
        return self.k, self.v, self.gate, self.cu_seqlens, self.state.tensors(), self.eta_logit, self.inv_freq

    def scan(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], State]:
        *snapshots, new_state = torch.ops.coda.bank_scan(*self.scan_args(), **self.config.memory_args())
        return tuple(snapshots), State.from_tensors(new_state)

    def reference_scan(self) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], State]:
        *snapshots, state = reference.bank_scan(self.k, self.v, self.gate, self.cu_seqlens, self.state, self.eta_logit,
                                                self.inv_freq, self.config)
        return tuple(snapshots), state

    def attention_args(self, snapshots: tuple[Tensor, ...]) -> tuple:
        return (self.q, self.k, self.v, self.lam, self.theta, self.norm_weight, self.gate, self.cu_seqlens,
                self.state.tensors(), *snapshots, self.inv_freq)

    def attention_options(self) -> dict[str, Any]:
        return self.config.memory_args() | self.config.attention_args()

    def attend(self, snapshots: tuple[Tensor, ...]) -> Tensor:
        return torch.ops.coda.bounded_attention(*self.attention_args(snapshots), **self.attention_options())

    def reference_attend(self, snapshots: tuple[Tensor, ...]) -> Tensor:
        return reference.bounded_attention_chunks(self.q, self.k, self.v, self.lam, self.theta, self.gate, self.cu_seqlens,
                                                  self.state, snapshots, self.inv_freq, self.config,
                                                  norm_weight=self.norm_weight)

    def leaves(self) -> dict[str, Tensor]:
        """Everything that has a gradient, by name."""
        own = {name: getattr(self, name) for name in (*TOKENS, *WEIGHTS) if getattr(self, name) is not None}
        return own | {f"state.{name}": getattr(self.state, name) for name in CONTENTS}

    def with_leaves(self, leaves: dict[str, Tensor]) -> Problem:
        own = {name: t for name, t in leaves.items() if not name.startswith("state.")}
        held = {name.removeprefix("state."): t for name, t in leaves.items() if name.startswith("state.")}
        return dataclasses.replace(self, **own, state=dataclasses.replace(self.state, **held))


class Case(NamedTuple):
    """A problem in a form that reads well where a test fails: per sequence, tokens seen before and new ones."""

    config: CodaConfig
    shape: Shape = SHAPES[0]
    seen: tuple[int, ...] = (11, 0)
    fresh: tuple[int, ...] = (13, 22)
    seed: int = 0
    coarse_gates: bool = False  #: gates with many ties

    def make(self, dtype: torch.dtype = torch.float64) -> Problem:
        (h, hkv, d), c, generator = self.shape, self.config, torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        inv_freq = F.rope_inv_freq(d, base=100.0)
        lengths = [a + b for a, b in zip(self.seen, self.fresh)]
        total, positions = sum(lengths), torch.cat([torch.arange(n) for n in lengths])
        q, k = (reference.apply_rope(randn(total, n, d), positions, inv_freq, pairs=c.rope_pairs) for n in (h, hkv))
        # A few themes with variations, so that routing meets both known and new values.
        themes = randn(5, hkv, d)
        v = themes[torch.randint(5, (total,), generator=generator)] + 0.2 * randn(total, hkv, d)
        gate = 1.5 * randn(total, c.gate_groups(hkv))
        if self.coarse_gates:
            gate = gate.mul(2).round().div(2).clamp(-1, 1)
        problem = Problem(
            c, q, k, v, lam=torch.rand(total, h, generator=generator, dtype=torch.float64) if c.differential else None,
            # representable in every dtype, so that no computation starts from other gates than its baseline
            gate=gate.bfloat16().double(), theta=randn(h, d // 2) if c.differential else None,
            norm_weight=1 + 0.3 * randn(d) if c.head_norm == "rms" else None,
            eta_logit=randn(hkv) if c.summary_slots else None, inv_freq=inv_freq, cu_seqlens=cumulative(lengths),
            state=State.empty(len(lengths), hkv, d, c, dtype=torch.float64)).to(dtype)
        starts = problem.cu_seqlens[:-1].tolist()
        before = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, self.seen)])
        after = torch.cat([torch.arange(s + n, s + m) for s, n, m in zip(starts, self.seen, lengths)])
        _, state = problem.take(before, self.seen, problem.state).reference_scan()
        return problem.take(after, self.fresh, state)


@st.composite
def cases(draw, config=configs(), longest: int = 24, sequences: int = 3) -> Case:
    n, length = draw(st.integers(1, sequences)), st.one_of(st.just(0), st.integers(1, longest))
    seen, fresh = (tuple(draw(st.lists(length, min_size=n, max_size=n))) for _ in range(2))
    return Case(draw(config), draw(st.sampled_from(SHAPES)), seen, fresh, draw(seeds), draw(st.booleans()))


@st.composite
def far_cases(draw) -> Case:
    """Sequences whose sinks have left the ring, of layers in which positions matter by their differences alone."""
    case = draw(cases(sequences=2))
    # 0.2 per token meets the grid of the gates, and a tie is broken by rounding that depends on the position
    config = dataclasses.replace(case.config, theta_pairs=case.config.rope_pairs, age_decay=min(case.config.age_decay, 1e-3))
    past_sinks = config.window + config.chunk + 3
    return case._replace(config=config, seen=tuple(n + past_sinks for n in case.seen), coarse_gates=False)


def moved(p: Problem, by: int) -> Problem:
    """The problem of a sequence that is ``by`` tokens further, a multiple of the window."""
    c, state = p.config, p.state

    def turn(x: Tensor) -> Tensor:
        return reference.apply_rope(x, torch.full(x.shape[:-2], by), p.inv_freq, pairs=c.rope_pairs)

    held = c.window if c.bank_distance is not None else state.k.shape[2]
    k = torch.cat([turn(state.k[:, :, :held]), state.k[:, :, held:]], 2)
    summary_k = turn(state.summary_k) if c.bank_distance is None else state.summary_k
    state = dataclasses.replace(
        state, k=k, summary_k=summary_k, tokens_seen=state.tokens_seen + by, last_touch=state.last_touch + by,
        exact_pos=torch.where(state.exact_pos >= 0, state.exact_pos + by, state.exact_pos))
    return dataclasses.replace(p, q=turn(p.q), k=turn(p.k), state=state)


def contents(state: State, config: CodaConfig) -> list[dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]]]:
    """What ring and exact bank hold, whatever the order of slots: per sequence and gate group {place: (k, v, gate)} in
    order of position."""
    held = []
    for n, seen in enumerate(state.tokens_seen.tolist()):
        start = max(seen - 1, 0) // config.chunk * config.chunk
        for r, positions in enumerate(state.exact_pos[n].tolist()):
            heads = [r] if config.gates == "per_head" else slice(None)
            slots = {("bank", p): config.window + j for p, j in sorted((p, j) for j, p in enumerate(positions)) if p >= 0}
            slots |= {("ring", p): p % config.window for p in range(max(0, start - config.window + config.chunk), seen)}
            held.append({place: (state.k[n, heads, s], state.v[n, heads, s], state.gate[n, r, s]) for place, s in slots.items()})
    return held


def vacant(state: State, config: CodaConfig) -> State:
    """Which elements of a state belong to no token and no prototype, as booleans."""
    nothing = state.map(lambda t: torch.zeros_like(t, dtype=torch.bool))
    for n, seen in enumerate(state.tokens_seen.tolist()):
        start = max(seen - 1, 0) // config.chunk * config.chunk
        ring = [p % config.window for p in range(max(0, start - config.window + config.chunk), seen)]
        unused = torch.ones(config.window, dtype=torch.bool)
        unused[ring] = False
        free = state.exact_pos[n] < 0
        nothing.gate[n] = torch.cat([unused.expand(free.shape[0], -1), free], -1)
        nothing.k[n] = nothing.v[n] = nothing.gate[n].expand(state.k.shape[1], -1)[..., None]
        nothing.summary_k[n] = nothing.summary_v[n] = (state.summary_mass[n] == 0)[:, None]
    return nothing


def assert_same_memory(mine: State, theirs: State, config: CodaConfig, same_device: bool = False) -> None:
    """The same decisions and contents. Values and gates are copies, so they agree bit for bit; so do keys where both come from
    ops on one device, which share one formula."""
    for a, b in zip(contents(mine, config), contents(theirs, config), strict=True):
        assert a.keys() == b.keys()
        for place, (k, v, gate) in a.items():
            assert torch.equal(k, b[place][0]) if same_device else assert_close(k, b[place][0]) is None
            assert torch.equal(v, b[place][1]) and torch.equal(gate, b[place][2])
    ordered = slice(None) if config.policy == "novelty_lru" else slice(config.num_sinks)
    assert torch.equal(mine.exact_pos[..., ordered], theirs.exact_pos[..., ordered])
    for name in ("tokens_seen", "counts", "last_touch"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert_close(prototypes(mine.summary_k, mine.summary_v, mine.summary_mass),
                 prototypes(theirs.summary_k, theirs.summary_v, theirs.summary_mass))


def prototypes(k: Tensor, v: Tensor, mass: Tensor) -> list[Tensor]:
    """The summary slots in use: k, v (rows, Hkv, Ms, D), mass (rows, Ms). The content of a free slot means nothing."""
    used = mass > 0
    return [k.transpose(1, 2)[used], v.transpose(1, 2)[used], mass[used], used]


def flat(state: State, config: CodaConfig) -> list[Tensor]:
    """The live floating-point contents of a state in an order that does not depend on that of its slots."""
    held = [t.flatten() for group in contents(state, config) for token in group.values() for t in token]
    return [*held, *prototypes(state.summary_k, state.summary_v, state.summary_mass)]


def gradients(problem: Problem, outputs: Callable[[Problem], list[Tensor]]) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of the outputs, for every leaf."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in problem.leaves().items()}
    generator = torch.Generator().manual_seed(7)
    made = [t for t in outputs(problem.with_leaves(leaves)) if t.is_floating_point()]
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in made]
    total = sum((t * w).sum() for t, w in zip(made, weights))
    if not (isinstance(total, Tensor) and total.requires_grad):
        return {name: torch.zeros_like(t) for name, t in leaves.items()}
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)))


def compiled(fn: Callable, **options: Any) -> Callable:
    torch.compiler.reset()  # else the recompilations of all tests count together
    return torch.compile(fn, fullgraph=True, **options)


def cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cpu() for name, t in tensors.items()}


def error(ours: Tensor, exact: Tensor) -> float:
    """The largest error, or in float32, where the largest of thousands of single roundings is luck, their root mean square."""
    difference = ours.detach().cpu().double() - exact.detach().cpu().double()
    return float(difference.square().mean().sqrt() if ours.dtype == torch.float32 else difference.abs().max())


# --- on a GPU -----------------------------------------------------------------------------------------------------------

PATHS = ("portable", "sm80", "sm90")  # of an attention op, the fastest last
LOW = [torch.bfloat16, torch.float16]


def take_path(path: str, best: F.Path, variable: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has a path serve the calls of one test; skips where this GPU does not have it."""
    if PATHS.index(path) > PATHS.index(best.path):
        pytest.skip(f"this GPU's fastest path is {best.path}")
    monkeypatch.setenv(variable, path)
    return path


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Whatever is allocated begins as NaN. With warnings alone: nothing else of deterministic mode is wanted."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
