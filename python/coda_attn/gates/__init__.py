"""Calibrated gates: small safetensors files with the gate projection of every layer, and a JSON card beside each.

The package ships one for SmolLM2-135M-Instruct; its card says by which command and rows it was made and what it gives.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import new_file
from ..modeling import coda_layers
from ..models import SMOLLM2

_FORMAT, _VERSION = "coda-gate", "1"
_SHIPPED = {SMOLLM2: "smollm2-135m.safetensors"}


def shipped_gate(model_name: str) -> Optional[pathlib.Path]:
    """The gate that the package brings for a model known by this name, or None."""
    return pathlib.Path(__file__).parent / _SHIPPED[model_name] if model_name in _SHIPPED else None


def card_path(path: str | os.PathLike) -> pathlib.Path:
    """Where the card of a gate file is: beside it, ending in .json."""
    return pathlib.Path(path).with_suffix(".json")


def save_gate(model: nn.Module, path: str | os.PathLike, card: dict[str, Any]) -> None:
    """Writes the gates of a converted model in float32, and their card beside them.

    Args:
        path: the safetensors file. card: how the gates were made, as JSON values.
    Raises: ValueError when the model is not converted or the files cannot be written.
    """
    tensors = {f"{i}.{name}": getattr(layer.write_proj, name).detach().float().cpu().contiguous()
               for i, layer in enumerate(coda_layers(model)) for name in ("weight", "bias")}
    with new_file(path) as partial:
        save_file(tensors, partial, metadata={"format": _FORMAT, "version": _VERSION})
    with new_file(card_path(path)) as partial:
        partial.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load_gate(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Gives a converted model the gates in a file, in place, and returns the model. Nothing changes unless all of it fits.

    Raises: ValueError when the file is missing, damaged or not a gate, or was made for another model or gate layout.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read gates from {path} ({error}); make a gate file with coda calibrate") from None
    if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"{path} is not a gate file of format {_FORMAT} {_VERSION}; make one with coda calibrate")
    targets = {f"{i}.{name}": getattr(layer.write_proj, name) for i, layer in enumerate(coda_layers(model))
               for name in ("weight", "bias")}
    found, needed = ({name: tuple(t.shape) for name, t in group.items()} for group in (tensors, targets))
    if found != needed:
        raise ValueError(f"the gates in {path} do not fit the model: the file holds {len(found) // 2} layers of "
                         f"{found.get('0.weight')}, the model needs {len(needed) // 2} of {needed['0.weight']} (gates, width); "
                         "calibrate this model with these gates")
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} holds numbers that are not finite; the file is damaged")
    for name, target in targets.items():
        target.copy_(tensors[name])
    return model
