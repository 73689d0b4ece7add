"""A model far beyond the context that it was trained on."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from coda_attn import reconfigure
from coda_attn.evaluation import reading, token_losses
from coda_attn.modeling import coda_layers

from . import models
from .checks import Run

_ROUNDING = 1e-3  # nats a token: thirty layers of float32, each with its own order of summation


def measure(run: Run, model: str = "smollm2") -> list[dict[str, Any]]:
    """Perplexity of SmolLM2, trained on 8192 tokens, over the end of 32,768, banks at a constant distance and at true positions.

    The baseline is the untouched model on the last 8192 tokens read afresh; all are scored on the same tokens of that part.
    """
    length, part = (4096, 1024) if run.quick else (32768, 8192)
    network, tokenizer = models.load(model, run.device)
    tokens = models.tokens(tokenizer, length)
    run.say(f"the plain model on tokens {length - part} to {length}")
    plain = token_losses(network, tokens[None, -part:], piece=part)[0]

    models.bounded(network, model)
    memory = coda_layers(network)[0].coda
    with reading(network, "full"):
        full = token_losses(network, tokens[None, -part:], piece=part)[0]
    run.check("mode full with one stream gives the plain model's losses", (full - plain).abs().mean().item(), _ROUNDING)

    shape = {"op": "perplexity", "pass": "forward", "model": model, "dtype": "float32"}
    baseline = _perplexity(plain)
    rows = [{**shape, "policy": "plain", "bank_distance": None, "read": part, "start": length - part, "stop": length,
             "tokens": len(plain), "ppl": baseline, "ratio": 1.0}]
    for distance in (memory.bank_distance, None):
        reconfigure(network, dataclasses.replace(memory, bank_distance=distance))
        run.say(f"bounded, bank_distance {distance}, {length} tokens")
        with reading(network, "bounded"), tqdm(total=length, unit=" tokens", disable=None, leave=False) as bar:
            losses = token_losses(network, tokens[None], progress=bar.update)[0]
        for start in range(0, length, part):
            # losses[i] predicts token i + 1; a part read afresh predicts all of its tokens but the first.
            scored = losses[start:start + part - 1]
            last = start + part == length
            rows.append({**shape, "policy": "bounded", "bank_distance": distance, "read": start + part, "start": start,
                         "stop": start + part, "tokens": len(scored), "ppl": _perplexity(scored),
                         "ratio": _perplexity(scored) / baseline if last else None})
    return rows


def _perplexity(losses: Tensor) -> float:
    return math.exp(losses.double().mean().item())


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Perplexity by position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    plain, *bounded = rows
    for distance in dict.fromkeys(row["bank_distance"] for row in bounded):
        line = [row for row in bounded if row["bank_distance"] == distance]
        label = "true positions" if distance is None else f"banks {distance} tokens away"
        axis.plot([row["stop"] for row in line], [row["ppl"] for row in line], marker="o", label=f"bounded, {label}")
    axis.plot([plain["start"], plain["stop"]], [plain["ppl"]] * 2, color="#7f7f7f", linewidth=3,
              label=f"plain model, these {plain['read']} tokens alone")
    axis.set(title=f"{plain['model']} on a long text", xlabel="tokens read", ylabel="perplexity", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
