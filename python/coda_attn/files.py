"""Files and folders that are complete or not there."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from typing import Iterator


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path beside ``path`` that takes its name when the block ends, and disappears when the block fails.

    Raises: ValueError when the folder of ``path`` cannot be made or written to.
    """
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, because a rename is atomic only within one file system.
        folder = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=path.parent))
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose a place that can be written to") from None
    try:
        # The suffix stays the last one: some writers choose the format by it.
        yield folder / path.name
        _rename(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder beside ``path`` that takes its name when the block ends, and disappears when the block fails.

    Raises: ValueError when ``path`` exists, or when its parent cannot be made or written to.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise ValueError(f"{path} exists; choose another name, or remove it first")
    with new_file(path) as folder:
        folder.mkdir()
        yield folder


def _rename(source: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}; choose a place that can be written to") from None
