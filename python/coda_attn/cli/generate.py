"""``coda generate``: a continuation, printed as it comes."""

from __future__ import annotations

import time
from typing import Any, Optional

import click
import torch
from transformers import TextStreamer

from ..evaluation import ModelShape, full_bytes, read_text, state_bytes
from ..modeling import coda_layers
from ..convert import set_mode
from . import options


@click.command()
@options.model_options
@click.option("--prompt", help="The text to continue.")
@click.option("--prompt-file", type=click.Path(dir_okay=False), metavar="FILE", help="The same, from a UTF-8 file of any length.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to generate at most.")
@click.option("--policy", type=click.Choice(("bounded", "full")), default="bounded", show_default=True,
              help="Fixed memory, or every token.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest token each time.")
@click.option("--top-k", type=click.IntRange(min=0), default=50, show_default=True, help="Sample among so many tokens; 0: all.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True,
              help="Sample among the likeliest tokens of this total probability.")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True,
              help="Above 1: repeat less.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@options.gate_option
@options.json_option
@options.memory_options
def generate(model: str, dtype: Any, device: Any, prompt: Optional[str], prompt_file: Optional[str], max_new_tokens: int,
             policy: str, temperature: float, top_k: int, top_p: float, repetition_penalty: float, seed: int, gate: str,
             as_json: bool, memory: dict[str, Any]) -> None:
    """Continue a prompt, however long, through model.generate.

    \b
    Examples:
      coda generate --model smollm2 --prompt "The capital of France is"
      coda generate --model smollm2 --prompt-file book.txt --max-new-tokens 200 --temperature 0.7 --top-p 0.9
      coda generate --model smollm2 --prompt-file notes.txt --policy full --json
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the prompt with --prompt or with --prompt-file, one of them")
    prompt = read_text(prompt_file) if prompt is None else prompt
    if not prompt:
        raise click.UsageError("the prompt is empty; give at least one character")
    converted, tokenizer = options.load_converted(model, memory, gate, dtype=dtype, device=device)
    set_mode(converted, policy)
    sampling = {"repetition_penalty": repetition_penalty}
    if temperature:
        sampling.update(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.manual_seed(seed)
    result = continuation(converted, tokenizer, tokenizer(prompt, return_tensors="pt")["input_ids"], max_new_tokens,
                          stream=not as_json, **sampling)
    if as_json:
        options.print_json({"policy": policy, **result})
    else:
        click.echo(f"{result['prompt_tokens']} tokens read, {result['new_tokens']} generated, {result['seconds']:.1f} s, "
                   f"memory {options.megabytes(result['state_bytes'])}", err=True)


def continuation(model: Any, tokenizer: Any, prompt: torch.Tensor, max_new_tokens: int, *, stream: bool, **sampling: Any) -> dict[str, Any]:
    """Continues a prompt (1, T) in the model's current mode, printed as it comes if ``stream``."""
    prompt = prompt.to(model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens,
                                pad_token_id=tokenizer.pad_token_id, streamer=TextStreamer(tokenizer, skip_prompt=True) if stream else None,
                                **{"do_sample": False, **sampling})
    shape, dtype = ModelShape.of(model.config), coda_layers(model)[0].k_proj.weight.dtype
    # The last token is chosen but not read.
    held = full_bytes(shape, output.shape[1] - 1, dtype) if model.config.coda_mode == "full" else state_bytes(
        shape, coda_layers(model)[0].coda, dtype)
    return {"text": tokenizer.decode(output[0, prompt.shape[1]:], skip_special_tokens=True), "prompt_tokens": prompt.shape[1],
            "new_tokens": output.shape[1] - prompt.shape[1], "seconds": time.perf_counter() - start, "state_bytes": held}
