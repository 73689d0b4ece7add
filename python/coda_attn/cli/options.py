"""Options, arguments and output that several commands share."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing
from typing import Any, Callable, Optional, Sequence

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..config import CodaConfig
from ..convert import convert, reconfigure
from ..evaluation import default_text, read_text
from ..gates import load_gate, shipped_gate
from ..modeling import CodaAttention
from ..models import load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_PRESETS = {
    **{name: lambda name=name: CodaConfig.preset(name) for name in ("small", "medium", "large")},
    **{f"paper-{name}": lambda name=name: CodaConfig.paper(name) for name in ("tiny", "medium", "large")},
}
_FIELD_HELP = {
    "window": "Tokens in the ring.",
    "chunk": "Tokens that leave the ring together; divides --window.",
    "exact_slots": "Tokens kept beyond the window, sinks included.",
    "summary_slots": "Averages of tokens; needs --gates shared.",
    "policy": "Which tokens are kept.",
    "gates": "One choice of tokens per KV head, or one for all.",
    "num_sinks": "First tokens, kept for ever.",
    "age_decay": "Preference for recent tokens, per token of age.",
    "bank_distance": "Distance at which kept tokens are read, or 'none' for where they stood.",
    "differential": "Two streams or one.",
    "gate_bias": "Add the log gate of a kept token to its logit.",
    "mass_bias": "Add the log mass of a summary to its logit.",
    "exact_candidates": "Candidates per chunk (novelty_lru).",
    "tau_exact": "Least gate of a candidate for an exact slot.",
    "tau_summary": "Least gate of a candidate for a summary.",
    "tau_novel": "Cosine below which a candidate is new.",
    "tau_match": "Cosine from which a candidate may replace its match.",
    "tau_spawn": "Cosine below which a candidate starts a summary.",
    "refresh_on_hit": "A match replaces what it matched (novelty_lru).",
    "summary_routing": "What summaries are compared by.",
    "theta_pairs": "Dimensions that theta turns together.",
    "rope_pairs": "Dimensions that RoPE turns together.",
    "head_norm": "Norm of each head's output.",
    "norm_eps": "Epsilon of that norm.",
}


class _CommaList(click.ParamType):
    """Comma-separated values of one type."""

    def __init__(self, item: click.ParamType):
        self.item, self.name = item, f"{item.name},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Any]:
        if isinstance(value, list):
            return value
        return [self.item.convert(part.strip(), param, ctx) for part in value.split(",")]

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> Optional[str]:
        inner = self.item.get_metavar(param, ctx)
        return f"{inner or self.item.name.upper()},..."


class _IntegerOrNone(click.ParamType):
    name = "integer|none"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if value == "none" else click.INT.convert(value, param, ctx)


def integers() -> click.ParamType:
    return _CommaList(click.INT)


def choices(*names: str) -> click.ParamType:
    return _CommaList(click.Choice(names))


def _stack(*decorators: Callable) -> Callable:
    def apply(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function
    return apply


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, and nothing else there.")
text_option = click.option("--text", type=click.Path(dir_okay=False), metavar="FILE",
                           help="UTF-8 text to read.  [default: the topics of Python's own help]")
dtype_option = click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True,
                            callback=lambda context, option, value: DTYPES[value])
model_options = _stack(
    click.option("--model", default="smollm2", show_default=True, metavar="NAME|FOLDER",
                 help="smollm2, random:mistral-tiny, or a folder in the transformers format."),
    dtype_option,
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...",
                 callback=lambda context, option, value: _device(value)))
gate_option = click.option("--gate", default="auto", show_default=True, metavar="FILE|auto|none",
                           help="Calibrated gates. auto: those the package brings for the model, if it has any.")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise click.BadParameter(f"{name!r} is not a device; give cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter(f"{name!r} was asked, but torch finds no CUDA device here; use cpu")
    return device


def memory_options(function: Callable) -> Callable:
    """--preset and an option for every field of CodaConfig; the command gets ``memory``, a dictionary for ``memory_config``."""
    fields = dataclasses.fields(CodaConfig)
    hints = typing.get_type_hints(CodaConfig)

    def command(**arguments: Any) -> Any:
        given = {field.name: arguments.pop(f"memory_{field.name}") for field in fields}
        memory = {name: value for name, value in given.items() if value is not None}
        if memory.get("bank_distance") == "none":
            memory["bank_distance"] = None
        return function(memory={"preset": arguments.pop("preset"), "fields": memory}, **arguments)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__click_params__ = getattr(function, "__click_params__", [])
    options = [click.option("--preset", type=click.Choice(list(_PRESETS)),
                            help="Memory to start from.  [default: the model's own, else medium]")]
    for field in fields:
        # --policy is how eval and generate read.
        flag = "--" + {"policy": "bank-policy"}.get(field.name, field.name).replace("_", "-")
        kind = {"bank_distance": _IntegerOrNone()}.get(field.name, hints[field.name])
        if kind in (bool, Optional[bool]):
            flag, kind = f"{flag}/--no-{flag[2:]}", bool
        options.append(click.option(flag, f"memory_{field.name}", type=kind, default=None,
                                    help=_FIELD_HELP[field.name]))
    return _stack(*options)(command)


def memory_config(memory: dict[str, Any], base: CodaConfig = CodaConfig()) -> CodaConfig:
    """The memory that ``memory_options`` asked for, starting from ``base`` where no preset was given."""
    start = _PRESETS[memory["preset"]]() if memory["preset"] else base
    fields = dict(memory["fields"])
    if fields.get("policy", start.policy) != start.policy:
        # Its default depends on the policy.
        fields.setdefault("gate_bias", None)
    return dataclasses.replace(start, **fields)


def load_converted(name: str, memory: dict[str, Any], gate: str, *, dtype: torch.dtype = torch.float32,
                   device: torch.device | str = "cpu", quiet: bool = False) -> tuple[nn.Module, Any]:
    """The model of this name, converted to the memory asked for unless it was, with its gates, and its tokenizer."""
    model, tokenizer = load_model(name, dtype=dtype, device=device)
    layers = [module for module in model.modules() if isinstance(module, CodaAttention)]
    if layers:
        config = memory_config(memory, layers[0].coda)
        if config != layers[0].coda:
            reconfigure(model, config)
    else:
        config = memory_config(memory)
        convert(model, config)
    path = shipped_gate(name) if gate == "auto" else None if gate == "none" else pathlib.Path(gate)
    if path is not None and (gate != "auto" or config.gates == "per_head"):
        load_gate(model, path)
    elif not layers and not quiet:
        click.echo("coda: the gates are at their initial constant, so the memory keeps recent tokens only; "
                   "coda calibrate makes gates for this model", err=True)
    return model, tokenizer


def read_tokens(tokenizer: Any, path: Optional[str]) -> Tensor:
    """Token ids (T,) of a text file, or of the default text; no special tokens."""
    text = default_text() if path is None else read_text(path)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def progress_bar(total: int, label: str, unit: str = " tokens") -> tqdm:
    """On standard error, and only where somebody watches."""
    return tqdm(total=total, desc=label, unit=unit, unit_scale=True, disable=None, leave=False)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        click.echo("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))


def print_perplexity(rows: Sequence[dict[str, Any]]) -> None:
    """A table of perplexity_rows with the distance to full attention where that was measured."""
    full = {row["length"]: row["ppl"] for row in rows if row["policy"] == "full"}
    print_table(
        ["policy", "length", "perplexity", "above full", "slots", "memory", "tokens"],
        [[row["policy"], row["length"], f"{row['ppl']:.3f}",
          f"{100 * (row['ppl'] / full[row['length']] - 1):+.1f} %" if row["length"] in full else "",
          row["slots"], megabytes(row["state_bytes"]), row["tokens"]] for row in rows])


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
