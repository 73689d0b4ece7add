"""What every benchmark gets: the device, and a stopwatch that works only after a correctness check has passed."""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

import click
import torch

from .timing import Timing, medians


class CheckFailed(Exception):
    """A result is wrong, so its speed is worth nothing."""


@dataclasses.dataclass
class Run:
    """One run of one benchmark."""

    device: torch.device
    quick: bool = False  #: small sizes, to see that it works
    checks: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def check(self, name: str, error: float, allowed: float) -> None:
        """Notes that ``error`` is at most ``allowed``. Raises CheckFailed where it is not, or is NaN."""
        passed = error <= allowed
        self.say(f"{'ok    ' if passed else 'WRONG '} {name}: {error:.3g}, allowed {allowed:.3g}")
        if not passed:
            raise CheckFailed(f"{name}: {error:.3g} is above {allowed:.3g}")
        self.checks.append({"check": name, "error": error, "allowed": allowed})

    def time(self, functions: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, Timing]:
        """``timing.medians`` on the run's device. Raises CheckFailed before the first check."""
        if not self.checks:
            raise CheckFailed("nothing has been checked yet, and an unchecked result is not timed")
        return medians(functions, self.device, **options)

    def say(self, message: str) -> None:
        click.echo(message, err=True)
