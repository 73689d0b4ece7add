"""What attention kernels are measured against: cuDNN's attention, and differential attention as a user would write it with it."""

from __future__ import annotations

import math
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from coda_attn import reference

from .checks import Run


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q (B, L, H, D) over k, v (B, L, Hkv, D) by cuDNN, in this layout."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True,
                                            enable_gqa=True).transpose(1, 2)


def flash_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention to the last ``window`` keys by FlashAttention-2, which torch.nn.attention.varlen calls for packed batches."""
    return torch.ops.aten._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False,
                                                   window_size_left=window - 1, window_size_right=0)[0]


class FlexWindow:
    """The same by flex_attention, compiled once for all lengths; ``window`` is a multiple of its block. For forward passes."""

    _BLOCK = 128

    def __init__(self, window: int):
        self.window, self.masks = window, {}
        self.attend = torch.compile(flex_attention, dynamic=True)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        if length not in self.masks:
            self.masks[length] = self._mask(length, q.device)
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        return self.attend(*heads_first, block_mask=self.masks[length], enable_gqa=True).transpose(1, 2)

    def _mask(self, length: int, device: torch.device) -> BlockMask:
        """From the blocks that a row of blocks sees: torch's own way there visits every pair of tokens."""
        window, far = self.window, self.window // self._BLOCK
        row = torch.arange(-(-length // self._BLOCK), dtype=torch.int32, device=device)
        # The diagonal and the window's far edge are cut by the mask, the blocks between them are whole.
        edges, whole = torch.stack([row, (row - far).clamp(min=0)], -1), row[:, None] - 1 - torch.arange(far - 1, device=device)
        count = 1 + (row >= far).int(), row.clamp(max=far - 1)
        blocks = [t.int()[None, None].contiguous() for t in (count[0], edges, count[1], whole.clamp(min=0))]
        return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=self._BLOCK, seq_lengths=(length, length), compute_q_blocks=False,
                                        mask_mod=lambda b, h, i, j: (i >= j) & (i - j < window))


def stack_streams(q: Tensor, theta: Tensor, kv_heads: int) -> Tensor:
    """q and R_theta q as 2H heads (B, L, 2H, D), those of one KV head together."""
    turned = reference.rotate(q.float(), theta.float()).to(q.dtype)
    return torch.stack([t.unflatten(2, (kv_heads, -1)) for t in (q, turned)], 3).flatten(2, 4)


def subtract_streams(o: Tensor, lam: Tensor, norm_weight: Optional[Tensor], kv_heads: int) -> Tensor:
    """RMSNorm(o1 - lam o2) (B, L, H, D) of stacked outputs; without ``norm_weight`` the difference itself."""
    first, second = (t.flatten(2, 3).float() for t in o.unflatten(2, (kv_heads, 2, -1)).unbind(3))
    difference = first - lam.float()[..., None] * second
    if norm_weight is None:
        return difference.to(o.dtype)
    rstd = (difference.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return (difference * rstd * norm_weight.float()).to(o.dtype)


class Composite:
    """Differential attention of cuDNN on stacked heads, rotation before and subtraction and norm after it fused by torch.compile.

    For one set of shapes: compiled functions keep no more than a few.
    """

    def __init__(self) -> None:
        torch.compiler.reset()
        self.stack, self.subtract = torch.compile(stack_streams), torch.compile(subtract_streams)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, theta: Tensor, norm_weight: Optional[Tensor] = None) -> Tensor:
        stacked = self.stack(q, theta, k.shape[2])
        return self.subtract(cudnn_attention(stacked, k, v), lam, norm_weight, k.shape[2])


def plain_attention(q: Tensor, k: Tensor, v: Tensor, lam: Optional[Tensor] = None, theta: Optional[Tensor] = None,
                    norm_weight: Optional[Tensor] = None) -> Tensor:
    """The computation of ``reference.diff_attention`` in plain PyTorch, every step in the dtype of its inputs."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(group, 2) for t in (k, v))
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    streams = []
    for query in [q] if theta is None else [q, reference.rotate(q, theta.float())]:
        logits = torch.einsum("bqhd,bkhd->bhqk", query, keys) * q.shape[-1] ** -0.5
        streams.append(torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(hidden, -math.inf).softmax(-1), values))
    y = streams[0] if lam is None else streams[0] - lam[..., None] * streams[1]
    if norm_weight is not None:
        y = y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm_weight
    return y


def attention_flops(streams: int, batch: int, heads: int, dim: int, pairs: float, pass_: str) -> float:
    """Floating-point operations of plain attention over ``pairs`` query-key pairs a head, once per stream; a backward
    pass is 2.5 forward passes. What a kernel saves on this counts as speed."""
    return {"forward": 4.0, "backward": 10.0, "train": 14.0}[pass_] * streams * batch * heads * dim * pairs


def differentiable(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def outputs_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    inputs = differentiable(inputs)
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype))]


def check_against(run: Run, what: str, names: Sequence[str], ours: Sequence[Tensor], plain: Sequence[Tensor],
                  exact: Sequence[Tensor]) -> None:
    """Checks max|ours - exact| <= 2 max|plain - exact| for every tensor."""
    for name, a, b, c in zip(names, ours, plain, exact):
        run.check(f"{what}, {name}", (a.double() - c).abs().max().item(), 2.0 * (b.double() - c).abs().max().item())


def baseline(run: Run, name: str, function: Callable[[], Any]) -> Optional[Callable[[], Any]]:
    """The function, or None where it does not run here: a competitor's failure, of whatever kind, is not ours."""
    try:
        function()
    except Exception as error:
        run.say(f"no {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return None
    return function
