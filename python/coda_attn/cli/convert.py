"""``coda convert``: a model folder in, a converted model folder out."""

from __future__ import annotations

from typing import Any

import click

from ..convert import set_mode
from ..evaluation import ModelShape, state_bytes
from ..files import new_folder
from ..modeling import MODES, coda_layers
from . import options


@click.command()
@options.model_options
@click.option("--output", required=True, type=click.Path(), metavar="FOLDER", help="Where the converted model goes; must not exist.")
@click.option("--mode", type=click.Choice(MODES), default="bounded", show_default=True,
              help="Mode in which the model loads: fixed memory, or every token.")
@options.gate_option
@options.json_option
@options.memory_options
def convert(model: str, dtype: Any, device: Any, output: str, mode: str, gate: str, as_json: bool, memory: dict[str, Any]) -> None:
    """Convert a Mistral, Llama, Qwen2 or Qwen3 model and save it.

    After `import coda_attn`, transformers loads the folder like any other.

    \b
    Examples:
      coda convert --model smollm2 --output smollm2-coda
      coda convert --model path/to/mistral --dtype bfloat16 --preset large --output mistral-coda
      coda convert --model path/to/mistral --window 512 --bank-distance none --mode full --output mistral-coda
    """
    with new_folder(output) as partial:
        converted, tokenizer = options.load_converted(model, memory, gate, dtype=dtype, device=device)
        set_mode(converted, mode)
        converted.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    layers = coda_layers(converted)
    size = state_bytes(ModelShape.of(converted.config), layers[0].coda, dtype)
    if as_json:
        options.print_json({"output": output, "mode": mode, "layers": len(layers), "config": layers[0].coda.to_dict(),
                            "slots": layers[0].coda.slots, "state_bytes": size})
    else:
        click.echo(f"{output}: {len(layers)} layers, {layers[0].coda.slots} slots, "
                   f"{options.megabytes(size)} of memory per sequence, mode {mode}")
