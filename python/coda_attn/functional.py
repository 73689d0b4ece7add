"""The torch ops as functions with defaults, docstrings and the package's own types. Layouts: (batch, tokens, heads, dim)."""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from . import _library  # noqa: F401  (loads the ops)
from .config import CodaConfig
from .state import State

_ops = torch.ops.coda


def rope_inv_freq(head_dim: int, base: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """Frequencies of plain RoPE: ``base ** (-2 i / head_dim)``, (head_dim / 2,) float64."""
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)


def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, *, attention_scaling: float = 1.0,
               pairs: str = "half", inverse: bool = False) -> Tensor:
    """Rotates ``x`` by its positions; phases in float64, cosines and sines in float32.

    Args:
        x: (..., heads, D) any float dtype. positions: (...) int64. inv_freq: (D/2,) float64.
        attention_scaling: factor on the result (YaRN-like variants). inverse: turn back, R(-position).
    Returns: a tensor like ``x``. Differentiable in ``x``.
    """
    return _ops.apply_rope(x, positions, inv_freq, attention_scaling, pairs, inverse)


def diff_attention(q: Tensor, k: Tensor, v: Tensor, lam: Optional[Tensor] = None, theta: Optional[Tensor] = None, *,
                   causal: bool = True, scale: Optional[float] = None, theta_pairs: str = "half",
                   norm_weight: Optional[Tensor] = None, norm_eps: float = 1e-6,
                   cu_seqlens_q: Optional[Tensor] = None, cu_seqlens_k: Optional[Tensor] = None) -> Tensor:
    """Norm(softmax(q K^T s) V - lam * softmax(R_theta(q) K^T s) V), never an Lq x Lk matrix in memory.

    Args:
        q: (B, Lq, H, D), rotated. k, v: (B, Lk, Hkv, D). lam: (B, Lq, H). theta: (H, D/2).
            Packed: (T, heads, D) with ``cu_seqlens_q`` and ``cu_seqlens_k`` (N + 1,) int32 or int64.
            Without ``lam`` and ``theta``: one stream, plain attention.
        causal: lower-right causal; the last query of a sequence sees its last key.
        scale: default 1 / sqrt(D). norm_weight: (D,) turns the RMS norm on.
    Returns: a tensor like ``q``. A row with no key to attend to gives 0.
    Raises: RuntimeError naming the argument, what it was and what is supported.
    """
    return _ops.diff_attention(q, k, v, lam, theta, norm_weight, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=scale,
                               theta_pairs=theta_pairs, norm_eps=norm_eps)


class Path(NamedTuple):
    """Which kernels serve a call, and why."""

    path: str  #: "sm90" (wgmma, TMA), "sm80" (mma.sync), "portable" (any dtype and head dimension), or "cpu"
    reason: str


def diff_attention_path(q: Tensor, *, scale: Optional[float] = None) -> Path:
    """The kernels that ``diff_attention`` takes for queries like ``q`` (..., D).

    The environment variable CODA_DIFF_ATTENTION_PATH names a slower one than the best, for tests and measurements.
    """
    return Path(*_ops.diff_attention_path(q, scale=scale))


def bounded_attention_path(q: Tensor, *, scale: Optional[float] = None) -> Path:
    """The same for ``bounded_attention`` and CODA_BOUNDED_ATTENTION_PATH. Its forward has no kernels of its own for sm80 and is
    portable there; its backward has none for sm90 and is that of sm80.
    """
    return Path(*_ops.bounded_attention_path(q, scale=scale))


def bounded_attention(q: Tensor, k: Tensor, v: Tensor, lam: Optional[Tensor], theta: Optional[Tensor], gate: Tensor,
                      state: State, *, inv_freq: Tensor, config: CodaConfig = CodaConfig(),
                      norm_weight: Optional[Tensor] = None, eta_logit: Optional[Tensor] = None,
                      cu_seqlens: Optional[Tensor] = None, scale: Optional[float] = None,
                      segment: int = 32768) -> tuple[Tensor, State]:
    """Reads any number of new tokens from any state: bank scan and attention over its snapshots, differentiable.

    Args:
        q: (B, L, H, D), k, v: (B, L, Hkv, D), rotated at their true positions ``state.tokens_seen + 0, 1, ...``;
            packed (T, heads, D) with ``cu_seqlens`` (N + 1,).
        lam: (B, L, H) and theta: (H, D/2), or both None for one stream. gate: (B, L, R) gate logits.
        state: N sequences; not changed. inv_freq: (D/2,) float64, the frequencies that rotated q and k.
        eta_logit: (Hkv,), needed with summary slots. segment: tokens per pass, bounds the extra memory.
    Returns: (y like q, new state).
    """
    y, new_state = _ops.bounded_forward(q, k, v, lam, theta, norm_weight, gate, cu_seqlens, state.tensors(), eta_logit,
                                        inv_freq, **config.memory_args(), **config.attention_args(), scale=scale,
                                        segment=segment)
    return y, State.from_tensors(new_state)


def decode_step_(q: Tensor, k: Tensor, v: Tensor, lam: Optional[Tensor], theta: Optional[Tensor], gate: Tensor,
                 state: State, *, inv_freq: Tensor, config: CodaConfig = CodaConfig(),
                 norm_weight: Optional[Tensor] = None, eta_logit: Optional[Tensor] = None,
                 scale: Optional[float] = None) -> Tensor:
    """One token per sequence; ``state`` changes in place, at fixed addresses. Not differentiable.

    Args:
        q: (N, H, D), k, v: (N, Hkv, D), rotated at ``state.tokens_seen``. lam: (N, H). gate: (N, R) logits.
    Returns: (N, H, D).
    """
    return _ops.decode_step_(q, k, v, lam, theta, norm_weight, gate, state.tensors(), eta_logit, inv_freq,
                             **config.memory_args(), **config.attention_args(), scale=scale)


def route_exact_bank(value: Tensor, gate: Tensor, position: Tensor, bank_value: Tensor, used: Tensor, last_touch: Tensor, *,
                     tau_exact: float = 0.10, tau_novel: float = 0.70, tau_match: float = 0.90,
                     refresh_on_hit: bool = False, num_sinks: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The novelty_lru rule for one batch of candidates; each sees the inserts of those before it.

    Args:
        value: (B, Hkv, T, D), gate: (B, T) in [0, 1], position: (B, T) int64 ascending; bank_value: (B, Hkv, Me, D),
        used: (B, Me) bool, last_touch: (B, Me) int64. Slots below ``num_sinks`` are pinned.
    Returns: slot (B, T) int64 (-1: skipped), action (B, T) int64 (0 skip, 1 insert, 2 touch, 3 refresh), last_touch (B, Me).
    """
    return _ops.route_exact_bank(value, gate, position, bank_value, used, last_touch, tau_exact=tau_exact,
                                 tau_novel=tau_novel, tau_match=tau_match, refresh_on_hit=refresh_on_hit, num_sinks=num_sinks)
