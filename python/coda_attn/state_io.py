"""Files: bounded memories as safetensors with a versioned header, and the paper's published adapter checkpoints."""

from __future__ import annotations

import json
import os
import re
import tempfile
from typing import Any, Sequence

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import CodaConfig
from .state import FIELDS, State

_FORMAT, _VERSION = "coda-state", "1"
_KEY_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def save_state(path: str | os.PathLike, states: State | Sequence[State], config: CodaConfig) -> None:
    """Writes the memories of one layer or of all layers of a model to one safetensors file.

    Args:
        path: written as a temporary file beside it and renamed, so a file of this name is always complete.
        states: one State, or one per layer (``CodaCache.states``), all of the same number of sequences.
        config: the configuration that made them; it is stored and checked when the file is read.
    Raises: ValueError when the states do not fit the configuration or each other.
    """
    states = [states] if isinstance(states, State) else list(states)
    if not states:
        raise ValueError("save_state needs at least one State; got none")
    tensors = {f"{i}.{name}": t.detach().contiguous().cpu() for i, state in enumerate(states)
               for name, t in zip(FIELDS, state.tensors())}
    _check_layout({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, len(states), config)
    header = {"format": _FORMAT, "version": _VERSION, "layers": str(len(states)), "config": json.dumps(config.to_dict())}
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_state(path: str | os.PathLike, *, device: torch.device | str = "cpu") -> tuple[list[State], CodaConfig]:
    """Reads what ``save_state`` wrote: the states, one per layer, and their configuration.

    The header, every name, shape and dtype are checked before a tensor is read, the counters after.
    Raises: ValueError for a file that is not one of ours, of another version, damaged, or inconsistent.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a saved CoDA state; save one with coda_attn.state_io.save_state")
            if header.get("version") != _VERSION:
                raise ValueError(f"{path} has state format version {header.get('version')}; this library reads version {_VERSION}")
            config, layers = _read_header(path, header)
            slices = {name: file.get_slice(name) for name in file.keys()}
            layout = {name: (tuple(s.get_shape()), _dtype(s.get_dtype())) for name, s in slices.items()}
            _check_layout(layout, layers, config, str(path))
            states = [State(*(file.get_tensor(f"{i}.{name}") for name in FIELDS)) for i in range(layers)]
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from None
    for i, state in enumerate(states):
        _check_counters(state, f"{path}: layer {i}")
    return states, config


def _read_header(path: Any, header: dict[str, str]) -> tuple[CodaConfig, int]:
    try:
        config = CodaConfig.from_dict(json.loads(header["config"]))
        layers = int(header["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a damaged state header ({error})") from None
    if layers < 1:
        raise ValueError(f"{path} has a damaged state header (layers={layers})")
    return config, layers


def _dtype(name: str) -> torch.dtype | str:
    return {**_KEY_DTYPES, "I64": torch.int64}.get(name, name)


def _check_layout(layout: dict[str, tuple[tuple[int, ...], Any]], layers: int, config: CodaConfig,
                  what: str = "the state") -> None:
    """Every name, shape and dtype against an empty state of the same configuration, nothing allocated."""
    shape, dtype = layout.get("0.k", ((), None))
    if len(shape) != 4 or dtype not in _KEY_DTYPES.values():
        raise ValueError(f"{what}: 0.k has shape {shape} and dtype {dtype}; expected (N, Hkv, W + Me, D) of a float dtype")
    try:
        empty = State.empty(shape[0], shape[1], shape[3], config, dtype=dtype, device="meta")
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    expected = {f"{i}.{name}": (tuple(t.shape), t.dtype) for i in range(layers) for name, t in zip(FIELDS, empty.tensors())}
    for name in sorted(expected.keys() ^ layout.keys()):
        raise ValueError(f"{what}: tensor {name} is {'missing' if name in expected else 'unknown'} "
                         f"for {layers} layer(s) of {', '.join(FIELDS)}")
    for name, (shape, dtype) in expected.items():
        if layout[name] != (shape, dtype):
            raise ValueError(f"{what}: {name} has shape {layout[name][0]} and dtype {layout[name][1]}, but the configuration "
                             f"(window={config.window}, exact_slots={config.exact_slots}, summary_slots={config.summary_slots}, "
                             f"gates={config.gates!r}, policy={config.policy!r}) needs {shape} and {dtype}")


def _check_counters(state: State, what: str) -> None:
    seen = state.tokens_seen
    if bool((seen < 0).any()):
        raise ValueError(f"{what}: tokens_seen is negative; the file is damaged")
    limits = {"exact_pos": (-1, state.exact_pos), "last_touch": (0, state.last_touch)}
    for name, (least, value) in limits.items():
        reach = seen.view(-1, *[1] * (value.dim() - 1)).clamp(min=1)
        if bool(((value < least) | (value >= reach)).any()):
            raise ValueError(f"{what}: {name} names a position that was never read; the file is damaged")
    if bool((state.summary_mass < 0).any()) or not bool(state.summary_mass.isfinite().all()):
        raise ValueError(f"{what}: summary_mass is not a finite number >= 0; the file is damaged")


def load_adapters(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Loads the paper's published checkpoint into a converted model, in place, and returns the model.

    The file is what ``torch.save`` wrote of ``{"layer_0": {"coda.q_proj.weight": tensor, ...}, "layer_1": ...}``, alone or
    under one key of an outer dictionary. It is read with ``weights_only=True``, so nothing in it is executed.
    Everything is checked before anything changes:

    - The file has exactly the model's layers, and each exactly the tensors of the layer: ``q_proj.weight k_proj.weight
      v_proj.weight o_proj.weight theta lambda_proj.weight lambda_proj.bias write_proj.weight write_proj.bias`` (and biases,
      ``head_norm.weight`` and ``summary_eta_logit`` where the layer has them). ``q_norm`` and ``k_norm`` may be
      absent: the model keeps its own. ``summary_eta_logit`` may be present for a layer without summary slots, which has no
      use for it.
    - A write gate shared by all heads, (1, E), goes into a layer with per-head gates as the same gate for every KV head.
    - The published checkpoints turn interleaved pairs by theta. A model converted with ``theta_pairs="half"`` is refused
      unless all angles are zero, where the pairing makes no difference.

    Raises: ValueError naming the layer and the tensor, what was found and what is needed.
    """
    from .modeling import coda_layers

    layers = coda_layers(model)
    saved = _adapter_layers(torch.load(path, map_location="cpu", weights_only=True), path)
    expected = [f"layer_{i}" for i in range(len(layers))]
    if sorted(saved) != sorted(expected):
        raise ValueError(f"{path} holds {len(saved)} layers ({', '.join(sorted(saved)[:3])}, ...), the model has {len(layers)}; "
                         "load the checkpoint into the model that it was made from")
    updates = []
    for name, layer in zip(expected, layers):
        updates += _match_adapter(saved[name], layer, f"{path}: {name}")
    with torch.no_grad():
        for target, value in updates:
            target.copy_(value)
    return model


def _adapter_layers(content: Any, path: Any) -> dict[str, dict[str, Tensor]]:
    """The dictionary of layers, itself or one level down."""
    candidates = [content, *content.values()] if isinstance(content, dict) else []
    for candidate in candidates:
        if isinstance(candidate, dict):
            layers = {k: v for k, v in candidate.items() if isinstance(k, str) and re.fullmatch(r"layer_\d+", k)}
            if layers:
                return layers
    raise ValueError(f"{path} is not an adapter checkpoint: no 'layer_0', 'layer_1', ... in it, at the top or one level down")


def _match_adapter(saved: Any, layer: nn.Module, what: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a layer's own tensor and the value it gets."""
    if not isinstance(saved, dict) or not all(isinstance(v, Tensor) for v in saved.values()):
        raise ValueError(f"{what} is not a dictionary of tensors")
    saved = {name.removeprefix("coda."): value for name, value in saved.items()}
    own = layer.state_dict(keep_vars=True)
    if "summary_eta_logit" not in own:
        saved.pop("summary_eta_logit", None)
    optional = {"q_norm.weight", "k_norm.weight"}
    missing, unknown = sorted(own.keys() - saved.keys() - optional), sorted(saved.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"{what} does not fit the model: missing {', '.join(missing) or 'nothing'}, unknown {', '.join(unknown) or 'nothing'}. "
            "Convert with the checkpoint's own differential, head_norm and summary_slots, and load it before quantizing or "
            "adding other adapters")
    theta = saved.get("theta")
    if theta is not None and layer.coda.theta_pairs == "half" and bool((theta != 0).any()):
        raise ValueError(f"{what}.theta turns interleaved pairs, but the model was converted with theta_pairs='half'; convert "
                         "with CodaConfig(theta_pairs='interleaved')")
    pairs = []
    for name, value in saved.items():
        target = own[name]
        if name.startswith("write_proj.") and value.shape[:1] == (1,) and value.shape[1:] == target.shape[1:]:
            value = value.expand(target.shape)
        if value.shape != target.shape:
            raise ValueError(f"{what}.{name} has shape {tuple(value.shape)}, the model needs {tuple(target.shape)}")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{what}.{name} is not a tensor of finite floating-point numbers")
        pairs.append((target, value))
    return pairs
