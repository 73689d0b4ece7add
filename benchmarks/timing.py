"""Medians of repeated runs, the competitors taking turns, so that a clock or a neighbour that drifts meets them all."""

from __future__ import annotations

import statistics
import time
from typing import Any, Callable, Mapping, NamedTuple

import torch

_QUEUE_CYCLES = 2_000_000  # about a millisecond of a GPU


class Timing(NamedTuple):
    ms: float  #: median
    least: float
    most: float
    repeats: int


def medians(functions: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int = 30, least: int = 5,
            seconds: float = 1.0) -> dict[str, Timing]:
    """Times functions side by side: round after round, each runs once.

    Every function runs twice before that, or once where it takes over a second: the first call compiles and allocates.

    Args:
        repeats, least: runs of each at most and at least. seconds: between them, as many as fit in this time.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _cpu_clock
    counts = {}
    for name, function in functions.items():
        first = clock(function)
        ms = first if first > 1000.0 else clock(function)
        counts[name] = max(least, min(repeats, int(1000.0 * seconds / ms)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(max(counts.values())):
        for name, function in functions.items():
            if i < counts[name]:
                samples[name].append(clock(function))
    return {name: Timing(statistics.median(x), min(x), max(x), len(x)) for name, x in samples.items()}


def _cpu_clock(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1000.0 * (time.perf_counter() - start)


class _CudaClock:
    """Milliseconds between two events. The L2 cache holds none of the inputs, and the queue is never empty, so that what is
    measured is the GPU and not the launches."""

    def __init__(self, device: torch.device):
        self.device = device
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(4 * l2, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(_QUEUE_CYCLES)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop)
