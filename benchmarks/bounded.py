"""Attention over a bounded memory on a GPU."""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor

from coda_attn import CodaConfig, CodaGqaL, State, functional as F, reference

from .attention import (attention_flops, baseline, check_against, cudnn_attention, differentiable, outputs_and_gradients,
                        plain_attention)
from .checks import Run

_WIDTH, _HEADS, _KV_HEADS, _DIM = 4096, 32, 8, 128  # a layer of Mistral-7B
_LENGTHS = (2048, 4096, 8192, 32768, 131072)
_PRESETS = {"default": CodaConfig(), "paper": CodaConfig.paper()}
_TOO_LONG_MS = 5000.0  # for one run of a baseline whose time grows with the square of the length


def measure(run: Run, lengths: Sequence[int] = _LENGTHS) -> list[dict[str, Any]]:
    """Bounded attention at Mistral-7B's layer shape, forward and training step, beside plain cuDNN and the unbounded op.

    "bounded_attention" is bank scan and attention, "bounded_layer" the layer with its projections; one sequence, read from an
    empty memory.
    """
    lengths = [length for length in lengths if length <= 4096] if run.quick else lengths
    for preset, config in _PRESETS.items():
        _check(run, preset, config)
    rows = []
    for preset, config in _PRESETS.items():
        for op in (_Attention(run.device, config), _Layer(run.device, config)):
            for pass_ in ("forward", "train"):
                seen: dict[str, tuple[int, float]] = {}
                for length in lengths:
                    run.say(f"{op.name} {preset} {pass_} L {length}")
                    rows.append(_row(run, op, preset, config, pass_, length, seen))
    return rows


class _Attention:
    """Scan and attention on given queries, keys and values."""

    name = "bounded_attention"

    def __init__(self, device: torch.device, config: CodaConfig, heads: int = _HEADS, kv_heads: int = _KV_HEADS,
                 dtype: torch.dtype = torch.bfloat16):
        self.device, self.config, self.heads, self.kv_heads, self.dtype = device, config, heads, kv_heads, dtype
        self.inv_freq = F.rope_inv_freq(_DIM, device=device)

    def inputs(self, length: int) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        randn = functools.partial(torch.randn, generator=generator, device=self.device)
        groups = self.config.gate_groups(self.kv_heads)
        narrow = [randn(1, length, self.heads, _DIM), randn(1, length, self.kv_heads, _DIM), randn(1, length, self.kv_heads, _DIM),
                  randn(1, length, self.heads).sigmoid(), randn(self.heads, _DIM // 2)]
        return [*(t.to(self.dtype) for t in narrow), randn(1, length, groups), randn(self.kv_heads)]

    def ours(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, theta: Tensor, gate: Tensor, eta_logit: Tensor) -> Tensor:
        state = State.empty(1, self.kv_heads, _DIM, self.config, dtype=q.dtype, device=q.device)
        y, _ = F.bounded_attention(q, k, v, lam, theta, gate, state, inv_freq=self.inv_freq, config=self.config,
                                   eta_logit=eta_logit if self.config.summary_slots else None)
        return y

    def unbounded(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, theta: Tensor, *_: Tensor) -> Tensor:
        return F.diff_attention(q, k, v, lam, theta)

    def plain_cudnn(self, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return cudnn_attention(q, k, v)


class _Layer:
    """The same with projections and rotary embedding, on hidden states."""

    name = "bounded_layer"

    def __init__(self, device: torch.device, config: CodaConfig):
        self.device = device
        self.layer = CodaGqaL(_WIDTH, _HEADS, _KV_HEADS, device=device, dtype=torch.bfloat16, **config.to_dict())
        self.inv_freq = F.rope_inv_freq(_DIM, device=device)

    def inputs(self, length: int) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        return [torch.randn(1, length, _WIDTH, generator=generator, device=self.device, dtype=torch.bfloat16)]

    def ours(self, x: Tensor) -> Tensor:
        return self.layer.forward_bounded(x, self.layer.make_state(1))

    def unbounded(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def plain_cudnn(self, x: Tensor) -> Tensor:
        layer, positions = self.layer, torch.arange(x.shape[1], device=x.device)[None]
        q, k, v = (p(x).unflatten(-1, (-1, _DIM)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = (F.apply_rope(t, positions, self.inv_freq) for t in (q, k))
        return layer.o_proj(cudnn_attention(q, k, v).flatten(-2))


def _check(run: Run, preset: str, config: CodaConfig) -> None:
    """Two windows of tokens against the reference in float64, gradients too.

    What plain PyTorch loses in bfloat16 is taken from attention over as many keys, since nobody writes a bounded memory in it.
    """
    op = _Attention(run.device, config, heads=4, kv_heads=2)
    inputs = op.inputs(2 * config.window)
    grad = torch.randn_like(inputs[0])
    exact_inputs = [t.double().cpu() for t in inputs]

    def exact(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, theta: Tensor, gate: Tensor, eta_logit: Tensor) -> Tensor:
        state = State.empty(1, op.kv_heads, _DIM, config, dtype=torch.float64)
        ends, inv_freq = torch.tensor([0, q.shape[1]]), op.inv_freq.cpu()
        q, k, v, lam, gate = (t[0] for t in (q, k, v, lam, gate))
        *snapshots, _ = reference.bank_scan(k, v, gate, ends, state, eta_logit if config.summary_slots else None, inv_freq, config)
        return reference.bounded_attention_chunks(q, k, v, lam, theta, gate, ends, state, snapshots, inv_freq, config)[None]

    names = ("y", "q", "k", "v", "lam", "theta")
    wanted = slice(len(names) - 1)
    result = outputs_and_gradients(lambda *t: op.ours(*t, *inputs[5:]), inputs[wanted], grad)
    truth = outputs_and_gradients(lambda *t: exact(*t, *exact_inputs[5:]), exact_inputs[wanted], grad.cpu())
    dense = outputs_and_gradients(lambda *t: reference.diff_attention(*t), exact_inputs[wanted], grad.cpu())
    plain = outputs_and_gradients(plain_attention, inputs[wanted], grad)
    for name, ours, right, close, rounded in zip(names, result, truth, dense, plain):
        run.check(f"bounded_attention {preset}, {name}", (ours.double().cpu() - right).abs().max().item(),
                  2.0 * (rounded.double().cpu() - close).abs().max().item())


def _row(run: Run, op: Any, preset: str, config: CodaConfig, pass_: str, length: int,
         seen: dict[str, tuple[int, float]]) -> dict[str, Any]:
    inputs = op.inputs(length)
    functions = {"ours": _CALLS[pass_](op.ours, inputs)}
    for name in ("plain_cudnn", "unbounded"):
        if _affordable(run, op, name, pass_, length, seen):
            function = baseline(run, name, _CALLS[pass_](getattr(op, name), inputs))
            if function:
                functions[name] = function
    times = run.time(functions)
    ms = times["ours"].ms
    keys = sum(min(t + 1, config.slots) for t in range(length))
    return {"op": op.name, "pass": pass_, "preset": preset, "B": 1, "L": length, "H": _HEADS, "Hkv": _KV_HEADS, "D": _DIM,
            "dtype": "bfloat16", "causal": True, "ms": ms,
            "tflops": attention_flops(2, 1, _HEADS, _DIM, keys, pass_) / ms / 1e9,
            "tokens_per_s": 1000.0 * length / ms, "extra_bytes": _extra_bytes(run.device, functions["ours"]),
            # torch offers no sliding window of cuDNN.
            "baselines": {"plain_cudnn": times["plain_cudnn"].ms if "plain_cudnn" in times else None, "cudnn_sliding_window": None,
                          "unbounded": times["unbounded"].ms if "unbounded" in times else None}}


def _affordable(run: Run, op: Any, name: str, pass_: str, length: int, seen: dict[str, tuple[int, float]]) -> bool:
    """Whether a baseline, whose time grows with the square of the length, takes less than _TOO_LONG_MS."""
    if name not in seen:
        probe = min(length, 4096)
        function = baseline(run, name, _CALLS[pass_](getattr(op, name), op.inputs(probe)))
        seen[name] = probe, run.time({name: function})[name].ms if function else math.inf
    probe, ms = seen[name]
    return ms * (length / probe) ** 2 <= _TOO_LONG_MS


def _forward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)
    return call


def _train(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward and backward; gradients of the inputs and, by accumulation, of a layer's parameters."""
    inputs, grad = differentiable(inputs), torch.randn_like(inputs[0])

    def call() -> None:
        function(*inputs).backward(grad)
        for t in inputs:
            t.grad = None
    return call


_CALLS = {"forward": _forward, "train": _train}


def _extra_bytes(device: torch.device, function: Callable[[], Optional[Tensor]]) -> int:
    """Peak memory during a call beyond what was there before and what it returns."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    y = function()
    returned = 0 if y is None else y.nbytes
    return torch.cuda.max_memory_allocated(device) - before - returned


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Tokens per second against length."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["op"], row["pass"]) for row in rows))
    figure = Figure(figsize=(11, 3.8 * ((len(panels) + 1) // 2)), layout="constrained")
    for axis, panel in zip(figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat, panels):
        shown = [row for row in rows if (row["op"], row["pass"]) == panel]
        for preset in _PRESETS:
            line = [row for row in shown if row["preset"] == preset]
            axis.plot([row["L"] for row in line], [row["tokens_per_s"] for row in line], marker="o", linewidth=2.5, label=preset)
        for name in ("plain_cudnn", "unbounded"):
            points = [(row["L"], 1000.0 * row["L"] / row["baselines"][name]) for row in shown
                      if row["preset"] == "default" and row["baselines"][name]]
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
        axis.set(title=", ".join(panel), xlabel="L", ylabel="tokens/s", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle("One sequence at the layer shape of Mistral-7B, bfloat16")
    figure.savefig(path, dpi=150)
