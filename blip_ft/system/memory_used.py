"""How much memory this process has used at most."""

from __future__ import annotations

import sys

import torch

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
