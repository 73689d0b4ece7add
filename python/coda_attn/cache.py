"""The bounded memory of a whole model as a transformers Cache: one State per layer, the same size whatever has been read."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .config import CodaConfig
from .state import State


class CodaCacheLayer(CacheLayerMixin):
    """The memory of one layer. ``state`` is None until the first tokens come."""

    def __init__(self, config: CodaConfig):
        super().__init__()
        self.config = config
        self.state: Optional[State] = None
        # Columns of the padded input seen so far, padding included: what generate() slices its inputs by.
        # How many tokens each row has really seen is state.tokens_seen.
        self.columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty memory for keys (N, Hkv, any, D) of this dtype and device."""
        sequences, num_kv_heads, _, head_dim = key_states.shape
        self.state = State.empty(sequences, num_kv_heads, head_dim, self.config, dtype=key_states.dtype,
                                 device=key_states.device)
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise TypeError(
            "CodaCache holds a bounded memory and returns no keys and values; it works with models converted by "
            "coda_attn.convert in bounded mode only. Use a DynamicCache, or none, with this model")

    def store(self, state: State, columns: int) -> None:
        """Takes the memory after ``columns`` more columns, into the storage held already unless autograd needs that."""
        if torch.is_grad_enabled() or any(t.requires_grad for t in self.state.tensors()):
            self.state = state
        else:
            self.state.copy_(state)
        self.columns += columns

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.state.sequences if self.is_initialized else -1

    def nbytes(self) -> int:
        return self.state.nbytes() if self.is_initialized else 0

    def reset(self) -> None:
        if self.is_initialized:
            with torch.no_grad():
                self.state = self.state.detach()
                for tensor in self.state.tensors():
                    tensor.zero_()
                self.state.exact_pos.fill_(-1)
        self.columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            index = beam_idx.to(self.state.k.device)
            self.state.copy_(self.state.map(lambda t: t.index_select(0, index)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.state = self.state.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.state = self.state.map(lambda t: t[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                f"a bounded memory cannot take back tokens (crop({tokens_to_remove}) was asked); it no longer holds what they "
                "displaced. Keep a copy.deepcopy of the cache from before them")

    def offload(self) -> None:
        if self.is_initialized:
            self.state = self.state.map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized and self.state.k.device != self.device:
            self.state = self.state.map(lambda t: t.to(self.device, non_blocking=True))


class CodaCache(Cache):
    """The ``past_key_values`` of a model converted by ``coda_attn.convert`` in bounded mode; ``generate`` makes one by itself.

    Args:
        config: the config of the converted model.
    """

    def __init__(self, config: PreTrainedConfig):
        memory = CodaConfig.from_dict(config.coda)
        super().__init__(layers=[CodaCacheLayer(memory) for _ in range(config.num_hidden_layers)])

    @property
    def states(self) -> list[State]:
        """The state of every layer. Raises ValueError before any token has been read."""
        if not self.is_initialized:
            raise ValueError("this cache has not read any token yet, so there is no state to take")
        return [layer.state for layer in self.layers]

    @property
    def batch_size(self) -> int:
        return self.layers[0].batch_size

    def nbytes(self) -> int:
        """Bytes held on the device, all layers and sequences together; 0 before the first token."""
        return sum(layer.nbytes() for layer in self.layers)

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.get_max_length(layer_idx)
