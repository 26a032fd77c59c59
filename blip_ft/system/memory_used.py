"""How much memory this process has used at most, and how much more it could."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from blip_ft.system.allocator import trim

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_bytes(device: torch.device) -> float:
    """Largest memory so far: of the device where that is a GPU, else of the process; 0 where nobody counts.

    Args:
        device: of the model.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def forget_peak(device: torch.device) -> None:
    """Let :func:`peak_bytes` count from what is needed now; elsewhere than on Linux and GPUs it goes on from before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    trim()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def free_bytes(device: torch.device) -> float | None:
    """Memory that is left, of the device where that is a GPU; ``None`` where the system does not tell.

    On a CPU what the system could give without swapping, or what the process's control group still allows.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    left = [n for n in (_available(), *_left_of_groups()) if n is not None]
    return min(left, default=None)


def _available() -> float | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    with suppress(ValueError, OSError, AttributeError):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None


def _left_of_groups() -> list[float]:
    """Bytes below the limits of control groups, versions 2 and 1."""
    left = []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        with suppress(OSError, ValueError):  # "max" is no limit
            left.append(float((root / limit).read_text()) - float((root / used).read_text()))
    return left
