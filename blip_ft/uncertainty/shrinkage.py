"""Covariances of few draws, moved towards round ones.

The 3 x 3 covariance of a force from a handful of draws has components that scatter, while its trace, of three
times as many numbers, is known better. Most forces are about as uncertain in one direction as in another, so
the sample covariance S of n draws is moved towards that of its trace,

    S' = (1 - rho) S + rho tr(S)/p P,                                                        (1)
    rho = min(1, ((1 - 2/p) tr S^2 + tr^2 S) / ((n + 1 - 2/p) (tr S^2 - tr^2 S / p))),       (2)

with the weight that loses least squared error on average for normal draws, estimated from S itself (the oracle
approximating shrinkage of Chen, Wiesel, Eldar and Hero, IEEE Trans. Signal Process. 58, 5016 (2010), equation
23). P is the projector on the p directions in which S is not zero: a force that symmetry holds in a plane
keeps its zero. The trace stays, S' rotates with S, and rho falls like 1/n for what is not round.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: variances below this share of the largest are zero by symmetry, but for rounding
ZERO = 1e-4


def shrunk(covariance: Tensor, n_samples: int) -> Tensor:
    """Equation (1) for every atom.

    Args:
        covariance: (n, 3, 3) sample covariances S about a known mean, positive semidefinite; any unit.
        n_samples: n, independent deviations that each S is the mean square of.

    Returns:
        (n, 3, 3) S'; where S is not finite, S.
    """
    finite = covariance.isfinite().all(dim=2).all(dim=1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, covariance, 0.0))
    kept = values > ZERO * values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)
    p = kept.sum(dim=1, keepdim=True).clamp_min(1).to(values)
    values = torch.where(kept, values, values.clamp_min(0))
    trace = (values * kept).sum(dim=1, keepdim=True)
    square = (values.square() * kept).sum(dim=1, keepdim=True)
    above = (1 - 2 / p) * square + trace.square()
    below = (n_samples + 1 - 2 / p) * (square - trace.square() / p)
    rho = torch.where(above < below, above / below.clamp_min(torch.finfo(values.dtype).tiny), 1.0)
    values = torch.where(kept, (1 - rho) * values + rho * trace / p, values)
    return torch.where(finite, vectors @ (values[:, :, None] * vectors.mT), covariance)
