"""The layer as a torch.nn.Module."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn

from . import _library  # noqa: F401  (loads the ops)
from . import _C
from .config import CodaConfig
from .state import FIELDS, State

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "lambda_proj", "write_proj")


class CodaGqaL(nn.Module):
    """Differential grouped-query attention, over everything or over a bounded memory: the C++ layer ``coda::CodaGqaL``.

    The parameters are Python's own and are handed to C++ at each call, since a wrapped C++ module would lose their identity
    under ``.to`` and ``copy.deepcopy``. Their names are those of the paper's checkpoints: ``q_proj``, ``k_proj``, ``v_proj``,
    ``o_proj``, ``lambda_proj`` and ``theta`` (with ``differential``), ``write_proj``, ``summary_eta_logit`` and
    ``head_norm`` (with ``head_norm="rms"``).

    Args:
        embed_dim: E. num_heads: H query heads. num_kv_heads: Hkv, divides ``num_heads``.
        rope_base: base of the rotary frequencies.
        head_dim: D, even; default ``embed_dim / num_heads``. bias: biases of q, k, v and o projections.
        device, dtype: of the parameters.
        All others: the fields of ``CodaConfig``, where they are described.

    Raises:
        ValueError: an argument is out of range; the message names it, its value and what is supported.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_kv_heads: int, window: int = 256, chunk: int = 32,
                 exact_slots: int = 128, summary_slots: int = 0, policy: str = "retention", gates: str = "per_head",
                 num_sinks: int = 4, age_decay: float = 1e-3, bank_distance: Optional[int] = 512, rope_base: float = 10000.0,
                 theta_pairs: str = "half", head_norm: str = "identity", differential: bool = True, *,
                 gate_bias: Optional[bool] = None, mass_bias: bool = False, exact_candidates: int = 8, tau_exact: float = 0.10,
                 tau_summary: float = 0.05, tau_novel: float = 0.70, tau_match: float = 0.90, tau_spawn: float = 0.50,
                 refresh_on_hit: bool = False, summary_routing: str = "value", rope_pairs: str = "half",
                 norm_eps: float = 1e-6, head_dim: Optional[int] = None, bias: bool = False,
                 device: torch.device | str | None = None, dtype: Optional[torch.dtype] = None):
        super().__init__()
        self.config = CodaConfig(
            window=window, chunk=chunk, exact_slots=exact_slots, summary_slots=summary_slots, policy=policy, gates=gates,
            num_sinks=num_sinks, age_decay=age_decay, bank_distance=bank_distance, differential=differential,
            gate_bias=gate_bias, mass_bias=mass_bias, exact_candidates=exact_candidates, tau_exact=tau_exact,
            tau_summary=tau_summary, tau_novel=tau_novel, tau_match=tau_match, tau_spawn=tau_spawn,
            refresh_on_hit=refresh_on_hit, summary_routing=summary_routing, theta_pairs=theta_pairs, rope_pairs=rope_pairs,
            head_norm=head_norm, norm_eps=norm_eps)
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim={head_dim} is not supported; rotary embeddings need an even head_dim")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.rope_base, self.head_dim = rope_base, head_dim or 0
        self._options = self._make_options()
        self.head_dim = self._options.head_dim

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_width, bias=bias, **factory)
        self.o_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        self.lambda_proj = nn.Linear(embed_dim, num_heads, **factory) if differential else None
        self.theta = nn.Parameter(torch.empty(num_heads, self.head_dim // 2, **factory)) if differential else None
        self.write_proj = nn.Linear(embed_dim, self._options.gate_groups, **factory)
        # Present without summary slots too, as in the checkpoints.
        self.summary_eta_logit = nn.Parameter(torch.empty(num_kv_heads, **factory))
        self.head_norm = nn.RMSNorm(self.head_dim, eps=norm_eps, **factory) if head_norm == "rms" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A fresh layer: theta pi/2, lambda near 0, a write gate that is the same for every token."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            projection.reset_parameters()
        if self.lambda_proj is not None:
            self.lambda_proj.reset_parameters()
            nn.init.constant_(self.lambda_proj.bias, -6.0)
            nn.init.constant_(self.theta, math.pi / 2)
        nn.init.zeros_(self.write_proj.weight)
        nn.init.constant_(self.write_proj.bias, 0.0 if self.config.policy == "retention" else -2.0)
        nn.init.constant_(self.summary_eta_logit, -3.0)
        if self.head_norm is not None:
            self.head_norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Causal attention over all of ``x`` (B, L, E), unbounded. Returns (B, L, E).

        Raises: ValueError for an x of another width, dtype or device than the parameters, or without sequences.
        """
        return _C.forward(self._options, self._weights(), x)

    def forward_bounded(self, x: Tensor, state: State) -> Tensor:
        """The next L tokens of B sequences, attending to their bounded memory; ``state`` advances by L tokens.

        Any split of a sequence into calls gives the same outputs to rounding. Where autograd records, the tensors of
        ``state`` are replaced, and gradients flow through them into earlier calls (``state.detach()`` ends that);
        otherwise they are overwritten in place.

        Args:
            x: (B, L, E), L >= 0.
            state: from ``make_state`` of this layer, or of one with the same configuration.
        Returns: (B, L, E).
        Raises: ValueError as ``forward``, and for a state of another configuration, batch size, dtype or device.
        """
        if not isinstance(state, State):
            raise TypeError(f"state is a {type(state).__name__}; give a coda_attn.state.State, as make_state(batch_size) returns it")
        y, tensors = _C.forward_bounded(self._options, self._weights(), x, state.tensors())
        for name, tensor in zip(FIELDS, tensors):
            setattr(state, name, tensor)
        return y

    def make_state(self, batch_size: int, *, device: torch.device | str | None = None,
                   dtype: Optional[torch.dtype] = None) -> State:
        """An empty memory for ``batch_size`` sequences, by default of the parameters' device and dtype."""
        weight = self.k_proj.weight
        return State.empty(batch_size, self.num_kv_heads, self.head_dim, self.config, dtype=dtype or weight.dtype,
                           device=weight.device if device is None else device)

    def state_bytes(self, batch_size: int = 1) -> int:
        """Bytes that a state of ``batch_size`` sequences holds, whatever they have read."""
        return self.make_state(batch_size, device="meta").nbytes()

    def metrics(self, state: State) -> dict[str, Any]:
        """Evictions, inserts, hits and slots used, read off ``state``; see ``State.metrics``."""
        return state.metrics(self.config)

    def extra_repr(self) -> str:
        c = self.config
        return (f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, window={c.window}, "
                f"chunk={c.chunk}, exact_slots={c.exact_slots}, summary_slots={c.summary_slots}, policy={c.policy!r}, "
                f"gates={c.gates!r}, bank_distance={c.bank_distance}")

    def _make_options(self) -> _C.CodaGqaLOptions:
        return _C.CodaGqaLOptions(self.embed_dim, self.num_heads, self.num_kv_heads, head_dim=self.head_dim,
                                  rope_base=self.rope_base, **self.config.to_dict())

    def _weights(self) -> _C.CodaGqaLWeights:
        projections = []
        for name in _PROJECTIONS:
            module = getattr(self, name)
            if module is not None and not isinstance(module, nn.Linear):
                raise TypeError(f"{name} was replaced by a {type(module).__name__}, but CodaGqaL computes its projections itself; "
                                "merge the adapter into an nn.Linear, or wrap layers made by coda_attn.convert, which call theirs")
            projections.append(None if module is None else (module.weight, module.bias))
        norm = None if self.head_norm is None else self.head_norm.weight
        return _C.CodaGqaLWeights(*projections, self.theta, self.summary_eta_logit, norm)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_options"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._options = self._make_options()
