"""Turning a transformers model into a bounded one, in place."""

from __future__ import annotations

import dataclasses

from torch import nn

from .config import CodaConfig
from .modeling import ATTENTION, PLAIN, SUPPORTED, CodaAttention, check_mode, coda_layers, install, rope_frequencies

_SHAPING = ("differential", "gates", "head_norm", "theta_pairs")


def convert(model: nn.Module, config: CodaConfig = CodaConfig(), mode: str = "bounded") -> nn.Module:
    """Replaces every attention layer of a Mistral, Llama, Qwen2 or Qwen3 model by a CodaAttention; returns the model.

    The projections stay the model's own modules, quantized or wrapped by LoRA or not. The new parameters start such that the
    model attends as before but for a factor sigmoid(-6) = 0.0025 of the second stream: theta 0, lambda bias -6, gate weight and bias 0
    (bias -2 with ``policy="novelty_lru"``); ``calibrate`` or training gives the gate its meaning. The model's class becomes
    ``Coda<Family>ForCausalLM`` (or ``Coda<Family>Model``), so that ``save_pretrained`` and, after ``import coda_attn``,
    ``AutoModelForCausalLM.from_pretrained`` work.

    Args:
        model: a transformers model, or a PEFT model around one.
        config: the memory; ``CodaConfig()`` is 384 slots.
        mode: ``"bounded"`` (fixed memory) or ``"full"`` (all tokens, a cache that grows).
    Raises: ValueError, with the model unchanged, for another family, a model converted before, RoPE variants whose
        frequencies change with the length, and an unknown mode.
    """
    check_mode(mode)
    inner = _inner(model)
    if any(isinstance(module, CodaAttention) for module in inner.modules()):
        raise ValueError(f"{type(inner).__name__} has been converted already; use set_mode(model, mode) to change its mode and "
                         "reconfigure(model, config) to change its memory")
    family = PLAIN.get(type(inner))
    if family is None:
        raise ValueError(f"{type(inner).__name__} is not supported; supported are "
                         + ", ".join(f"{name}ForCausalLM and {name}Model" for name in SUPPORTED))
    if config.rope_pairs != "half":
        raise ValueError(f"rope_pairs={config.rope_pairs!r} is not supported for transformers models; they rotate 'half' pairs")
    rope_frequencies(inner.config)
    base = getattr(inner, "model", inner)
    install(base, config)
    # The config object is shared by all modules of the model, so it changes class where it is.
    inner.config.__class__ = family.config
    inner.config.coda, inner.config.coda_mode = config.to_dict(), mode
    inner.config._attn_implementation = ATTENTION
    base.__class__ = family.base
    if inner is not base:
        inner.__class__ = family.causal
    return model


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Switches a converted model between ``"bounded"`` and ``"full"``; returns the model. Start with a new cache after it."""
    check_mode(mode)
    coda_layers(model)
    _inner(model).config.coda_mode = mode
    return model


def reconfigure(model: nn.Module, config: CodaConfig) -> nn.Module:
    """Gives a converted model another memory, in place; returns the model. Caches made before it cannot be used any more.

    Raises: ValueError when the new configuration needs other parameters than the model has: another ``differential``, ``gates``,
        ``head_norm`` or ``theta_pairs``, or summary slots where there were none (or none where there were some).
    """
    layers = coda_layers(model)
    old = layers[0].coda
    changed = [name for name in _SHAPING if getattr(old, name) != getattr(config, name)]
    changed += ["summary_slots"] if bool(old.summary_slots) != bool(config.summary_slots) else []
    changed += ["rope_pairs"] if config.rope_pairs != old.rope_pairs else []
    if changed:
        wanted = ", ".join(f"{name}={getattr(old, name)!r} to {getattr(config, name)!r}" for name in changed)
        raise ValueError(f"changing {wanted} changes the layer's parameters or their meaning; "
                         "convert the original model with this configuration instead")
    for layer in layers:
        # The norm's epsilon is read from the configuration, its module only holds the weight.
        layer.coda = dataclasses.replace(config)
    _inner(model).config.coda = config.to_dict()
    return model


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
