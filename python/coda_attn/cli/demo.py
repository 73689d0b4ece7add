"""``coda demo``: a real model reads a real text in fixed memory."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any, Optional

import click

from ..convert import set_mode
from ..evaluation import POLICIES, ModelShape, memory_rows, perplexity_rows
from ..evaluation.perplexity import check_lengths, tokens_to_read
from ..files import new_file
from ..models import SMOLLM2
from . import options
from .generate import continuation

_READ = {512: 2048, 1024: 4096, 2048: 12288}  # tokens of sequences of each length
_PROMPT_TOKENS, _NEW_TOKENS = 4096, 60
_TOKENS_READ = tuple(2 ** n for n in range(7, 18))
_COLOURS = {"full": "#7f7f7f", "window": "#e08214", "bounded": "#2166ac"}


@click.command()
@options.text_option
@click.option("--out", type=click.Path(file_okay=False), default="demo", show_default=True, metavar="FOLDER",
              help="Where coda-demo.png and coda-demo.json go.")
@click.option("--model", default=SMOLLM2, show_default=True, metavar="NAME|FOLDER", help="As for the other commands.")
@options.json_option
def demo(text: Optional[str], out: str, model: str, as_json: bool) -> None:
    """Perplexity, memory and a generated continuation of a small model on a long text.

    It reads with all tokens (full), with a sliding window (window), and with the window and its bank (bounded), both in 384
    slots, and draws what each of them costs. Under 5 minutes on 2 cores.

    \b
    Examples:
      coda demo
      coda demo --text book.txt --out my-demo
    """
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[step] = round(now - clock, 1)
        clock = now

    def say(message: str) -> None:
        click.echo(message, err=as_json)

    say(f"Loading {model}; the whole demo takes under 5 minutes on 2 cores.")
    converted, tokenizer = options.load_converted(model, {"preset": None, "fields": {}}, "auto")
    tokens = options.read_tokens(tokenizer, text)
    check_lengths(tuple(_READ), len(tokens))
    lap("load")
    total = sum(tokens_to_read(tokens, [length], most) for length, most in _READ.items())
    say(f"Loaded in {seconds['load']} s. Reading {total:,} tokens of {text or 'the topics of Python help'} in sequences of "
        f"{', '.join(map(str, _READ))}, with each of {', '.join(POLICIES)}.")
    with options.progress_bar(len(POLICIES) * total, "reading") as bar:
        rows = [row for length, most in _READ.items()
                for row in perplexity_rows(converted, tokens, [length], max_tokens=most, progress=bar.update)]
    lap("perplexity")
    memory = memory_rows(ModelShape.of(converted.config), _TOKENS_READ)
    if not as_json:
        click.echo()
        options.print_perplexity(rows)
    prompt = tokens[:_PROMPT_TOKENS]
    say(f"\nA prompt of {len(prompt):,} tokens, read in bounded memory. It ends:\n"
        f"  ...{' '.join(tokenizer.decode(prompt[-40:]).split())}\nand the model goes on:\n")
    set_mode(converted, "bounded")
    generated = continuation(converted, tokenizer, prompt[None], _NEW_TOKENS, stream=not as_json, repetition_penalty=1.1)
    lap("generate")
    folder = pathlib.Path(out)
    figure, report = folder / "coda-demo.png", folder / "coda-demo.json"
    with new_file(figure) as partial:
        plot(rows, memory, model, partial)
    lap("plot")
    result = {"model": model, "text": text, "rows": rows, "memory": memory, "generation": generated, "seconds": seconds,
              "files": [str(figure), str(report)]}
    with new_file(report) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        options.print_json(result)
    say(f"\nMemory {options.megabytes(generated['state_bytes'])} after {generated['prompt_tokens']:,} tokens, and after any number. "
        f"Took {sum(seconds.values()):.0f} s. Wrote {figure} and {report}.")


def plot(rows: list[dict[str, Any]], memory: list[dict[str, Any]], model: str, path: pathlib.Path) -> None:
    """Memory against tokens read, and perplexity against length, as one PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the demo's plot needs the Python package matplotlib, which is not installed; pip install matplotlib") from None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bytes_axis, ppl_axis = figure.subplots(1, 2)
    for policy in ("full", "bounded"):
        line = [row for row in memory if row["policy"] == policy]
        bytes_axis.loglog([row["length"] for row in line], [row["state_bytes"] / 1e6 for row in line], base=2,
                          color=_COLOURS[policy], label=policy, linewidth=2)
    bytes_axis.set(title="Memory of one sequence", xlabel="tokens read", ylabel="MB")
    for policy in POLICIES:
        line = [row for row in rows if row["policy"] == policy]
        slots = "all tokens" if policy == "full" else f"{line[0]['slots']} slots"
        ppl_axis.plot([row["length"] for row in line], [row["ppl"] for row in line], marker="o", color=_COLOURS[policy],
                      label=f"{policy}, {slots}", linewidth=2)
    ppl_axis.set(title="Perplexity, lower is better", xlabel="tokens per sequence", ylabel="perplexity")
    ppl_axis.set_xscale("log", base=2)
    ppl_axis.set_xticks(tuple(_READ), list(map(str, _READ)))
    ppl_axis.minorticks_off()
    for axis in (bytes_axis, ppl_axis):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(f"{model}: attention over every token, a window, and the bounded memory")
    figure.savefig(path, dpi=150)
