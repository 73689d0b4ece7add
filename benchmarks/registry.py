"""The benchmarks by name."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from typing import Any, Callable, Optional

from . import beyond_context, bounded, diff_attention, smollm2_cpu


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """``measure(run, **options)`` returns the rows; what else it takes by name can be given on the command line.

    Args:
        devices: types of device that it runs on, its own first.
        plot: draws rows into a PNG file.
    """

    measure: Callable[..., list[dict[str, Any]]]
    devices: tuple[str, ...]
    plot: Optional[Callable[[list[dict[str, Any]], pathlib.Path], None]] = None

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.measure).partition("\n")[0]

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.measure).parameters)[1:]


BENCHMARKS = {
    "beyond_context": Benchmark(beyond_context.measure, ("cpu", "cuda"), beyond_context.plot),
    "bounded": Benchmark(bounded.measure, ("cuda",), bounded.plot),
    "diff_attention": Benchmark(diff_attention.measure, ("cuda",), diff_attention.plot),
    "smollm2_cpu": Benchmark(smollm2_cpu.measure, ("cpu",), smollm2_cpu.plot),
}
