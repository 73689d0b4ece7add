"""``coda memory``: bytes against tokens read."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import click

from ..config import CodaConfig
from ..evaluation import SHAPES, ModelShape, memory_rows
from ..models import load_config
from . import options


@click.command()
@click.option("--model", metavar="NAME|FOLDER", help="Take the shape of this model: smollm2, random:mistral-tiny, or a folder.")
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Take the shape of a well-known model.  [default: mistral-7b]")
@click.option("--layers", type=int, help="Layers, in place of the shape's own.")
@click.option("--kv-heads", type=int, help="KV heads per layer, likewise.")
@click.option("--head-dim", type=int, help="Dimensions per head, likewise.")
@click.option("--lengths", type=options.integers(), default="1024,4096,32768,131072,1048576", show_default=True, help="Tokens read.")
@click.option("--dtype", type=click.Choice(list(options.DTYPES)), default="bfloat16", show_default=True,
              help="Of keys and values.")
@options.json_option
@options.memory_options
def memory(model: Optional[str], shape: Optional[str], layers: Optional[int], kv_heads: Optional[int], head_dim: Optional[int],
           lengths: list[int], dtype: str, as_json: bool, memory: dict[str, Any]) -> None:
    """Memory of one sequence after so many tokens: all keys and values, or the bounded memory.

    \b
    Examples:
      coda memory
      coda memory --shape llama-3.1-70b --lengths 8192,131072
      coda memory --model smollm2 --dtype float32 --preset small
      coda memory --layers 24 --kv-heads 4 --head-dim 64 --json
    """
    if model and shape:
        raise click.UsageError("--model and --shape both name a shape; give one of them")
    base, own = SHAPES[shape or "mistral-7b"], CodaConfig()
    if model:
        config = load_config(model)
        base, own = ModelShape.of(config), CodaConfig.from_dict(getattr(config, "coda", None) or {})
    given = {name: value for name, value in (("layers", layers), ("kv_heads", kv_heads), ("head_dim", head_dim)) if value is not None}
    base = dataclasses.replace(base, **given)
    rows = memory_rows(base, lengths, options.memory_config(memory, own), options.DTYPES[dtype])
    if as_json:
        options.print_json({"shape": dataclasses.asdict(base), "dtype": dtype, "rows": rows})
        return
    half = len(rows) // 2
    options.print_table(["tokens read", "full", "bounded", "ratio"],
                        [[f"{full['length']:,}", options.megabytes(full["state_bytes"]), options.megabytes(bounded["state_bytes"]),
                          f"{full['state_bytes'] / bounded['state_bytes']:.1f}"] for full, bounded in zip(rows[:half], rows[half:])])
    click.echo(f"{base.layers} layers, {base.kv_heads} KV heads, head dim {base.head_dim}, {dtype}, {rows[-1]['slots']} slots")
