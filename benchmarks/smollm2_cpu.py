"""SmolLM2 on two CPU threads: prefill, decode steps, and a text read in constant memory."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from coda_attn import CodaCache
from coda_attn.evaluation import reading

from . import machine, models
from .checks import Run

_PIECE = 2000  # tokens read at once
_DECODED = 32  # tokens of the correctness check that are decoded one by one
_CHECKED = 640
_ROUNDING = 1e-3  # of the largest logit: thirty layers of float32, each with its own order of summation


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens, and decode steps timed."""

    prefill: int
    context: int
    read: int
    bucket: int
    steps: int


_FULL, _QUICK = Sizes(8192, 1024, 100_000, 10_000, 64), Sizes(1024, 128, 4000, 1000, 8)


@torch.inference_mode()
def measure(run: Run, model: str = "smollm2", threads: int = 2) -> list[dict[str, Any]]:
    """SmolLM2 bounded against plain transformers with SDPA on the CPU: prefill, decode step, memory over a long text.

    Both sides run the decoder without the language model's head, in float32, and keep their cache. The long text is read
    before anything else is loaded or timed, so that the peak of the process is its own.
    """
    torch.set_num_threads(threads)
    sizes = _QUICK if run.quick else _FULL
    with torch.inference_mode(False):
        ours, tokenizer = models.load(model, run.device)
    tokens = models.tokens(tokenizer, sizes.read + sizes.steps + 2)
    expected = models.logits(ours, tokens[:_CHECKED])
    with torch.inference_mode(False):
        models.bounded(ours, model)
    _check(run, ours, tokens[:_CHECKED], expected)

    shape = {"model": model, "dtype": "float32", "threads": threads, "B": 1}
    far = CodaCache(ours.config)
    rows = [{"op": "read", "pass": "forward", **shape, **row}
            for row in _read(run, ours, tokens[:sizes.read], far, sizes.bucket)]

    with torch.inference_mode(False):
        plain, _ = models.load(model, run.device)
    prompt = tokens[None, :sizes.prefill]
    run.say(f"prefill of {sizes.prefill} tokens")
    prefill = run.time({"ours": lambda: ours.get_decoder()(input_ids=prompt, use_cache=True),
                        "plain_sdpa": lambda: plain.get_decoder()(input_ids=prompt, use_cache=True)}, least=3)
    rows.append({"op": "prefill", "pass": "forward", **shape, "L": sizes.prefill, "ms": prefill["ours"].ms,
                 "tokens_per_s": 1000.0 * sizes.prefill / prefill["ours"].ms,
                 "repeats": prefill["ours"].repeats, "baselines": {"plain_sdpa": prefill["plain_sdpa"].ms}})

    near, grown = CodaCache(ours.config), DynamicCache(config=plain.config)
    context = tokens[None, :sizes.context]
    ours.get_decoder()(input_ids=context, past_key_values=near, use_cache=True)
    plain.get_decoder()(input_ids=context, past_key_values=grown, use_cache=True)
    run.say(f"decode steps after {sizes.context} and {sizes.read} tokens")
    step = run.time({"near": _stepper(ours, near, tokens[sizes.context:]), "far": _stepper(ours, far, tokens[sizes.read:]),
                     "plain_sdpa": _stepper(plain, grown, tokens[sizes.context:])},
                    repeats=sizes.steps, least=sizes.steps)
    for name, after in (("near", sizes.context), ("far", sizes.read)):
        rows.append({"op": "decode_step", "pass": "forward", **shape, "context": after, "ms": step[name].ms,
                     "least_ms": step[name].least, "most_ms": step[name].most, "repeats": step[name].repeats,
                     "baselines": {f"plain_sdpa_at_{sizes.context}": step["plain_sdpa"].ms}})
    return rows


def _check(run: Run, model: nn.Module, tokens: Tensor, expected: Tensor) -> None:
    allowed = _ROUNDING * expected.abs().max().item()
    with reading(model, "full"):
        run.check("mode full with one stream gives the plain model's logits",
                  (models.logits(model, tokens) - expected).abs().max().item(), allowed)
    whole = models.logits(model, tokens, CodaCache(model.config))[-_DECODED:]
    cache = CodaCache(model.config)
    models.logits(model, tokens[:-_DECODED], cache)
    decoded = torch.cat([models.logits(model, token, cache) for token in tokens[-_DECODED:].split(1)])
    run.check("bounded decode gives the logits of bounded prefill", (decoded - whole).abs().max().item(), allowed)


def _read(run: Run, model: nn.Module, tokens: Tensor, cache: CodaCache, bucket: int) -> Iterator[dict[str, Any]]:
    """Speed and memory for every ``bucket`` tokens of a text that ``cache`` takes in."""
    run.say(f"reading {len(tokens)} tokens")
    for start in range(0, len(tokens), bucket):
        part = tokens[start:start + bucket]
        begin = time.perf_counter()
        for piece in part.split(_PIECE):
            model.get_decoder()(input_ids=piece[None], past_key_values=cache, use_cache=True)
        seconds = time.perf_counter() - begin
        row = {"start": start, "stop": start + len(part), "tokens_per_s": len(part) / seconds, "state_bytes": cache.nbytes(),
               "resident_bytes": machine.resident_bytes(), "peak_resident_bytes": machine.peak_resident_bytes()}
        run.say(f"  to {row['stop']}: {row['tokens_per_s']:.0f} tokens/s, peak {row['peak_resident_bytes'] / 1e6:.0f} MB")
        yield row


def _stepper(model: nn.Module, cache: Any, tokens: Tensor) -> Callable[[], Any]:
    """A function that reads one more token at each call."""
    upcoming = iter(tokens.split(1))
    return lambda: model.get_decoder()(input_ids=next(upcoming)[None], past_key_values=cache, use_cache=True)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Speed and memory while the long text is read."""
    from matplotlib.figure import Figure

    read = [row for row in rows if row["op"] == "read"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    at = [row["stop"] for row in read]
    speed.plot(at, [row["tokens_per_s"] for row in read], marker="o", color="#2166ac")
    speed.set(title="Reading speed", xlabel="tokens read", ylabel="tokens/s", ylim=(0, None))
    for field, label in (("peak_resident_bytes", "process, peak"), ("resident_bytes", "process"),
                         ("state_bytes", "memory of the sequence")):
        memory.plot(at, [row[field] / 1e6 for row in read], marker="o", label=label)
    memory.set(title="Memory", xlabel="tokens read", ylabel="MB", ylim=(0, None))
    memory.legend(frameon=False)
    for axis in (speed, memory):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{read[0]['model']}, bounded, {read[0]['threads']} CPU threads")
    figure.savefig(path, dpi=150)
