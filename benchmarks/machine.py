"""Where and from what a result comes."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import resource
import subprocess
from typing import Any, Optional

import torch
import transformers

import coda_attn

ROOT = pathlib.Path(__file__).parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """The machine; ``name`` is what its folder of results is called."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = _processor()
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
               "multiprocessors": properties.multi_processor_count, "l2_mib": properties.L2_cache_size // 2**20}
    return {"name": _slug(gpu["name"]) if gpu else _slug(f"cpu {processor} {cores}cores"), "gpu": gpu, "processor": processor,
            "cores": cores, "threads": torch.get_num_threads()}


def versions() -> dict[str, Any]:
    return {"coda_attn": coda_attn.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


def commit(root: pathlib.Path = ROOT) -> Optional[str]:
    """The commit checked out, with ``-dirty`` where files differ from it (results apart); None outside a git checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most memory that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _slug(name: str) -> str:
    name = re.sub(r"\((r|tm)\)|\bcpu @.*?ghz|\b\d+-core processor", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
