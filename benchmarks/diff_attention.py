"""Differential attention on a GPU."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, Callable, Optional, Sequence

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from coda_attn import functional as F, reference

from .attention import (Composite, attention_flops, baseline, check_against, cudnn_attention, differentiable,
                        outputs_and_gradients, plain_attention, stack_streams)
from .checks import Run

_HEADS, _KV_HEADS, _TOKENS = 32, 8, 16384
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SECONDS = 0.1  # of runs of each competitor
_LONGEST_PEER = 16384  # two seconds a run at 65536
_CHECKED = 384  # tokens, not a multiple of a large tile
_INPUTS = ("q", "k", "v", "lam", "theta", "norm_weight")
_BASELINES = ("cudnn_stacked", "composite", "plain_cudnn", "peer_triton")


def measure(run: Run, lengths: Sequence[int] = _LENGTHS) -> list[dict[str, Any]]:
    """diff_attention, forward and backward, beside cuDNN on stacked heads, with rotation and norm, and plain.

    Two streams with rotation, subtraction and RMS norm inside, and one stream alone; B * L is 16384, or B is 1.
    """
    # Otherwise the composite's backward could run once only.
    functorch_config.donated_buffer = False
    dims = (128,) if run.quick else (64, 128)
    lengths = [length for length in lengths if length <= 2048] if run.quick else lengths
    for dim in dims:
        for streams in (2, 1):
            _check(run, streams, dim)
    rows = []
    for dim in dims:
        for streams in (2, 1):
            for length in lengths:
                rows += _measure(run, streams, dim, length)
    return rows


def ours(q: Tensor, k: Tensor, v: Tensor, lam: Optional[Tensor] = None, theta: Optional[Tensor] = None,
         norm_weight: Optional[Tensor] = None) -> Tensor:
    return F.diff_attention(q, k, v, lam, theta, norm_weight=norm_weight)


def _inputs(device: torch.device, streams: int, batch: int, length: int, dim: int) -> list[Tensor]:
    """q, k, v, and for two streams lambda, theta and the norm's weight, in bfloat16 as projections give them."""
    generator = torch.Generator(device).manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    tensors = [randn(batch, length, _HEADS, dim), randn(batch, length, _KV_HEADS, dim), randn(batch, length, _KV_HEADS, dim)]
    if streams == 2:
        tensors += [randn(batch, length, _HEADS).sigmoid(), randn(_HEADS, dim // 2), 1 + 0.1 * randn(dim)]
    return tensors


def _check(run: Run, streams: int, dim: int) -> None:
    inputs = _inputs(run.device, streams, 1, _CHECKED, dim)
    grad = torch.randn_like(inputs[0])
    exact = outputs_and_gradients(
        lambda *t: reference.diff_attention(*t[:5], norm_weight=t[5] if streams == 2 else None), [t.double() for t in inputs], grad)
    plain = outputs_and_gradients(plain_attention, inputs, grad)
    what = f"{_op(streams)} D {dim}"
    check_against(run, what, ("y", *_INPUTS), outputs_and_gradients(ours, inputs, grad), plain, exact)
    if streams == 2:
        with torch.no_grad():
            check_against(run, f"composite D {dim}", ("y",), [Composite()(*inputs)], plain, exact)


def _measure(run: Run, streams: int, dim: int, length: int) -> list[dict[str, Any]]:
    batch = max(1, _TOKENS // length)
    run.say(f"{_op(streams)} D {dim} L {length}")
    inputs = _inputs(run.device, streams, batch, length, dim)
    q, k, v = inputs[:3]
    competitors: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {"plain_cudnn": (cudnn_attention, (q, k, v))}
    if streams == 2:
        competitors["cudnn_stacked"] = (cudnn_attention, (stack_streams(q, inputs[4], _KV_HEADS), k, v))
        competitors["composite"] = (Composite(), inputs)

    with torch.no_grad():
        functions = {name: functools.partial(function, *tensors) for name, (function, tensors) in competitors.items()}
        if streams == 2 and length <= _LONGEST_PEER:
            functions["peer_triton"] = _peer(*inputs)
        functions = {name: baseline(run, name, function) for name, function in functions.items() if function}
        functions = {name: function for name, function in functions.items() if function}
        forward = run.time({"ours": functools.partial(ours, *inputs), **functions}, seconds=_SECONDS)

    grad = torch.randn_like(q)
    backwards = {"ours": _backward(ours, inputs, grad)}
    for name, (function, tensors) in competitors.items():
        if name in functions:
            backwards[name] = _backward(function, tensors, grad)
    backward = run.time(backwards, seconds=_SECONDS)

    rows = []
    for pass_, times in (("forward", forward), ("backward", backward)):
        flops = attention_flops(streams, batch, _HEADS, dim, length * (length + 1) / 2, pass_)
        rows.append({"op": _op(streams), "pass": pass_, "B": batch, "L": length, "H": _HEADS, "Hkv": _KV_HEADS, "D": dim,
                     "dtype": "bfloat16", "causal": True, "ms": times["ours"].ms, "tflops": flops / times["ours"].ms / 1e9,
                     "baselines": {name: times[name].ms if name in times else None for name in _BASELINES}})
    return rows


def _op(streams: int) -> str:
    return "diff_attention" if streams == 2 else "diff_attention_one_stream"


def _backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> Callable[[], Any]:
    """The backward pass alone, over one forward pass."""
    inputs = differentiable(inputs)
    y = function(*inputs)
    grad = grad if grad.shape == y.shape else torch.cat([grad, grad], 2)  # stacked heads
    return lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True)


def _peer(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, theta: Tensor, norm_weight: Tensor) -> Optional[Callable[[], Tensor]]:
    """The Triton kernel of the paper's package, on queries turned beforehand and in the layout that it likes."""
    try:
        from coda_gqa_l.triton_diff_flash import diff_flash_attn, is_available
    except ImportError:
        return None
    if not is_available():
        return None
    tensors = [t.transpose(1, 2).contiguous()
               for t in (q, reference.rotate(q.float(), theta.float()).to(q.dtype), k, v, lam[..., None])]
    return lambda: diff_flash_attn(*tensors, rms_weight=norm_weight, is_causal=True)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Speed against length, one panel for each head dimension and pass."""
    from matplotlib.figure import Figure

    two = [row for row in rows if row["op"] == _op(2)]
    dims, passes = sorted({row["D"] for row in two}), ("forward", "backward")
    figure = Figure(figsize=(11, 3.8 * len(dims)), layout="constrained")
    for axis, (dim, pass_) in zip(figure.subplots(len(dims), 2, squeeze=False).flat, ((d, p) for d in dims for p in passes)):
        panel = [row for row in two if row["D"] == dim and row["pass"] == pass_]
        axis.plot([row["L"] for row in panel], [row["tflops"] for row in panel], marker="o", linewidth=2.5, label="diff_attention")
        for name in ("composite", "cudnn_stacked", "peer_triton"):
            points = [(row["L"], row["tflops"] * row["ms"] / row["baselines"][name]) for row in panel if row["baselines"][name]]
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
        axis.set(title=f"{pass_}, D {dim}", xlabel="L", ylabel="TF/s", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle("Two causal streams, 32 query and 8 KV heads, bfloat16, B * L = 16384 or B = 1")
    figure.savefig(path, dpi=150)
