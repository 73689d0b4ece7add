"""Loads libcoda, after a check that it was built for the torch that is running."""

from __future__ import annotations

import os
from typing import Optional

import torch

_REBUILD = "rebuild it from the source tree with `make build` or `pip install --no-build-isolation .`"

try:
    from . import _build_info
except ImportError:
    raise ImportError(f"coda_attn's compiled library is missing; {_REBUILD}") from None


def mismatch(torch_version: str, cuda_version: Optional[str]) -> Optional[str]:
    """Why a torch of this version and CUDA version (None: a CPU build) cannot run the library, or None if it can."""
    built_for = f"torch {_build_info.TORCH_VERSION}"
    if _build_info.CUDA_VERSION:
        built_for += f" with CUDA {_build_info.CUDA_VERSION}"
    same_torch = torch_version.split(".")[:2] == _build_info.TORCH_VERSION.split(".")
    same_cuda = not _build_info.CUDA_VERSION or (cuda_version or "").split(".")[0] == _build_info.CUDA_VERSION
    if same_torch and same_cuda:
        return None
    found = f"torch {torch_version}" + (f" with CUDA {cuda_version}" if cuda_version else " without CUDA")
    return f"coda_attn was built for {built_for}, but {found} is installed; {_REBUILD}"


def _load() -> str:
    problem = mismatch(torch.__version__, torch.version.cuda)
    if problem:
        raise ImportError(problem)
    # Beside the build information: in an editable install that is not where the Python sources are.
    prefix = os.path.dirname(os.path.abspath(_build_info.__file__))
    torch.ops.load_library(os.path.join(prefix, "lib", "libcoda.so"))
    return prefix


cmake_prefix_path = _load()
"""What a C++ project adds to CMAKE_PREFIX_PATH for find_package(coda)."""
version = _build_info.VERSION
