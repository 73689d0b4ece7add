"""A gate in closed form: ridge regression from the layer input to the attention that a token will get from afar (semantics 3.9)."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .modeling import CodaAttention, coda_layers

_PEAK_SHARE, _PEAK_WEIGHT, _RIDGE, _FLOOR = 0.1, 50.0, 1e-3, 1e-6
_BLOCK_ELEMENTS = 1 << 26  # attention probabilities held at once


def key_attention(q: Tensor, k: Tensor, window: int, *, scale: float, block: int = 256,
                  shared: bool = False) -> tuple[Tensor, Tensor]:
    """How much attention each key gets from queries at distance >= ``window``, causal softmax over all keys.

    Args:
        q: (B, L, H, D) and k: (B, L, Hkv, D), rotated. block: queries per step; no L x L tensor exists.
        shared: sum over all query heads, not over those of one KV head.
    Returns: per key, from the probability summed over query heads: the mean over those queries and the maximum, each
        (B, Hkv or 1, L - window), for the keys that have such a query.
    """
    (rows, length, heads, dim), hkv = q.shape, k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.to(dtype).view(rows, length, hkv, heads // hkv, dim).permute(0, 2, 3, 1, 4) * scale
    key = k.to(dtype).permute(0, 2, 3, 1)[:, :, None]
    mean = query.new_zeros(rows, 1 if shared else hkv, length - window)
    peak = torch.zeros_like(mean)
    position = torch.arange(length, device=q.device)
    block = max(1, min(block, _BLOCK_ELEMENTS // (rows * heads * length)))
    for start in range(window, length, block):
        stop = min(start + block, length)
        distance = position[start:stop, None] - position[:stop]
        logits = (query[:, :, :, start:stop] @ key[..., :stop]).masked_fill_(distance < 0, float("-inf"))
        far = logits.softmax(-1)[..., :stop - window].sum(2).masked_fill_(distance[:, :stop - window] < window, 0.0)
        far = far.sum(1, keepdim=True) if shared else far
        mean[..., :stop - window] += far.sum(-2)
        peak[..., :stop - window] = torch.maximum(peak[..., :stop - window], far.amax(-2))
    return mean / (length - window - position[:length - window]), peak


class _Fit:
    """The sums of one layer's weighted regressions, one per gate group, float64."""

    def __init__(self, width: int, groups: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count, self.x = 0, zeros(width)
        self.w, self.wx, self.wxx = zeros(groups), zeros(groups, width), zeros(groups, width, width)
        self.wy, self.wyy, self.wxy = zeros(groups), zeros(groups), zeros(groups, width)

    def add(self, x: Tensor, mean: Tensor, peak: Tensor) -> None:
        """x (N, E); mean and peak (R, N)."""
        x, mean, peak = x.double(), mean.double(), peak.double()
        y = torch.log(mean + _PEAK_SHARE * peak + _FLOOR)
        weight = 1.0 + _PEAK_WEIGHT * peak
        self.count += x.shape[0]
        self.x += x.sum(0)
        self.w += weight.sum(-1)
        self.wx += weight @ x
        self.wy += (weight * y).sum(-1)
        self.wyy += (weight * y * y).sum(-1)
        self.wxy += (weight * y) @ x
        for group, row in enumerate(weight):
            self.wxx[group].addmm_(x.mT * row, x)

    def solve(self) -> tuple[Tensor, Tensor, list[float]]:
        """Weight (R, E) and bias (R), under which the mean logit of all tokens seen is 0, and the weighted R^2 per group."""
        x_mean, y_mean = self.wx / self.w[:, None], self.wy / self.w
        # The intercept is left out of the ridge by centring.
        gram = self.wxx - self.w[:, None, None] * x_mean[:, :, None] * x_mean[:, None, :]
        cross = self.wxy - self.wx * y_mean[:, None]
        scatter = self.wyy - self.w * y_mean.square()
        ridge = (_RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=torch.finfo(torch.float64).tiny)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + ridge[:, None, None] * eye, cross)
        left = scatter - 2 * (weight * cross).sum(-1) + torch.einsum("ri,rij,rj->r", weight, gram, weight)
        quality = 1 - left / scatter.clamp(min=torch.finfo(torch.float64).tiny)
        return weight, -(weight @ (self.x / self.count)), quality.tolist()


class _AllRead(Exception):
    """Ends a forward pass after the last layer of interest."""


@torch.no_grad()
def calibrate(model: nn.Module, texts_or_token_ids: Any, *, tokenizer: Any = None, row_length: int = 2048,
              batch_size: int = 1, block: int = 256, max_bytes: int = 4 << 30, progress: bool = False) -> list[dict[str, Any]]:
    """Sets every layer's write gate (``write_proj``) from what the model itself attends to; returns a summary per layer.

    The model reads the rows with plain full attention (no second stream). For every key with a query at distance >= W, m is the
    mean and x the maximum, over those queries, of the probability on it, summed over the query heads of its KV head (with
    ``gates="shared"``: over all heads). Ridge regression with weights 1 + 50 x, ridge 1e-3 of the mean diagonal of the centred
    weighted Gram matrix, intercept free, float64, from the layer input to log(m + 0.1 x + 1e-6) gives the weight; the
    bias is such that the unweighted mean logit of the keys read is 0.

    Args:
        model: a converted model, in either mode; its mode and everything but the gates stay as they are.
        texts_or_token_ids: a text or several (then ``tokenizer`` is needed), or token ids: (L,), (N, L) or a list of rows. What
            they are like decides what the gate keeps; 64k to 128k tokens are enough.
        row_length: texts and rows are cut into rows of at most so many tokens; pieces of no more than W tokens are left out.
        batch_size: rows of equal length read together. block: queries per step of the attention statistics.
        max_bytes: for the regression sums. Models that need more are read several times, some layers each.
        progress: shows a progress bar.
    Returns: for each layer ``{"layer": index, "tokens": keys counted, "r2": weighted R^2 per gate group}``.
    Raises: ValueError when the model is not converted, no row is longer than W, a tokenizer is missing, or an id is out of range.
    """
    layers = coda_layers(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    base = getattr(inner, "model", inner)
    window = layers[0].coda.window
    rows = _rows(texts_or_token_ids, tokenizer, row_length, window, inner.config.vocab_size)
    batches = list(_batches(rows, batch_size))
    width, groups = inner.config.hidden_size, layers[0].write_proj.out_features
    per_pass = max(1, max_bytes // (8 * groups * width * width))
    passes = [layers[i:i + per_pass] for i in range(0, len(layers), per_pass)]
    device = base.get_input_embeddings().weight.device
    summary = []
    with _plain_reading(inner, layers), _bar(progress, len(batches) * len(passes)) as tick:
        for group in passes:
            fits = {layer: _Fit(width, groups, next(layer.write_proj.parameters()).device) for layer in group}

            def read(layer: CodaAttention, args: tuple, kwargs: dict) -> None:
                _observe(layer, fits[layer], kwargs["hidden_states"], kwargs["position_ids"], block)
                if layer is group[-1]:
                    raise _AllRead

            hooks = [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in group]
            try:
                for batch in batches:
                    with contextlib.suppress(_AllRead):
                        base(input_ids=batch.to(device), use_cache=False)
                    tick()
            finally:
                for hook in hooks:
                    hook.remove()
            for layer in group:
                weight, bias, quality = fits.pop(layer).solve()
                layer.write_proj.weight.copy_(weight)
                layer.write_proj.bias.copy_(bias)
                summary.append({"layer": layer.layer_idx, "tokens": sum(max(0, b.numel() - window * b.shape[0]) for b in batches),
                                "r2": quality})
    return summary


def _observe(layer: CodaAttention, fit: _Fit, x: Tensor, positions: Tensor, block: int) -> None:
    window = layer.coda.window
    q, k, _ = layer.project(x)
    positions = positions.expand(x.shape[:2])
    mean, peak = key_attention(layer.rope(q, positions), layer.rope(k, positions), window, scale=layer.scaling, block=block,
                               shared=layer.coda.gates == "shared")
    fit.add(x[:, :x.shape[1] - window].flatten(0, 1), *(t.transpose(0, 1).flatten(1) for t in (mean, peak)))


@contextlib.contextmanager
def _plain_reading(model: nn.Module, layers: list[CodaAttention]) -> Iterator[None]:
    """Mode "full", one stream, evaluation; undone at the end."""
    mode, training = model.config.coda_mode, model.training
    model.config.coda_mode = "full"
    model.eval()
    for layer in layers:
        layer.single_stream = True
    try:
        yield
    finally:
        model.config.coda_mode = mode
        model.train(training)
        for layer in layers:
            layer.single_stream = False


@contextlib.contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[], Any]]:
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="calibrate", unit="batch") as bar:
        yield bar.update


def _rows(data: Any, tokenizer: Any, row_length: int, window: int, vocabulary: int) -> list[Tensor]:
    """Token ids as rows of window + 1 to row_length tokens."""
    if row_length <= window:
        raise ValueError(f"row_length={row_length} leaves no token beyond window={window}; choose several times the window")
    if isinstance(data, str) or (isinstance(data, Sequence) and len(data) and isinstance(data[0], int)):
        data = [data]
    elif isinstance(data, Tensor) and data.dim() == 1:
        data = data[None]
    rows = []
    for item in data:
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError("texts need a tokenizer: calibrate(model, texts, tokenizer=tokenizer), or give token ids")
            item = tokenizer(item)["input_ids"]
        rows += torch.as_tensor(item, dtype=torch.int64).cpu().split(row_length)
    rows = [row for row in rows if row.numel() > window]
    if not rows:
        raise ValueError(f"no row has more than window={window} tokens, so nothing is ever evicted; give longer texts or rows")
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if low < 0 or high >= vocabulary:
        raise ValueError(f"token ids from {low} to {high} were given; the model's vocabulary is 0 to {vocabulary - 1}")
    return rows


def _batches(rows: list[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Neighbouring rows of one length, at most batch_size together: (B, L)."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not supported; it must be at least 1")
    for _, same in itertools.groupby(rows, key=len):
        same = list(same)
        yield from (torch.stack(same[i:i + batch_size]) for i in range(0, len(same), batch_size))
