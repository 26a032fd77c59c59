"""Continuous ranked probability score: of samples as a differentiable loss, of Gaussians in closed form.

Fair form (Ferro 2014, Q. J. R. Meteorol. Soc. 140, 1917), unbiased for the CRPS of the law that
the K samples come from:

    mean_k |x_k - y|  -  1 / (2 K (K-1)) sum_jk |x_j - x_k|.

The factor 1/2 matters: without it the score falls without bound as the spread grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr
from torch import Tensor

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.objectives.likelihood import compared, frame_weights, row_weights


def gaussian_crps(error: ArrayLike, std: ArrayLike) -> NDArray[np.float64]:
    """CRPS of N(0, std^2) at ``error``, elementwise, in their unit.

    s [z (2 Phi(z) - 1) + 2 phi(z) - 1/sqrt(pi)] with z = error / s (Gneiting and Raftery, J. Am. Stat. Assoc.
    102, 359, 2007, eq. 21); its limit |error| where the std is 0, NaN where either is.

    Args:
        error: label minus mean.
        std: at least 0; broadcast with ``error``.
    """
    e, s = np.broadcast_arrays(np.asarray(error, dtype=np.float64), np.asarray(std, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # where the limit is taken
        z = e / s
        score = s * (
            z * (2 * ndtr(z) - 1) + math.sqrt(2 / math.pi) * np.exp(-0.5 * z**2) - 1 / math.sqrt(math.pi)
        )
    out: NDArray[np.float64] = np.where((s == 0) | np.isinf(z), np.abs(e), score)
    return out


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


def label_crps(
    samples: Sequence[Prediction], batch: Batch, noise: Mapping[str, float], *, stress: bool
) -> Tensor:
    """Fair CRPS of each structure's labels, every one over the noise std of its kind, summed; (B,).

    A sum over labels and in units of the noise, so that it can stand beside the NLL or in its place:
    energies (eV/atom) and forces (eV/Å) then weigh as they do there. Labels that are NaN are left out; weights
    multiply as in the likelihood.
    The samples are compared as they are, without label noise on top: their spread is what the score
    makes equal to the error.

    Args:
        samples: K >= 2 predictions of the batch with independent noise.
        batch: with labels.
        noise: std by kind.
        stress: score the stress too.
    """
    sides = [compared(p, batch, stress=stress) for p in samples]
    out = samples[0].energy.new_zeros(batch.n_structures, dtype=torch.float64)
    for kind, (_, label, rows) in sides[0].items():
        known = ~torch.isnan(label)
        off = torch.stack([torch.where(known, side[kind][0] - label, 0.0) for side in sides])
        score = fair_crps(off, torch.zeros_like(label)) * known * row_weights(batch, kind) / noise[kind]
        out = out.index_add(0, rows, score.flatten(1).sum(dim=1))
    return out * frame_weights(batch)
