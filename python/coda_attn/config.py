"""Configuration of the bounded memory: one frozen dataclass, validated where it is made."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

_CHOICES = {
    "policy": ("retention", "novelty_lru"),
    "gates": ("per_head", "shared"),
    "summary_routing": ("value", "low_freq_key"),
    "theta_pairs": ("half", "interleaved"),
    "rope_pairs": ("half", "interleaved"),
    "head_norm": ("identity", "rms"),
}


@dataclasses.dataclass(frozen=True)
class CodaConfig:
    """What one bounded layer remembers and how it attends. Defaults are the medium preset: 384 slots, retention.

    Args:
        window: ring capacity W, tokens.
        chunk: C, tokens that leave the ring together; divides ``window``.
        exact_slots: Me, verbatim slots, sinks included.
        summary_slots: Ms, EMA prototypes; needs ``gates="shared"``.
        policy: ``"retention"`` (running top-k of gate logit plus age term) or ``"novelty_lru"`` (the paper's).
        gates: ``"per_head"`` (one gate and choice of tokens per KV head) or ``"shared"``.
        num_sinks: first tokens kept for ever, within ``exact_slots``.
        age_decay: rho, added to a token's gate logit per position (retention only).
        bank_distance: tokens between a chunk's start and the position at which its queries see every bank slot;
            ``None`` leaves keys at their true positions.
        differential: two streams (theta and lambda), or one.
        gate_bias: log gate of an exact slot as its logit bias. ``None``: on for retention, off for novelty_lru.
        mass_bias: log mass of a summary slot as its logit bias.
        exact_candidates: candidates offered to the exact bank per chunk (novelty_lru).
        tau_exact, tau_summary: least gate of a candidate. tau_novel, tau_match, tau_spawn: cosine thresholds.
        refresh_on_hit: a candidate that matches a slot replaces its content (novelty_lru).
        summary_routing: ``"value"`` or ``"low_freq_key"``.
        theta_pairs, rope_pairs: which dimensions one plane rotation turns: ``"half"`` (i, i + D/2) or
            ``"interleaved"`` (2i, 2i + 1).
        head_norm: ``"identity"`` or ``"rms"`` (RMS norm per head over D, with weight).
        norm_eps: epsilon of that norm.

    Raises:
        ValueError: a field is out of range; the message names the field, the value and what is supported.
    """

    window: int = 256
    chunk: int = 32
    exact_slots: int = 128
    summary_slots: int = 0
    policy: str = "retention"
    gates: str = "per_head"
    num_sinks: int = 4
    age_decay: float = 1e-3
    bank_distance: Optional[int] = 512
    differential: bool = True
    gate_bias: Optional[bool] = None
    mass_bias: bool = False
    exact_candidates: int = 8
    tau_exact: float = 0.10
    tau_summary: float = 0.05
    tau_novel: float = 0.70
    tau_match: float = 0.90
    tau_spawn: float = 0.50
    refresh_on_hit: bool = False
    summary_routing: str = "value"
    theta_pairs: str = "half"
    rope_pairs: str = "half"
    head_norm: str = "identity"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; choose one of {', '.join(map(repr, choices))}")
        for name, least in {"window": 1, "chunk": 1, "exact_slots": 0, "summary_slots": 0, "num_sinks": 0, "exact_candidates": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} is not supported; it must be an integer of at least {least}")
        if self.window % self.chunk:
            raise ValueError(f"chunk={self.chunk} does not divide window={self.window}; choose a chunk that divides the window")
        if self.num_sinks > self.exact_slots:
            raise ValueError(
                f"num_sinks={self.num_sinks} needs as many exact slots, but exact_slots={self.exact_slots}; "
                f"lower num_sinks or raise exact_slots")
        if self.gates == "per_head" and (self.policy == "novelty_lru" or self.summary_slots):
            what = "policy='novelty_lru'" if self.policy == "novelty_lru" else f"summary_slots={self.summary_slots}"
            raise ValueError(f"{what} routes tokens for all KV heads together and needs gates='shared'; got gates='per_head'")
        if self.bank_distance is not None and self.bank_distance < 0:
            raise ValueError(f"bank_distance={self.bank_distance} is not supported; it is a number of tokens >= 0, or None for true positions")
        for name in ("tau_exact", "tau_summary"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is not supported; a gate threshold lies in [0, 1)")
        if not self.age_decay >= 0.0:
            raise ValueError(f"age_decay={self.age_decay} is not supported; it is a rate per token >= 0")
        if self.gate_bias is None:
            object.__setattr__(self, "gate_bias", self.policy == "retention")

    @property
    def slots(self) -> int:
        """S = W + Me + Ms, the most keys that a query ever sees."""
        return self.window + self.exact_slots + self.summary_slots

    def gate_groups(self, num_kv_heads: int) -> int:
        """R, the number of gates per token."""
        return num_kv_heads if self.gates == "per_head" else 1

    def memory_args(self) -> dict[str, Any]:
        """The keyword arguments that the memory ops take."""
        return {name: getattr(self, name) for name in _MEMORY_ARGS}

    def attention_args(self) -> dict[str, Any]:
        """The keyword arguments that the attention ops take."""
        return {"theta_pairs": self.theta_pairs, "norm_eps": self.norm_eps}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CodaConfig":
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown CodaConfig field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> "CodaConfig":
        """``"small"`` (192 slots), ``"medium"`` (384, the default) or ``"large"`` (768): retention, per-head gates."""
        sizes = {"small": (128, 32, 64), "medium": (256, 32, 128), "large": (512, 32, 256)}
        if name not in sizes:
            raise ValueError(f"preset {name!r} is not known; choose one of {', '.join(sizes)}")
        window, chunk, exact = sizes[name]
        return cls(window=window, chunk=chunk, exact_slots=exact, bank_distance=2 * window)

    @classmethod
    def paper(cls, name: str = "medium", **overrides: Any) -> "CodaConfig":
        """The paper's memory, ``"tiny"``, ``"medium"`` or ``"large"``: novelty_lru, shared gate, true positions."""
        sizes = {"tiny": (128, 32, 32, 32), "medium": (256, 64, 64, 64), "large": (512, 64, 128, 128)}
        if name not in sizes:
            raise ValueError(f"paper preset {name!r} is not known; choose one of {', '.join(sizes)}")
        window, chunk, exact, summary = sizes[name]
        fields: dict[str, Any] = dict(window=window, chunk=chunk, exact_slots=exact, summary_slots=summary,
                                      policy="novelty_lru", gates="shared", num_sinks=0, bank_distance=None)
        return cls(**{**fields, **overrides})


_MEMORY_ARGS = (
    "window", "chunk", "policy", "num_sinks", "age_decay", "bank_distance", "gate_bias", "mass_bias", "exact_candidates",
    "tau_exact", "tau_summary", "tau_novel", "tau_match", "tau_spawn", "refresh_on_hit", "summary_routing", "rope_pairs")
