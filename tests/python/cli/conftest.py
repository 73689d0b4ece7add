from __future__ import annotations

import json
from typing import Any, Callable, NamedTuple

import pytest

from coda_attn.cli import main


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON object that it has to be."""
        value = json.loads(self.out)
        assert isinstance(value, dict) and self.out.count("\n") == 1
        return value


@pytest.fixture
def coda(capfd) -> Callable[..., Result]:
    """Runs the command line in this process."""
    def run(*arguments: Any) -> Result:
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return Result(status, *capfd.readouterr())
    return run


@pytest.fixture
def text(tmp_path):
    """A file of about 4000 bytes of text without much repetition."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"Line {i} says {i * i % 997} and then {i * 7919 % 1009}." for i in range(110)), encoding="utf-8")
    return path
