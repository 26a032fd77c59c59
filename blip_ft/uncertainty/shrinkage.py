"""Covariances of few draws, moved towards round ones.

The 3 x 3 covariance of a force from a handful of draws has components that scatter, while its trace, of three
times as many numbers, is known better. In a crystal most forces are about as uncertain in one direction as in
another, in a molecule not at all. How far a sample covariance S of n normal draws is from round is

    D(S) = 3 log(tr S / 3) - log det S >= 0,                                                (1)

twice its log likelihood ratio per draw against the round covariance of the same trace (Mauchly 1940). A round
covariance shows by chance, as n S is then Wishart's,

    D_n = E[D] = 3 (psi(3 n / 2) - log 3) - psi(n / 2) - psi((n - 1) / 2) - psi((n - 2) / 2).    (2)

The eigenvalues l_i of S are drawn together by the share of D that may be chance,

    l_i' = l_i (tr S / (3 l_i))^rho, scaled to tr S,      rho = min(1, D_n / (2 D)).             (3)

Half of D_n is what helps crystals and molecules alike: docs/decisions.md. What symmetry makes zero stays zero,
the trace stays, and S' turns with S.
"""

from __future__ import annotations

import math

import torch
from scipy.special import digamma
from torch import Tensor

#: eigenvalues below this share of the largest are rounding
ROUNDING = 1e-12


def shrunk(covariance: Tensor, n_samples: int) -> Tensor:
    """Equation (3) for every atom.

    Args:
        covariance: (n, 3, 3) sample covariances S about a known mean, positive semidefinite; any unit.
        n_samples: n, independent deviations that each S is the mean square of. With fewer than three D is infinite.

    Returns:
        (n, 3, 3) S'; where S is not finite, S.
    """
    if n_samples < 3:
        return covariance
    finite = covariance.isfinite().all(dim=2).all(dim=1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, covariance, 0.0))
    values = values.clamp_min(0)
    tiny = torch.finfo(values.dtype).tiny
    safe = values.clamp_min(ROUNDING * values[:, -1:]).clamp_min(tiny)
    mean = values.mean(dim=1, keepdim=True)
    apart = 3 * mean.clamp_min(tiny).log() - safe.log().sum(dim=1, keepdim=True)
    rho = (by_chance(n_samples) / (2 * apart.clamp_min(tiny))).clamp_max(1)
    drawn = values * (mean / safe) ** rho
    drawn = drawn * (mean / drawn.mean(dim=1, keepdim=True).clamp_min(tiny))
    return torch.where(finite, vectors @ (drawn[:, :, None] * vectors.mT), covariance)


def by_chance(n_samples: int) -> float:
    """Equation (2): what a round covariance shows on average in ``n_samples`` draws, three or more."""
    n = n_samples
    return float(3 * (digamma(1.5 * n) - math.log(3)) - sum(digamma((n - i) / 2) for i in range(3)))
