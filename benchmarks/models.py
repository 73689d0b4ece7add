"""Models and text for the benchmarks that read."""

from __future__ import annotations

from typing import Any

import click
import torch
from torch import Tensor, nn

from coda_attn import convert
from coda_attn.evaluation import default_text
from coda_attn.gates import load_gate, shipped_gate
from coda_attn.models import load_model


def load(name: str, device: torch.device) -> tuple[Any, Any]:
    """The plain model of this name, its attention SDPA, and its tokenizer."""
    try:
        model, tokenizer = load_model(name, device=device)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    model.set_attn_implementation("sdpa")
    return model, tokenizer


def bounded(model: nn.Module, name: str) -> nn.Module:
    """The model converted in place, with the gates that the package brings for it."""
    convert(model)
    gate = shipped_gate(name)
    return model if gate is None else load_gate(model, gate)


def tokens(tokenizer: Any, count: int) -> Tensor:
    """The first ``count`` tokens of the default text, (count,), from its start again where it is shorter."""
    ids = torch.tensor(tokenizer(default_text(), add_special_tokens=False)["input_ids"], dtype=torch.int64)
    return ids.repeat(-(-count // len(ids)))[:count]


def logits(model: nn.Module, ids: Tensor, cache: Any = None) -> Tensor:
    """Logits (L, vocabulary) of a row of tokens (L,), read after what ``cache`` holds."""
    hidden = model.get_decoder()(input_ids=ids[None], past_key_values=cache, use_cache=cache is not None).last_hidden_state
    return model.get_output_embeddings()(hidden)[0]
