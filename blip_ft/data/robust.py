"""Linear regression that a share of wrong targets does not mislead.

Iteratively reweighted least squares: Huber's weights from the start on, which are convex and find
the bulk, then Tukey's biweight, which gives far points no weight at all (Huber & Ronchetti, Robust
Statistics, 2nd ed., chapter 7; Maronna et al., Robust Statistics, 2nd ed., sections 5.4 and 5.5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: median absolute deviation to the std of a Gaussian
_MAD = 1.4826
#: Huber's and Tukey's constants: 95 % efficiency on Gaussian noise (Tukey), a hard bulk (Huber)
_HUBER, _TUKEY = 1.345, 4.685
_HUBER_STEPS, _STEPS = 12, 30
#: leverage is cut here: a point that alone determines a direction has no residual
_LEVERAGE = 0.95


def spread(values: Floats) -> float:
    """Std of the bulk: 1.4826 times the median absolute deviation from the median."""
    if not values.size:
        return 0.0
    return float(_MAD * np.median(np.abs(values - np.median(values))))


def robust_z(values: Floats, floor: float) -> Floats:
    """(m,) distance from the median in units of the spread, at least ``floor``."""
    return (values - np.median(values)) / max(spread(values), floor)


@dataclass(frozen=True)
class RobustFit:
    """What a fit leaves over.

    Attributes:
        residual: (m,) target minus fit, each point left out of its own fit.
        weight: (m,) final weights, 0 for points that do not belong to the bulk.
        scale: spread of the residuals.
    """

    residual: Floats
    weight: Floats
    scale: float


def robust_fit(
    design: Floats, target: Floats, *, ridge: float = 1e-4, exclude: NDArray[np.bool_] | None = None
) -> RobustFit:
    """Fit ``target`` by the columns of ``design`` and a constant.

    Args:
        design: (m, p), columns of about unit size.
        target: (m,).
        ridge: penalty on the coefficients, not on the constant, in units of m.
        exclude: (m,) points that never get any weight.
    """
    m = len(target)
    taken = np.ones(m, dtype=bool) if exclude is None or exclude.all() else ~exclude
    columns = np.concatenate([design, np.ones((m, 1))], axis=1)
    penalty = np.diag(np.append(np.full(design.shape[1], ridge), 1e-12))
    weight, residual, leverage, scale = taken.astype(float), target, np.zeros(m), 0.0
    for step in range(_STEPS):
        gram = (columns * weight[:, None]).T @ columns + max(weight.sum(), 1.0) * penalty
        solution = np.linalg.solve(gram, np.column_stack([columns.T @ (weight * target), columns.T]))
        residual = target - columns @ solution[:, 0]
        leverage = np.clip(weight * np.einsum("mp,pm->m", columns, solution[:, 1:]), 0.0, _LEVERAGE)
        scale = max(spread(residual[taken]), 1e-12)
        size = np.abs(residual) / scale
        if step < _HUBER_STEPS:
            weight = taken * np.minimum(1.0, _HUBER / np.maximum(size, 1e-12))
        else:
            weight = taken * np.where(size < _TUKEY, (1.0 - (size / _TUKEY) ** 2) ** 2, 0.0)
    return RobustFit(residual / (1.0 - leverage), weight, scale)


def trimmed_rms(values: Floats, keep: float = 0.85) -> float:
    """Root mean square of the share ``keep`` of the values that is smallest in size."""
    smallest = np.sort(np.abs(values))[: max(1, int(keep * len(values)))]
    return float(np.sqrt(np.mean(smallest**2)))
