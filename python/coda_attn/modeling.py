"""The layer that replaces a transformers attention layer, and the converted model and config classes."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, initialization as init
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import _CAN_RECORD_REGISTRY
from transformers.utils.import_utils import is_tracing

from . import functional as F
from .cache import CodaCache, CodaCacheLayer
from .config import CodaConfig
from .state import State

MODES = ("bounded", "full")
ATTENTION = "coda"
_INITIAL_LAMBDA_BIAS = -6.0
_INITIAL_ETA_LOGIT = -3.0


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not supported; choose one of {', '.join(map(repr, MODES))}")
    return mode


# --- padding ------------------------------------------------------------------------------------------------------------


class Packing(NamedTuple):
    """Where the real tokens of a padded batch (B, L) are. Tq real queries, Tk real keys; row-major, so in order in each row."""

    query: Tensor  #: (Tq,) int64, index into the B * Lq flattened queries
    row: Tensor  #: (Tq,) int64, batch row
    step: Tensor  #: (Tq,) int64, how many real queries of its row come before it
    cu_query: Tensor  #: (B + 1,) int64, cumulative number of real queries
    key: Tensor  #: (Tk,) int64, index into the B * Lk flattened keys, earlier calls included
    cu_key: Tensor  #: (B + 1,) int64, cumulative number of real keys


def _ends(mask: Tensor) -> Tensor:
    return nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))


def padding_packing(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
                    mask_function: Callable = causal_mask_function, attention_mask: Optional[Tensor] = None,
                    config: Any = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Optional[Packing]:
    """The mask function of converted models: None without padding, else where the real tokens are; never an L x L mask.

    A token is real where ``attention_mask`` (B, columns seen so far + new columns) is True; whatever lies between two real
    tokens of a row does not exist, so padding may stand left, right or in the middle. How many tokens are real decides shapes, so
    with a mask the host waits for the GPU, once for all layers; without one nothing here does.
    """
    bounded = config.coda_mode == "bounded"
    window = getattr(config, "sliding_window", None)
    if mask_function is not causal_mask_function and window is not None and not bounded and kv_length > window:
        raise ValueError(
            f"{kv_length} tokens were given to a model with sliding_window={window} in mode 'full', which attends to every "
            "token; use mode 'bounded', give fewer tokens, or set config.sliding_window=None where the model allows it")
    # transformers forbids the skip for whatever it adds to the causal mask; while a graph is traced, it adds a packed-sequence
    # mask whether or not anything is packed.
    if not allow_is_causal_skip and not is_tracing():
        raise ValueError(
            "several sequences in one row (position_ids that start again) or a custom mask function were asked; converted "
            "models support causal attention over one sequence per row. Give one sequence per row, padded, with attention_mask")
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but {batch_size} rows have seen {kv_length - q_length} "
            f"columns and get {q_length} more; give it for all columns, (B, seen + new) = {(batch_size, kv_length)}")
    query = attention_mask[:, kv_length - q_length:]
    # The bounded memory of earlier columns knows by itself what was padding there.
    key = query if bounded else attention_mask
    if not is_tracing(key) and bool(key.all()):
        return None
    cu_query = _ends(query)
    index = query.flatten().nonzero().squeeze(-1)
    row = index // q_length
    step = torch.arange(index.shape[0], device=index.device) - cu_query[row]
    if bounded:
        return Packing(index, row, step, cu_query, index, cu_query)
    return Packing(index, row, step, cu_query, key.flatten().nonzero().squeeze(-1), _ends(key))


def _unused_attention(module: nn.Module, *args: Any, **kwargs: Any):
    raise NotImplementedError(
        f"attention implementation {ATTENTION!r} belongs to models converted by coda_attn.convert, not to {type(module).__name__}")


AttentionInterface.register(ATTENTION, _unused_attention)
AttentionMaskInterface.register(ATTENTION, padding_packing)


# --- positions ----------------------------------------------------------------------------------------------------------


def rope_frequencies(config: Any) -> tuple[Tensor, float]:
    """The RoPE frequencies (D/2,) float64 on the CPU and the attention scaling of a model's config.

    They come from the config and not from the model's rotary module, whose buffer is rounded by ``model.to(dtype)``.
    Raises: ValueError for variants whose frequencies change with the length, and for a partial rotation.
    """
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported; "
                         "converted models rotate all of head_dim")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "default":
        return F.rope_inv_freq(head_dim, parameters["rope_theta"], device="cpu"), 1.0
    if kind in ("linear", "llama3", "yarn"):
        with torch.device("cpu"):  # from_pretrained builds models on the meta device
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        return inv_freq.double(), float(scaling)
    raise ValueError(f"rope_type={kind!r} is not supported: its frequencies are not fixed, and a bounded memory keeps rotated "
                     "keys; supported are 'default', 'linear', 'llama3' and 'yarn'")


# --- the layer ----------------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class ConstantLinear(nn.Linear):
    """A projection that starts as the constant ``initial_bias``, whatever its input."""

    def __init__(self, in_features: int, out_features: int, initial_bias: float, **factory: Any):
        self.initial_bias = initial_bias
        super().__init__(in_features, out_features, **factory)

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, self.initial_bias)


class _WideProduct(torch.autograd.Function):
    """x (..., E) times weight (G, E) transposed, both float16 or bfloat16 on a GPU, in float32 as its tensor cores sum it.

    torch.mm has this product but no derivative of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=torch.float32).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


class GateProjection(ConstantLinear):
    """Gate logits in float32 (float64 for a float64 model): in bfloat16 they would be coarser than the age decay."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = _wide(x.dtype)
        if x.dtype == self.weight.dtype == dtype and not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if x.is_cuda and x.dtype == self.weight.dtype != dtype:
            return _WideProduct.apply(x, self.weight) + self.bias
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class CodaAttention(nn.Module):
    """Differential attention over everything (mode "full") or over a bounded memory (mode "bounded").

    Takes the place of a transformers attention layer and keeps its q_proj, k_proj, v_proj, o_proj (and q_norm, k_norm) as
    they are, under their own names. The mode is ``config.coda_mode``; ``single_stream`` leaves the second stream out.

    Args:
        attention: the layer replaced; shapes come from it and from its config.
        coda: the memory. dtype, device: of the new parameters.
    """

    def __init__(self, attention: nn.Module, coda: CodaConfig, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.config, self.coda, self.layer_idx = attention.config, coda, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        heads, hkv = self.config.num_attention_heads, self.config.num_key_value_heads
        width = self.config.hidden_size
        factory = {"dtype": dtype, "device": device}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(attention, name))
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.lambda_proj, self.theta = None, None
        if coda.differential:
            self.lambda_proj = ConstantLinear(width, heads, _INITIAL_LAMBDA_BIAS, **factory)
            self.theta = nn.Parameter(torch.empty(heads, self.head_dim // 2, **factory))
        self.write_proj = GateProjection(width, coda.gate_groups(hkv), 0.0 if coda.policy == "retention" else -2.0, **factory)
        self.summary_eta_logit = nn.Parameter(torch.empty(hkv, **factory)) if coda.summary_slots else None
        self.head_norm = nn.RMSNorm(self.head_dim, eps=coda.norm_eps, **factory) if coda.head_norm == "rms" else None
        self.single_stream = False
        # Not a buffer: model.to(dtype) would round it.
        self._inv_freq, self._rope_scaling = rope_frequencies(self.config)
        self.reset_parameters()
        self.train(attention.training)

    def reset_parameters(self) -> None:
        """Initial values of the parameters that this layer itself holds: those already loaded stay."""
        if self.theta is not None:
            init.zeros_(self.theta)
        if self.summary_eta_logit is not None:
            init.constant_(self.summary_eta_logit, _INITIAL_ETA_LOGIT)

    def inv_freq(self, device: torch.device) -> Tensor:
        if self._inv_freq.device != device:
            self._inv_freq = self._inv_freq.to(device)
        return self._inv_freq

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        return F.apply_rope(x, positions, self.inv_freq(x.device), attention_scaling=self._rope_scaling)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., H, D), k and v (..., Hkv, D), not rotated yet, for x (..., E)."""
        q, k, v = (torch.unflatten(p(x), -1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        # Under autocast the norms give float32 and the projections do not.
        return q.to(v.dtype), k.to(v.dtype), v

    def streams(self, x: Tensor, q: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """lambda (..., H) and theta (H, D/2) for x (..., E), or None for one stream."""
        if self.lambda_proj is None or self.single_stream:
            return None, None
        return self.lambda_proj(x).sigmoid().to(q.dtype), self.theta

    @property
    def norm_weight(self) -> Optional[Tensor]:
        return None if self.head_norm is None else self.head_norm.weight

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Optional[Packing] = None,
                past_key_values: Any = None, position_ids: Optional[Tensor] = None, **kwargs: Any) -> tuple[Tensor, None]:
        """hidden_states (B, L, E) -> (attention output (B, L, E), None). Where there is padding the output is 0."""
        if attention_mask is not None and not isinstance(attention_mask, Packing):
            raise ValueError(f"a prepared attention mask of shape {tuple(attention_mask.shape)} was given; converted models support "
                             "a padding mask (B, columns), which they turn into positions themselves")
        attend = self._bounded if self.config.coda_mode == "bounded" else self._full
        return attend(hidden_states, attention_mask, past_key_values, position_ids), None

    def _scatter(self, y: Tensor, packing: Packing, rows: int, length: int) -> Tensor:
        """y (1, Tq, E) to its places in (B, L, E)."""
        return y.new_zeros(rows * length, y.shape[-1]).index_copy(0, packing.query, y[0]).view(rows, length, -1)

    def _full(self, x: Tensor, packing: Optional[Packing], cache: Any, position_ids: Optional[Tensor]) -> Tensor:
        if isinstance(cache, CodaCache):
            raise ValueError("a CodaCache was given in mode 'full'; it belongs to mode 'bounded'. Start again without "
                             "past_key_values, or coda_attn.set_mode(model, 'bounded')")
        if cache is not None and cache.is_compileable:
            raise ValueError(f"{type(cache).__name__} was given in mode 'full', which supports caches that grow (DynamicCache); "
                             "leave out past_key_values and cache_implementation")
        rows, length, _ = x.shape
        q, k, v = self.project(x)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
            position_ids = torch.arange(seen, seen + length, device=x.device)
        position_ids = position_ids.expand(rows, length)
        q, k = self.rope(q, position_ids), self.rope(k, position_ids)
        if cache is not None:
            k, v = (t.transpose(1, 2) for t in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
        lam, theta = self.streams(x, q)
        options = {"scale": self.scaling, "norm_weight": self.norm_weight, **self.coda.attention_args()}
        if packing is None:
            return self.o_proj(F.diff_attention(q, k, v, lam, theta, **options).flatten(-2))
        q, lam = (None if t is None else t.flatten(0, 1)[packing.query] for t in (q, lam))
        k, v = (t.flatten(0, 1)[packing.key] for t in (k, v))
        y = F.diff_attention(q, k, v, lam, theta, cu_seqlens_q=packing.cu_query, cu_seqlens_k=packing.cu_key, **options)
        return self._scatter(self.o_proj(y.flatten(-2)[None]), packing, rows, length)

    def _bounded(self, x: Tensor, packing: Optional[Packing], cache: Any, position_ids: Optional[Tensor]) -> Tensor:
        rows, length, _ = x.shape
        memory = self._memory(cache, rows)
        if memory is not None and memory.is_initialized and packing is None and length == 1 and not torch.is_grad_enabled():
            return self._decode(x, memory)
        if packing is not None:
            x = x.flatten(0, 1)[packing.query][None]
        q, k, v = self.project(x)
        if memory is None:
            state = State.empty(rows, k.shape[2], self.head_dim, self.coda, dtype=k.dtype, device=k.device)
        else:
            if not memory.is_initialized:
                memory.lazy_initialization(k.new_empty(rows, k.shape[2], 0, self.head_dim), v)
            state = memory.state
        if packing is None:
            positions = state.tokens_seen[:, None]
            if length > 1:
                positions = positions + torch.arange(length, device=x.device)
        else:
            positions = (state.tokens_seen[packing.row] + packing.step)[None]
        q, k = self.rope(q, positions), self.rope(k, positions)
        lam, theta = self.streams(x, q)
        gate, cu_seqlens = self.write_proj(x), None
        if packing is not None:
            cu_seqlens = packing.cu_query
            q, k, v, lam, gate = (None if t is None else t.squeeze(0) for t in (q, k, v, lam, gate))
        y, state = F.bounded_attention(q, k, v, lam, theta, gate, state, cu_seqlens=cu_seqlens, **self._memory_options(x.device))
        if memory is not None:
            memory.store(state, length)
        y = self.o_proj((y if packing is None else y[None]).flatten(-2))
        return y if packing is None else self._scatter(y, packing, rows, length)

    def _decode(self, x: Tensor, memory: CodaCacheLayer) -> Tensor:
        """``_bounded`` for one token of every row. It runs so often that what it does not need, such as a dimension for the
        tokens, would show in the time of a step."""
        x = x.squeeze(1)
        q, k, v = self.project(x)
        seen = memory.state.tokens_seen
        q, k = self.rope(q, seen), self.rope(k, seen)
        y = F.decode_step_(q, k, v, *self.streams(x, q), self.write_proj(x), memory.state, **self._memory_options(x.device))
        memory.columns += 1
        return self.o_proj(y.flatten(-2)).unsqueeze(1)

    def _memory_options(self, device: torch.device) -> dict[str, Any]:
        """The keyword arguments that the ops over a bounded memory share."""
        return {"inv_freq": self.inv_freq(device), "config": self.coda, "norm_weight": self.norm_weight,
                "eta_logit": self.summary_eta_logit, "scale": self.scaling}

    def _memory(self, cache: Any, rows: int) -> Optional[CodaCacheLayer]:
        if cache is None:
            return None
        if not isinstance(cache, CodaCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}, which keeps every key; mode 'bounded' needs a CodaCache. "
                             "Leave past_key_values out, or make one with coda_attn.cache.CodaCache(model.config)")
        memory = cache.layers[self.layer_idx]
        if memory.config is not self.coda:
            if memory.config != self.coda:
                raise ValueError("this cache was made with another CodaConfig than the model has now; start with a new one")
            memory.config = self.coda  # the same object next time: comparing all fields at every token takes a while
        if memory.is_initialized and memory.state.sequences != rows:
            raise ValueError(f"{rows} rows were given with a cache of {memory.state.sequences} sequences; "
                             "use the cache with the batch that it was made for")
        return memory


def coda_layers(model: nn.Module) -> list[CodaAttention]:
    """The converted attention layers of a model, in order. Raises ValueError where there are none."""
    layers = [module for module in model.modules() if isinstance(module, CodaAttention)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has not been converted; call coda_attn.convert(model) first")
    return layers


# --- models -------------------------------------------------------------------------------------------------------------


def install(base: nn.Module, coda: CodaConfig) -> None:
    """Replaces the attention layers of a base model (LlamaModel, ...); all or none."""
    replacements = []
    for layer in base.layers:
        plain = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        dtype = next(p.dtype for p in layer.parameters() if p.dtype in plain)
        device = next(layer.self_attn.parameters()).device
        replacements.append(CodaAttention(layer.self_attn, coda, dtype=dtype, device=device))
    for layer, replacement in zip(base.layers, replacements):
        layer.self_attn = replacement


class _CodaModelMixin:
    """What a converted model does differently from the transformers model that it was."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: Optional[str], *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, ATTENTION):
            raise ValueError(f"attn_implementation={attn_implementation!r} was asked; a converted model has its own attention. "
                             "Leave attn_implementation out")
        return ATTENTION

    def _init_weights(self, module: nn.Module) -> None:
        # Through transformers.initialization, which leaves what was loaded alone.
        if isinstance(module, (ConstantLinear, CodaAttention)):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class _CodaBaseMixin(_CodaModelMixin):
    """The base model: makes a CodaCache where the plain model would make a DynamicCache."""

    def __init__(self, config: Any):
        super().__init__(config)
        install(self, CodaConfig.from_dict(config.coda))
        self.post_init()

    def forward(self, input_ids: Optional[Tensor] = None, attention_mask: Optional[Tensor] = None,
                position_ids: Optional[Tensor] = None, past_key_values: Any = None, inputs_embeds: Optional[Tensor] = None,
                use_cache: Optional[bool] = None, **kwargs: Any):
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True was asked; converted models never hold attention probabilities. Leave it out")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None and self.config.coda_mode == "bounded":
            past_key_values = CodaCache(self.config)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                               past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)


class _CodaCausalMixin(_CodaModelMixin):
    """The language model: generate() with a bounded memory."""

    def __init__(self, config: Any):
        super().__init__(config)
        # The constructor above builds the plain base model by its own name.
        self.model.__class__ = _FAMILIES[type(config)].base
        install(self.model, CodaConfig.from_dict(config.coda))
        self.post_init()

    @property
    def _is_stateful(self) -> bool:
        return self.config.coda_mode == "bounded"

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        asked = generation_config.cache_implementation
        if asked is not None and (self.config.coda_mode == "bounded" or asked not in ("dynamic", "offloaded")):
            raise ValueError(f"cache_implementation={asked!r} was asked; in mode {self.config.coda_mode!r} a converted model brings "
                             "its own cache. Leave cache_implementation out")
        if self.config.coda_mode == "bounded" and model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = CodaCache(self.config)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        raise NotImplementedError("generate_batch keeps keys in pages, which a bounded memory does not have; "
                                  "use generate with a padded batch and its attention_mask")


class Family(NamedTuple):
    """The classes of one converted model family."""

    config: type
    base: type
    causal: type


def _make_family(name: str) -> Family:
    plain_config = getattr(transformers, f"{name}Config")
    plain_base, plain_causal = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}ForCausalLM")

    class Config(plain_config):
        model_type = f"coda_{plain_config.model_type}"
        coda: dict | None = None
        coda_mode: str = "bounded"

        def __post_init__(self, **kwargs: Any) -> None:
            self.coda = CodaConfig.from_dict(self.coda or {}).to_dict()
            check_mode(self.coda_mode)
            super().__post_init__(**kwargs)

    class Base(_CodaBaseMixin, plain_base):
        config_class = Config
        _can_record_outputs = {k: v for k, v in plain_base._can_record_outputs.items() if k != "attentions"}

    class Causal(_CodaCausalMixin, plain_causal):
        config_class = Config
        _can_record_outputs = Base._can_record_outputs

    for cls, suffix in ((Config, "Config"), (Base, "Model"), (Causal, "ForCausalLM")):
        cls.__name__ = cls.__qualname__ = f"Coda{name}{suffix}"
        cls.__doc__ = f"{name}{suffix} converted by coda_attn.convert; ``config.coda`` is its CodaConfig, ``config.coda_mode`` its mode."
        globals()[cls.__name__] = cls
    for cls in (Base, Causal):
        # Filled by the constructor otherwise, which convert() does not run.
        _CAN_RECORD_REGISTRY[str(cls)] = cls._can_record_outputs
    AutoConfig.register(Config.model_type, Config)
    AutoModel.register(Config, Base)
    AutoModelForCausalLM.register(Config, Causal)
    family = Family(Config, Base, Causal)
    PLAIN[plain_base], PLAIN[plain_causal] = family, family
    _FAMILIES[Config] = family
    return family


PLAIN: dict[type, Family] = {}  #: transformers class -> its converted family
_FAMILIES: dict[type, Family] = {}
SUPPORTED = ("Mistral", "Llama", "Qwen2", "Qwen3")
for _name in SUPPORTED:
    _make_family(_name)
