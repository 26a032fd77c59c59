"""Continuous ranked probability score of samples, as a differentiable loss.

Fair form (Ferro 2014, Q. J. R. Meteorol. Soc. 140, 1917), unbiased for the CRPS of the law that
the K samples come from:

    mean_k |x_k - y|  -  1 / (2 K (K-1)) sum_jk |x_j - x_k|.

The factor 1/2 matters: without it the score falls without bound as the spread grows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fair_crps(samples: Tensor, label: Tensor) -> Tensor:
    """Fair CRPS.

    Args:
        samples: (K, ...) with K >= 2.
        label: (...).

    Returns:
        (...) in the unit of the label.

    Raises:
        ValueError: fewer than two samples.
    """
    k = samples.shape[0]
    if k < 2:
        raise ValueError("the fair CRPS needs at least two samples")
    distance = (samples - label).abs().mean(dim=0)
    # sum_jk |x_j - x_k| = 2 sum_i (2 i - K - 1) x_(i), i = 1..K over the sorted samples
    ordered = samples.sort(dim=0).values
    weights = 2 * torch.arange(1, k + 1, dtype=samples.dtype, device=samples.device) - k - 1
    spread: Tensor = torch.tensordot(weights, ordered, dims=1) / (k * (k - 1))
    score: Tensor = distance - spread
    return score
