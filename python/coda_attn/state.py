"""The bounded memory of one layer: plain tensors in a fixed order, nothing on the host."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Iterable

import torch
from torch import Tensor

from .config import CodaConfig


@dataclasses.dataclass
class State:
    """Memory of N sequences in one layer.

    Slots [0, W) of ``k``, ``v`` and ``gate`` are the ring (position p in slot p mod W), slots [W, W + Me) the exact bank.
    R is Hkv with per-head gates and 1 with a shared gate. What a configuration does not use has a dimension of size 0.
    """

    k: Tensor  #: (N, Hkv, W + Me, D) model dtype
    v: Tensor  #: (N, Hkv, W + Me, D) model dtype
    gate: Tensor  #: (N, R, W + Me) float32 (float64 for a float64 model), gate logits
    exact_pos: Tensor  #: (N, R, Me) int64, position of the token in an exact slot, -1 where free
    tokens_seen: Tensor  #: (N,) int64
    last_touch: Tensor  #: (N, Me) int64 with novelty_lru, else (N, 0)
    counts: Tensor  #: (N, 2) int64: tokens inserted into the exact bank (over all groups), candidates found known
    summary_k: Tensor  #: (N, Hkv, Ms, D) float32 (float64 for a float64 model)
    summary_v: Tensor  #: (N, Hkv, Ms, D) likewise
    summary_mass: Tensor  #: (N, Ms) likewise, 0 where free

    @classmethod
    def empty(cls, sequences: int, num_kv_heads: int, head_dim: int, config: CodaConfig, *,
              dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> "State":
        """A memory that has seen nothing. Raises ValueError for an empty batch or an odd head_dim."""
        if sequences < 1:
            raise ValueError(f"a state holds at least one sequence; got {sequences}")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is not supported; rotary embeddings need an even head_dim")
        n, hkv, d = sequences, num_kv_heads, head_dim
        w, me, ms, r = config.window, config.exact_slots, config.summary_slots, config.gate_groups(num_kv_heads)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def make(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        state = cls(
            k=make(n, hkv, w + me, d, dtype=dtype), v=make(n, hkv, w + me, d, dtype=dtype),
            gate=make(n, r, w + me, dtype=wide),
            exact_pos=make(n, r, me, dtype=torch.int64),
            tokens_seen=make(n, dtype=torch.int64),
            last_touch=make(n, me if config.policy == "novelty_lru" else 0, dtype=torch.int64),
            counts=make(n, 2, dtype=torch.int64),
            summary_k=make(n, hkv, ms, d, dtype=wide), summary_v=make(n, hkv, ms, d, dtype=wide),
            summary_mass=make(n, ms, dtype=wide))
        torch.ops.coda._clear_state_(state.tensors())  # one launch: all 0, positions -1
        return state

    def tensors(self) -> list[Tensor]:
        """The tensors in the order in which they cross the op boundary."""
        return [getattr(self, name) for name in FIELDS]

    @classmethod
    def from_tensors(cls, tensors: Iterable[Tensor]) -> "State":
        return cls(*tensors)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "State":
        """A state of ``fn(tensor)`` for every tensor."""
        return State(*(fn(t) for t in self.tensors()))

    def clone(self) -> "State":
        return self.map(Tensor.clone)

    def detach(self) -> "State":
        return self.map(Tensor.detach)

    def copy_(self, other: "State") -> "State":
        """Takes the contents of ``other`` into this state's own storage, so that addresses stay fixed."""
        for mine, theirs in zip(self.tensors(), other.tensors()):
            if mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)
        return self

    @property
    def sequences(self) -> int:
        return self.tokens_seen.shape[0]

    def nbytes(self) -> int:
        """Bytes held: the true total over all tensors. It does not grow with what has been read."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def metrics(self, config: CodaConfig) -> dict[str, Any]:
        """What the memory did so far, read off the state and summed over sequences: ``tokens_seen``, ``evictions`` (tokens
        that left the ring), ``inserts`` (into exact slots, over all gate groups), ``hits`` (candidates found known;
        novelty_lru), ``ring_slots_used`` (ring tokens), ``exact_slots_used`` (per gate group, at most), ``summary_slots_used``."""
        seen = self.tokens_seen
        # the ring evicts lazily, when the first token of a chunk arrives
        start = (seen - 1).clamp(min=0).div(config.chunk, rounding_mode="floor") * config.chunk
        evicted = (start - config.window + config.chunk).clamp(min=0)
        used = (self.exact_pos >= 0).sum(-1)
        return {
            "tokens_seen": int(seen.sum()), "evictions": int(evicted.sum()),
            "inserts": int(self.counts[:, 0].sum()), "hits": int(self.counts[:, 1].sum()),
            "ring_slots_used": int((seen - evicted).sum()),
            "exact_slots_used": int(used.amax(-1).sum()) if used.numel() else 0,
            "summary_slots_used": int((self.summary_mass > 0).sum())}


FIELDS = tuple(f.name for f in dataclasses.fields(State))
