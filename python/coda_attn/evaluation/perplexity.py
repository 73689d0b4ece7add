"""Perplexity of a converted model that reads with all keys, with a window, or with the bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any, Callable, Iterator, Optional, Sequence

import torch
from torch import Tensor, nn

from ..cache import CodaCache
from ..config import CodaConfig
from ..convert import reconfigure, set_mode
from ..modeling import CodaAttention, coda_layers
from .memory import ModelShape, full_bytes, state_bytes

POLICIES = ("full", "window", "bounded")
_PIECE = 2048  # tokens read at once
_LOGIT_ROWS = 256  # tokens whose logits over the whole vocabulary exist at once


def window_config(memory: CodaConfig) -> CodaConfig:
    """A sliding window with sinks in as many slots as ``memory`` has: 380 + 4 for 384.

    Tokens leave the window at most 4 at a time, and only the sinks stay, so whatever ``memory`` does better comes from its bank.
    Raises: ValueError for a memory of summary slots, whose parameters a window does not have.
    """
    if memory.summary_slots:
        raise ValueError(f"policy 'window' needs a memory without summary slots, but summary_slots={memory.summary_slots}; "
                         "leave the policy out, or convert the model without summary slots")
    sinks = min(4, memory.slots - 1)
    window = memory.slots - sinks
    return dataclasses.replace(memory, window=window, chunk=math.gcd(window, 4), exact_slots=sinks, num_sinks=sinks)


@contextlib.contextmanager
def reading(model: nn.Module, policy: str) -> Iterator[CodaConfig]:
    """While the block lasts, the converted model reads with this policy; yields the memory that it reads with.

    ``"full"`` keeps all keys, ``"window"`` is ``window_config``, ``"bounded"`` the model's own memory. A second stream that has
    not been trained is left out, so that ``"full"`` is the model before it was converted, and the others differ from it in memory
    alone.
    Raises: ValueError for another policy, or a model that is not converted.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not known; choose from {', '.join(POLICIES)}")
    layers = coda_layers(model)
    memory, mode, training = layers[0].coda, model.config.coda_mode, model.training
    single = not any(_second_stream_trained(layer) for layer in layers)
    try:
        if policy == "window":
            reconfigure(model, window_config(memory))
        set_mode(model, "full" if policy == "full" else "bounded")
        for layer in layers:
            layer.single_stream = single
        model.eval()
        yield layers[0].coda
    finally:
        for layer in layers:
            layer.single_stream = False
        reconfigure(model, memory)
        set_mode(model, mode)
        model.train(training)


def _second_stream_trained(layer: CodaAttention) -> bool:
    return layer.theta is not None and bool(layer.theta.any() or layer.lambda_proj.weight.any())


@torch.inference_mode()
def token_losses(model: nn.Module, token_ids: Tensor, *, piece: int = _PIECE,
                 progress: Callable[[int], Any] = lambda tokens: None) -> Tensor:
    """Negative log likelihood, in nats, of every token but the first, (B, L - 1) float32 on the CPU.

    The sequences are read in the model's current mode, ``piece`` tokens at a time; logits exist for a few hundred tokens at a
    time, so in bounded mode the memory needed does not depend on L, but for four bytes a token of the result.

    Args:
        token_ids: (B, L) int64. progress: called with the number of tokens just read.
    Raises: ValueError for sequences of less than two tokens.
    """
    rows, length = token_ids.shape
    if length < 2:
        raise ValueError(f"sequences of {length} token(s) predict nothing; give at least 2 tokens")
    token_ids = token_ids.to(model.get_input_embeddings().weight.device)
    head = model.get_output_embeddings()
    losses = torch.empty(rows, length - 1)
    cache = None
    if length > piece and model.config.coda_mode == "bounded":
        cache = CodaCache(model.config)
    for start in range(0, length, piece):
        ids = token_ids[:, start:start + piece]
        out = model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=length > piece)
        cache = out.past_key_values
        for first in range(0, ids.shape[1], _LOGIT_ROWS):
            target = token_ids[:, start + first + 1:start + min(first + _LOGIT_ROWS, ids.shape[1]) + 1]
            hidden = out.last_hidden_state[:, first:first + target.shape[1]]
            for row in range(rows):
                losses[row, start + first:start + first + target.shape[1]] = nn.functional.cross_entropy(
                    head(hidden[row]).float(), target[row], reduction="none")
        progress(ids.numel())
    return losses


def perplexity_rows(model: nn.Module, token_ids: Tensor, lengths: Sequence[int], policies: Sequence[str] = POLICIES, *,
                    max_tokens: int = 16384, progress: Callable[[int], Any] = lambda tokens: None) -> list[dict[str, Any]]:
    """Perplexity over fresh sequences of each length, cut one after the other from the start of a text.

    Args:
        model: a converted model. token_ids: (T,) the text.
        lengths: tokens per sequence. policies: see ``reading``.
        max_tokens: at most so many tokens are read per row, but one sequence at least.
    Returns: one row per policy and length: ``policy``, ``length``, ``ppl``, ``tokens`` (predicted: all but the first of each
        sequence), ``slots`` (keys that the last query sees at most) and ``state_bytes`` (memory of one sequence at the end).
    Raises: ValueError for a text shorter than the longest sequence, and for unknown policies.
    """
    check_lengths(lengths, len(token_ids))
    layers = coda_layers(model)
    shape, dtype = ModelShape.of(model.config), layers[0].k_proj.weight.dtype
    rows = []
    for policy in policies:
        with reading(model, policy) as memory:
            for length in lengths:
                sequences = _cut(token_ids, length, max_tokens)
                loss = sum(token_losses(model, batch, progress=progress).double().sum().item()
                           for batch in sequences.split(max(1, _PIECE // length)))
                tokens = sequences.shape[0] * (length - 1)
                full = policy == "full"
                rows.append({"policy": policy, "length": length, "ppl": math.exp(loss / tokens), "tokens": tokens,
                             "slots": length if full else memory.slots,
                             "state_bytes": full_bytes(shape, length, dtype) if full else state_bytes(shape, memory, dtype)})
    return rows


def check_lengths(lengths: Sequence[int], available: int) -> None:
    """Raises ValueError for a sequence length below 2 tokens or beyond the tokens available."""
    if min(lengths, default=0) < 2:
        raise ValueError(f"lengths {list(lengths)} are not supported; give at least one, each at least 2 tokens")
    if max(lengths) > available:
        raise ValueError(f"sequences of {max(lengths)} tokens were asked, but the text has only {available} tokens; "
                         "give a longer text or a smaller length")


def tokens_to_read(token_ids: Tensor, lengths: Sequence[int], max_tokens: int) -> int:
    """Tokens that ``perplexity_rows`` reads per policy."""
    return sum(_cut(token_ids, length, max_tokens).numel() for length in lengths)


def _cut(token_ids: Tensor, length: int, max_tokens: int) -> Tensor:
    """(N, length): as many sequences as the text and max_tokens allow, at least one."""
    count = max(1, min(len(token_ids), max_tokens) // length)
    return token_ids[:count * length].view(count, length)


def stream_perplexity(model: nn.Module, token_ids: Tensor, *, bucket: int = 8192, piece: int = _PIECE,
                      policy: str = "bounded", progress: Optional[Callable[[int], Any]] = None) -> list[dict[str, Any]]:
    """Reads one long sequence, in constant memory when bounded, and returns its perplexity by position.

    Args:
        model: a converted model. token_ids: (L,). bucket: positions per row returned. piece: tokens read at once.
    Returns: ``{"start", "stop", "tokens", "loss", "ppl"}`` for the tokens at positions [start, stop), loss in nats per token.
    """
    with reading(model, policy):
        losses = token_losses(model, token_ids[None], piece=piece, progress=progress or (lambda tokens: None))[0]
    rows = []
    for start in range(0, len(token_ids), bucket):
        stop = min(start + bucket, len(token_ids))
        part = losses[max(start - 1, 0):stop - 1].double()
        if len(part):
            loss = part.mean().item()
            rows.append({"start": start, "stop": stop, "tokens": len(part), "loss": loss, "ppl": math.exp(loss)})
    return rows
