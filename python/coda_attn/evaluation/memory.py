"""Bytes that a sequence costs: a cache of all keys and values against the bounded memory."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional, Sequence

import torch

from ..config import CodaConfig
from ..state import State


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What decides the size of a cache."""

    layers: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} is not supported; it must be at least 1")

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """The shape of a transformers config."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim)


SHAPES = {
    "smollm2-135m": ModelShape(30, 3, 64),
    "mistral-7b": ModelShape(32, 8, 128),
    "llama-3.1-8b": ModelShape(32, 8, 128),
    "llama-3.1-70b": ModelShape(80, 8, 128),
    "qwen2.5-7b": ModelShape(28, 4, 128),
    "qwen3-8b": ModelShape(36, 8, 128),
}


def full_bytes(shape: ModelShape, tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the keys and values of ``tokens`` tokens, one sequence, all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize * tokens


def state_bytes(shape: ModelShape, config: CodaConfig = CodaConfig(), dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the bounded memory of one sequence, all layers: every tensor of the state counts, whatever was read."""
    return shape.layers * State.empty(1, shape.kv_heads, shape.head_dim, config, dtype=dtype, device="meta").nbytes()


def memory_rows(shape: ModelShape, lengths: Sequence[int], config: Optional[CodaConfig] = None,
                dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """``{"policy", "length", "slots", "state_bytes"}`` for "full" and "bounded" after each number of tokens read.

    Raises: ValueError for a length below 1.
    """
    config = config or CodaConfig()
    if min(lengths, default=0) < 1:
        raise ValueError(f"lengths {list(lengths)} are not supported; give at least one, each at least 1 token")
    bounded = state_bytes(shape, config, dtype)
    rows = [{"policy": "full", "length": n, "slots": n, "state_bytes": full_bytes(shape, n, dtype)} for n in lengths]
    return rows + [{"policy": "bounded", "length": n, "slots": config.slots, "state_bytes": bounded} for n in lengths]
