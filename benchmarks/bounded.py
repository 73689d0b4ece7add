"""Attention over a bounded memory on a GPU."""

from __future__ import annotations

import functools
import math
import pathlib
from typing import Any, Callable, Mapping, Optional, Sequence

import torch
from torch import Tensor
from transformers.models.mistral.modeling_mistral import MistralAttention

from coda_attn import CodaCache, CodaConfig, State, functional as F, reference
from coda_attn.modeling import CodaAttention, CodaMistralConfig

from .attention import (Composite, FlexWindow, attention_flops, baseline, cudnn_attention, differentiable, flash_window,
                        outputs_and_gradients, plain_attention)
from .checks import CheckFailed, Run

_WIDTH, _HEADS, _KV_HEADS, _DIM = 4096, 32, 8, 128  # a layer of Mistral-7B
_LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072, 1048576)
_TRAINED = (2048, 8192, 16384)  # those among them for training steps
_LONGEST_QUADRATIC, _LONGEST_PEER = 131072, 8192
_RAGGED, _SEQUENCES = 32768, 16
_SEGMENT, _PIECE = 32768, 8192  # tokens read at once: by default by the op, and what the layer is given of a longer input
_SECONDS = 0.1  # of runs of each competitor
_PRESETS = {"default": CodaConfig(), "paper": CodaConfig.paper("medium")}
_WINDOW = 384  # of the sliding window: the slots of both


def measure(run: Run, lengths: Sequence[int] = _LENGTHS) -> list[dict[str, Any]]:
    """Attention over a bounded memory: scan and attention, a whole layer, forward and training step, beside plain cuDNN.

    One sequence at Mistral-7B's layer shape, read from an empty memory; two presets.
    """
    lengths = [length for length in lengths if length <= 4096] if run.quick else lengths
    trained = [length for length in lengths if length in _TRAINED]
    for preset, config in _PRESETS.items():
        _check_attention(run, preset, config)
        _check_layer(run, preset, config)
    _check_route(run)
    windows = _windows(run)
    rows = []
    for length in lengths:
        rows += _attention(run, "forward", length, windows)
    for length in trained:
        rows += _attention(run, "train", length, {})
    rows += _ragged(run, min(_RAGGED, max(lengths, default=_RAGGED)))
    layers = {preset: _Layer(run.device, config) for preset, config in _PRESETS.items()}
    for length in lengths:
        rows += _layer(run, "forward", length, layers)
    for length in trained:
        rows += _layer(run, "train", length, layers)
    rows.append(_route(run))
    return rows


# --- scan and attention -------------------------------------------------------------------------------------------------


def _inputs(device: torch.device, length: int, heads: int = _HEADS, kv_heads: int = _KV_HEADS) -> list[Tensor]:
    """q, k, v, lambda, theta in bfloat16 as projections give them."""
    generator = torch.Generator(device).manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
    return [randn(1, length, heads, _DIM), randn(1, length, kv_heads, _DIM), randn(1, length, kv_heads, _DIM),
            randn(1, length, heads).sigmoid(), randn(heads, _DIM // 2)]


class _Memory:
    """A bounded memory of one preset and what it takes beside queries, keys and values."""

    def __init__(self, config: CodaConfig, k: Tensor):
        self.config, self.inv_freq = config, F.rope_inv_freq(_DIM, device=k.device)
        generator = torch.Generator(k.device).manual_seed(1)
        randn = functools.partial(torch.randn, generator=generator, device=k.device)
        self.gate = randn(*k.shape[:-2], config.gate_groups(k.shape[-2]))
        self.eta_logit = randn(k.shape[-2]) if config.summary_slots else None

    def empty(self, k: Tensor, sequences: int = 1) -> State:
        return State.empty(sequences, k.shape[-2], _DIM, self.config, dtype=k.dtype, device=k.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, theta: Tensor, gate: Optional[Tensor] = None,
               eta_logit: Optional[Tensor] = None) -> Tensor:
        y, _ = F.bounded_attention(q, k, v, lam, theta, self.gate if gate is None else gate, self.empty(k), inv_freq=self.inv_freq,
                                   config=self.config, eta_logit=self.eta_logit if eta_logit is None else eta_logit)
        return y

    @torch.no_grad()
    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, theta: Tensor, ends: Tensor) -> Tensor:
        y, _ = F.bounded_attention(q, k, v, lam, theta, self.gate.view(k.shape[0], -1), self.empty(k, ends.shape[0] - 1),
                                   inv_freq=self.inv_freq, config=self.config, eta_logit=self.eta_logit, cu_seqlens=ends)
        return y

    def scan(self, k: Tensor, v: Tensor, ends: Tensor) -> None:
        """The scan alone of packed k, v (T, Hkv, D), in the segments in which the attention has it."""
        state = self.empty(k, ends.shape[0] - 1).tensors()
        gate = self.gate.view(k.shape[0], -1)
        for a in range(0, k.shape[0], _SEGMENT):
            b = min(a + _SEGMENT, k.shape[0])
            *_, state = torch.ops.coda.bank_scan(k[a:b], v[a:b], gate[a:b], ends.clamp(a, b).sub(a), state, self.eta_logit,
                                                 self.inv_freq, **self.config.memory_args())


def _attention(run: Run, pass_: str, length: int, windows: Mapping[str, Callable[..., Tensor]]) -> list[dict[str, Any]]:
    run.say(f"bounded_attention {pass_} L {length}")
    inputs = _inputs(run.device, length)
    q, k, v = inputs[:3]
    memories = {preset: _Memory(config, k) for preset, config in _PRESETS.items()}
    call = _CALLS[pass_]
    functions = {preset: call(memory.attend, inputs + [t for t in (memory.gate, memory.eta_logit) if t is not None])
                 for preset, memory in memories.items()}
    extra = {preset: _extra_bytes(run, function) for preset, function in functions.items()}
    if pass_ == "forward":
        ends = torch.arange(2, device=run.device) * length
        functions |= {f"{preset} scan": functools.partial(memory.scan, k[0], v[0], ends) for preset, memory in memories.items()}
    competitors = {name: call(function, [q, k, v]) for name, function in windows.items()}
    if length <= _LONGEST_QUADRATIC:
        competitors |= {"plain_cudnn": call(cudnn_attention, [q, k, v]), "unbounded": call(F.diff_attention, inputs)}
    times = _time(run, functions, competitors)
    window, by = min(((times[name], name) for name in windows if name in times), default=(None, None))
    rows = []
    for preset, config in _PRESETS.items():
        row = _row("bounded_attention", pass_, preset, length, times[preset])
        row["tflops"] = attention_flops(2, 1, _HEADS, _DIM, _keys(length, config), pass_) / times[preset] / 1e9
        row |= {"extra_bytes": extra[preset], "scan_ms": times.get(f"{preset} scan"), "window_by": by}
        row["baselines"] = {"plain_cudnn": times.get("plain_cudnn"), "window": window, "unbounded": times.get("unbounded")}
        rows.append(row)
    return rows


def _keys(length: int, config: CodaConfig) -> int:
    """Keys that the queries of a sequence see, all together."""
    t = torch.arange(length)
    start = t // config.chunk * config.chunk
    evicted = (start - config.window + config.chunk).clamp(min=0)
    return int((t + 1 - evicted + evicted.clamp(max=config.slots - config.window)).sum())


def _ragged(run: Run, tokens: int) -> list[dict[str, Any]]:
    """Many sequences of any lengths beside as many tokens in one: the scan alone, and scan and attention."""
    run.say(f"ragged B {_SEQUENCES}")
    inputs = _inputs(run.device, tokens)
    q, k, v, lam, theta = (*(t[0] for t in inputs[:4]), inputs[4])
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[:_SEQUENCES - 1].sort().values + 1
    many = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).to(run.device)
    one = torch.arange(2, device=run.device) * tokens
    rows = []
    for preset, config in _PRESETS.items():
        memory = _Memory(config, inputs[1])
        calls = {"bank_scan": functools.partial(memory.scan, k, v),
                 "bounded_attention_ragged": functools.partial(memory.attend_packed, q, k, v, lam, theta)}
        for op, function in calls.items():
            times = _time(run, {"ours": functools.partial(function, many)}, {"one_sequence": functools.partial(function, one)})
            row = _row(op, "forward", preset, tokens, times["ours"])
            rows.append(row | {"B": _SEQUENCES, "baselines": {"one_sequence": times.get("one_sequence")}})
    return rows


def _windows(run: Run) -> dict[str, Callable[..., Tensor]]:
    """What torch has for a sliding window, checked. Its cuDNN attention takes none."""
    q, k, v = (t[:, :, :2] for t in _inputs(run.device, 2 * _WINDOW + 60)[:3])
    age = torch.arange(q.shape[1], device=run.device).unsqueeze(-1) - torch.arange(q.shape[1], device=run.device)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * _DIM ** -0.5
    exact = torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill((age < 0) | (age >= _WINDOW), -math.inf).softmax(-1), v.double())

    def checked(function: Callable[..., Tensor]) -> None:
        error = (function(q, k, v).double() - exact).abs().max().item()
        if not error < 0.02:
            raise CheckFailed(f"its error is {error:.3g}")

    windows = {"flash_attention": functools.partial(flash_window, window=_WINDOW), "flex_attention": FlexWindow(_WINDOW)}
    return {name: function for name, function in windows.items() if baseline(run, name, functools.partial(checked, function))}


def _check_attention(run: Run, preset: str, config: CodaConfig) -> None:
    """Two windows of tokens against the reference in float64, gradients too.

    What plain PyTorch loses in bfloat16 is taken from attention over as many keys, since nobody writes a bounded memory in it.
    """
    inputs = _inputs(run.device, 2 * config.window, heads=4, kv_heads=2)
    memory, grad = _Memory(config, inputs[1]), torch.randn_like(inputs[0])
    exact_inputs = [t.double().cpu() for t in inputs]
    gate, inv_freq = memory.gate[0].double().cpu(), memory.inv_freq.cpu()
    eta_logit = None if memory.eta_logit is None else memory.eta_logit.double().cpu()

    def exact(*tensors: Tensor) -> Tensor:
        q, k, v, lam = (t[0] for t in tensors[:4])
        ends, state = torch.tensor([0, q.shape[0]]), memory.empty(k)
        *snapshots, _ = reference.bank_scan(k, v, gate, ends, state, eta_logit, inv_freq, config)
        return reference.bounded_attention_chunks(q, k, v, lam, tensors[4], gate, ends, state, snapshots, inv_freq, config)[None]

    ours = outputs_and_gradients(memory.attend, inputs, grad)
    truth = outputs_and_gradients(exact, exact_inputs, grad.cpu())
    dense = outputs_and_gradients(reference.diff_attention, exact_inputs, grad.cpu())
    plain = outputs_and_gradients(plain_attention, inputs, grad)
    for name, result, right, close, rounded in zip(("y", "q", "k", "v", "lam", "theta"), ours, truth, dense, plain):
        run.check(f"bounded_attention {preset}, {name}", _error(result, right), 2.0 * _error(rounded, close))


# --- a layer ------------------------------------------------------------------------------------------------------------


class _Layer:
    """The attention layer of a converted model, projections and rotary embedding included, in all the forms compared."""

    def __init__(self, device: torch.device, coda: CodaConfig, dtype: torch.dtype = torch.bfloat16, width: int = _WIDTH,
                 heads: int = _HEADS, kv_heads: int = _KV_HEADS):
        torch.manual_seed(0)
        self.config = CodaMistralConfig(hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=_DIM,
                                        num_hidden_layers=1, sliding_window=None, coda=coda.to_dict())
        self.module = CodaAttention(MistralAttention(self.config, 0), coda, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            self.module.theta.normal_()
            self.module.write_proj.weight.normal_(std=width ** -0.5)
        self.module.to(device, dtype)

    def bounded(self, x: Tensor) -> Tensor:
        self.config.coda_mode = "bounded"
        return self.module(x)[0]

    def read(self, x: Tensor) -> Tensor:
        """The same piece by piece with a cache, as prompts are read; only the last output is kept."""
        self.config.coda_mode, cache = "bounded", CodaCache(self.config)
        for piece in x.split(_PIECE, 1):
            y, _ = self.module(piece, past_key_values=cache)
        return y

    def unbounded(self, x: Tensor) -> Tensor:
        self.config.coda_mode = "full"
        return self.module(x)[0]

    def _rotated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.module.project(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.module.rope(q, positions), self.module.rope(k, positions), v

    def plain(self, x: Tensor, attend: Callable[..., Tensor] = cudnn_attention) -> Tensor:
        return self.module.o_proj(attend(*self._rotated(x)).flatten(-2))

    def composite(self, x: Tensor, composite: Composite) -> Tensor:
        q, k, v = self._rotated(x)
        return self.module.o_proj(composite(q, k, v, *self.module.streams(x, q)).flatten(-2))


def _layer(run: Run, pass_: str, length: int, layers: Mapping[str, _Layer]) -> list[dict[str, Any]]:
    run.say(f"bounded_layer {pass_} L {length}")
    generator = torch.Generator(run.device).manual_seed(0)
    x = torch.randn(1, length, _WIDTH, generator=generator, device=run.device, dtype=torch.bfloat16)
    any_layer = layers["default"]

    def call(function: Callable[[Tensor], Tensor], module: torch.nn.Module) -> Callable[[], Any]:
        return _CALLS[pass_](function, [x], list(module.parameters()))

    functions = {preset: call(layer.read if pass_ == "forward" else layer.bounded, layer.module) for preset, layer in layers.items()}
    extra = {preset: _extra_bytes(run, function) for preset, function in functions.items()}
    competitors = {}
    if length <= _LONGEST_QUADRATIC:
        competitors |= {"plain_cudnn": call(any_layer.plain, any_layer.module), "unbounded": call(any_layer.unbounded, any_layer.module)}
    if pass_ == "train":
        competitors["composite"] = call(functools.partial(any_layer.composite, composite=Composite()), any_layer.module)
    peer = _peer_layer(run, _PRESETS["paper"]) if length <= _LONGEST_PEER else None
    if peer:
        competitors["peer"] = call(peer, peer.module)
    times = _time(run, functions, competitors)
    rows = []
    for preset in layers:
        row = _row("bounded_layer", pass_, preset, length, times[preset]) | {"E": _WIDTH, "extra_bytes": extra[preset]}
        row["baselines"] = {name: times.get(name) for name in ("plain_cudnn", "unbounded", "composite")}
        rows.append(row | {"baselines": row["baselines"] | {"peer": times.get("peer") if preset == "paper" else None}})
    return rows


class _Peer:
    """The layer of the paper's package, in the mode and with the kernels in which it runs on a GPU."""

    def __init__(self, device: torch.device, config: CodaConfig):
        from coda_gqa_l import CoDAGQALandmarkPerf2, memory_banks

        memory_banks._HAS_TRITON_SUMMARY = False
        module = CoDAGQALandmarkPerf2(embed_dim=_WIDTH, num_heads=_HEADS, num_kv_heads=_KV_HEADS, window=config.window,
                                      num_landmarks_exact=config.exact_slots, num_landmarks_summary=config.summary_slots,
                                      head_norm_mode=config.head_norm, rope_interleaved=False)
        self.module = module.to(device, torch.bfloat16).train()

    def __call__(self, x: Tensor) -> Tensor:
        state = self.module.init_state(batch_size=1, device=x.device, dtype=x.dtype)
        return self.module.prefill_chunked(x, state)[0]


def _peer_layer(run: Run, config: CodaConfig) -> Optional[_Peer]:
    try:
        return _Peer(run.device, config)
    except ImportError:
        return None


def _check_layer(run: Run, preset: str, config: CodaConfig) -> None:
    """A narrow layer against itself in float64 on the CPU; plain PyTorch's loss is that of the plain layer."""
    layer = _Layer(run.device, config, width=512, heads=4, kv_heads=2)
    exact = _Layer(torch.device("cpu"), config, torch.float64, width=512, heads=4, kv_heads=2)
    exact.module.load_state_dict({name: t.double().cpu() for name, t in layer.module.state_dict().items()})
    x = torch.randn(1, 2 * config.window, 512, generator=torch.Generator().manual_seed(2)).to(run.device, torch.bfloat16)
    grad = torch.randn_like(x)
    exact_x, exact_grad = x.double().cpu(), grad.double().cpu()
    truth, ours = outputs_and_gradients(exact.bounded, [exact_x], exact_grad), outputs_and_gradients(layer.bounded, [x], grad)
    close = outputs_and_gradients(functools.partial(exact.plain, attend=plain_attention), [exact_x], exact_grad)
    plain = outputs_and_gradients(functools.partial(layer.plain, attend=plain_attention), [x], grad)
    for name, result, right, rounded, wanted in zip(("y", "x"), ours, truth, plain, close):
        run.check(f"bounded_layer {preset}, {name}", _error(result, right), 2.0 * _error(rounded, wanted))
    with torch.no_grad():
        run.check(f"bounded_layer {preset}, read", _error(layer.read(x), truth[0]), 2.0 * _error(plain[0], close[0]))


# --- routing ------------------------------------------------------------------------------------------------------------

_ROUTES = {"B": 2, "Hkv": 8, "T": 8, "Me": 64, "D": 128}
_ROUTES_IN_GRAPH = 50


def _route_inputs(device: torch.device) -> list[Tensor]:
    """A full bank, of whose values some candidates are variations."""
    b, hkv, t, me, d = _ROUTES.values()
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(b, hkv, me, d, generator=generator)
    value = torch.randn(b, hkv, t, d, generator=generator)
    value[:, :, ::2] = bank[:, :, :t // 2] + 0.1 * value[:, :, ::2]
    inputs = [value.bfloat16(), torch.rand(b, t, generator=generator), torch.arange(1000, 1000 + t).expand(b, t).contiguous(),
              bank.bfloat16(), torch.ones(b, me, dtype=torch.bool), torch.randperm(me, generator=generator).expand(b, me).contiguous()]
    return [t.to(device) for t in inputs]


def _check_route(run: Run) -> None:
    """Decisions as in float64 on the CPU."""
    ours = F.route_exact_bank(*_route_inputs(run.device))
    right = F.route_exact_bank(*(t.double() if t.is_floating_point() else t for t in _route_inputs(torch.device("cpu"))))
    run.check("route_exact_bank, decisions", float(sum(int((a.cpu() != b).sum()) for a, b in zip(ours, right))), 0.0)


def _route(run: Run) -> dict[str, Any]:
    """Calls replayed in a CUDA graph."""
    run.say("route_exact_bank")
    inputs = _route_inputs(run.device)

    def replay(function: Callable[[], Any]) -> Callable[[], None]:
        function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_ROUTES_IN_GRAPH):
                function()
        return graph.replay

    competitors = {}
    peer = _peer_route(*inputs)
    if peer and baseline(run, "peer_triton", peer):
        competitors["peer_triton"] = replay(peer)
    times = {name: ms / _ROUTES_IN_GRAPH
             for name, ms in _time(run, {"ours": replay(functools.partial(F.route_exact_bank, *inputs))}, competitors).items()}
    return {"op": "route_exact_bank", "pass": "forward", **_ROUTES, "dtype": "bfloat16", "ms": times["ours"],
            "us": 1000.0 * times["ours"], "baselines": {"peer_triton": times.get("peer_triton")}}


def _peer_route(value: Tensor, gate: Tensor, position: Tensor, bank_value: Tensor, used: Tensor,
                last_touch: Tensor) -> Optional[Callable[[], Any]]:
    """The kernel of the paper's package, on values normalised beforehand."""
    try:
        from coda_gqa_l.triton_bank_routing import exact_bank_route
    except ImportError:
        return None
    value, bank_value = (torch.nn.functional.normalize(t, dim=-1) for t in (value, bank_value))
    return lambda: exact_bank_route(value, bank_value, used, last_touch, gate, position, tau_gate=0.10, tau_match=0.90,
                                    tau_novel=0.70, refresh_on_hit=False, active_exact=bank_value.shape[2])


# --- measuring ----------------------------------------------------------------------------------------------------------


def _forward(function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)
    return call


def _train(function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> Callable[[], Any]:
    """Forward and backward, with the gradients of inputs and parameters."""
    inputs, grad = differentiable(inputs), torch.randn_like(inputs[0])

    def call() -> None:
        torch.autograd.grad(function(*inputs), [*inputs, *parameters], grad, allow_unused=True)
    return call


_CALLS = {"forward": _forward, "train": _train}


def _time(run: Run, functions: Mapping[str, Callable[[], Any]], competitors: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of ours and of the competitors that run here, side by side."""
    works = {name: function for name, function in competitors.items() if baseline(run, name, function)}
    return {name: timing.ms for name, timing in run.time({**functions, **works}, seconds=_SECONDS).items()}


def _extra_bytes(run: Run, function: Callable[[], Optional[Tensor]]) -> int:
    """Peak memory during a call beyond what was there before and what it returns."""
    function()
    before = torch.cuda.memory_allocated(run.device)
    torch.cuda.reset_peak_memory_stats(run.device)
    y = function()
    return torch.cuda.max_memory_allocated(run.device) - before - (0 if y is None else y.nbytes)


def _row(op: str, pass_: str, preset: str, length: int, ms: float) -> dict[str, Any]:
    return {"op": op, "pass": pass_, "preset": preset, "B": 1, "L": length, "H": _HEADS, "Hkv": _KV_HEADS, "D": _DIM,
            "dtype": "bfloat16", "causal": True, "ms": ms, "tokens_per_s": 1000.0 * length / ms}


def _error(a: Tensor, b: Tensor) -> float:
    return (a.double().cpu() - b.double().cpu()).abs().max().item()


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Tokens per second of forward passes against length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    titles = {"bounded_attention": "scan and attention", "bounded_layer": "a layer with its projections"}
    for axis, (op, title) in zip(figure.subplots(1, 2), titles.items()):
        shown = [row for row in rows if row["op"] == op and row["pass"] == "forward"]
        for preset in _PRESETS:
            line = [row for row in shown if row["preset"] == preset]
            axis.plot([row["L"] for row in line], [row["tokens_per_s"] for row in line], marker="o", linewidth=2.5, label=preset)
        for name in ("plain_cudnn", "window", "unbounded", "peer"):
            points = sorted({(row["L"], 1000.0 * row["L"] / row["baselines"][name]) for row in shown if row["baselines"].get(name)})
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
        axis.set(title=title, xlabel="L", ylabel="tokens/s", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle("One sequence at the layer shape of Mistral-7B, bfloat16")
    figure.savefig(path, dpi=150)
