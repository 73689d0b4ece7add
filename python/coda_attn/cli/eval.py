"""``coda eval``: measurements of a model under each memory policy."""

from __future__ import annotations

from typing import Any, Optional

import click

from ..evaluation import POLICIES, perplexity_rows
from ..evaluation.perplexity import check_lengths, tokens_to_read
from . import options


@click.group("eval", invoke_without_command=True)
@click.pass_context
def evaluate(context: click.Context) -> None:
    """Measure a model under each memory policy.

    \b
    Example:
      coda eval ppl --model smollm2 --lengths 512,1024,2048
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@evaluate.command()
@options.model_options
@options.text_option
@click.option("--lengths", type=options.integers(), default="512,1024,2048", show_default=True, help="Tokens per sequence.")
@click.option("--policy", "policies", type=options.choices(*POLICIES), default="full,window,bounded", show_default=True,
              help="full: every token stays. window: a sliding window with sinks in as many slots as bounded. "
                   "bounded: the window and its bank.")
@click.option("--max-tokens", type=click.IntRange(min=2), default=16384, show_default=True,
              help="Tokens read per row at most; one sequence at least.")
@options.gate_option
@options.json_option
@options.memory_options
def ppl(model: str, dtype: Any, device: Any, text: Optional[str], lengths: list[int], policies: list[str], max_tokens: int,
        gate: str, as_json: bool, memory: dict[str, Any]) -> None:
    """Perplexity over fresh sequences of each length, cut from a text.

    Every token but the first of each sequence counts. "slots" are the keys that a query sees at most, "memory" what one
    sequence holds at its end.

    \b
    Examples:
      coda eval ppl --model smollm2 --text book.txt --lengths 512,1024,2048
      coda eval ppl --lengths 32768 --policy bounded
      coda eval ppl --window 128 --exact-slots 64 --json
    """
    converted, tokenizer = options.load_converted(model, memory, gate, dtype=dtype, device=device)
    tokens = options.read_tokens(tokenizer, text)
    check_lengths(lengths, len(tokens))
    with options.progress_bar(len(policies) * tokens_to_read(tokens, lengths, max_tokens), "reading") as bar:
        rows = perplexity_rows(converted, tokens, lengths, policies, max_tokens=max_tokens, progress=bar.update)
    if as_json:
        options.print_json({"rows": rows})
    else:
        options.print_perplexity(rows)
