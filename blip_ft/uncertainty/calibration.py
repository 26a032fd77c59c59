r"""Fit the width of the error bars on calibration frames.

For each property (energy per atom, force components, stress components) the label is taken as
Gaussian around the prediction with

.. math:: \mathrm{var}_i = a^2 + (c\,s_i)^2

where s is the **epistemic** std from the posterior, c its one ``scale`` and a the constant
**aleatoric** std (noise of the labels and whatever the model cannot express). sqrt(var) is
the **total** std. a and c minimise the Gaussian negative log-likelihood of the residuals e.

How: with w in [0, 1] write var = t v(w), v(w) = (1 - w) + w s^2/<s^2>. For a fixed w the
best t is <e^2/v>, so only a function of the one number w is left, and the mean squared
z-score of the calibration residuals is exactly 1 whatever w is. w is searched on a grid in
logit(w) with both ends included (w = 0: a alone, w = 1: c alone), every local minimum of the
grid is refined by ``scipy.optimize.minimize_scalar``, and the best is taken.

Two things keep the fit sane on few frames:

* How the width is divided between a and c, that is w, is chosen with a weak Gaussian prior of
  ln c around 0 (std ``SCALE_PRIOR`` = ln 10). It counts as one unit beside F frames: components
  of one frame are not independent, so frames are what is counted. Without it a spread that
  happens not to correlate with the few residuals at hand would be switched off (c = 0), and
  the error bars far from the data with it; where the spread is constant or zero, a and c cannot
  be told apart and the prior decides for the c closest to 1.
* With fewer than ``MIN_RESIDUALS`` residuals (energy: one per frame) c = 1 and only a is fitted.

Residuals with zero error *and* zero spread (forces that vanish by symmetry) say nothing about
either and are left out.

A label that is wrong beyond doubt (:mod:`blip_ft.data.check.doubt`) would widen all error bars, a thousandfold
if need be: its frame takes no part in the fit of that property, and ``left_out`` names it. Where there is none,
nothing changes. What is in doubt stays in; ``carried_by`` names a frame that alone makes the error bars twice as
wide or more.

Beside the Gaussian factors, split-conformal factors are stored (:func:`conformal_quantile`).
Coverage in the metrics uses the Gaussian total std (90 %: 1.645 std); the conformal factor is
the one to use for intervals when ``excess_kurtosis`` says that the tails are heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from blip_ft.potential.calibration import PROPERTIES, Calibration, PropertyCalibration, per_atom
from blip_ft.potential.levels import Levels
from blip_ft.uncertainty.results import FloatArray, IntArray, SetPrediction

#: std of the prior of ln(scale)
SCALE_PRIOR = math.log(10.0)
#: with fewer residuals than this the scale stays 1
MIN_RESIDUALS = 5
#: levels for which conformal factors are stored
LEVELS = (0.5, 0.6827, 0.8, 0.9, 0.95, 0.9545, 0.99)
#: one frame carries the error bars where they are so many times wider with it ...
CARRIED = 2.0
#: ... and Gaussian errors would show that in fewer runs than this
CHANCE = 1e-3
#: residuals and spreads below this share of their rms count as zero
_ZERO = 1e-6
_LOGITS = np.linspace(-16.0, 16.0, 65)


def residuals(prediction: SetPrediction, name: str) -> tuple[FloatArray, FloatArray | None, IntArray]:
    """Residuals of one property with a label, their epistemic stds, and their frames.

    Args:
        prediction: predictions with labels.
        name: ``energy`` (per atom), ``forces`` or ``stress`` (components, flattened).

    Returns:
        error (N,) label minus prediction, std (N,) or ``None``, frame index (N,).
    """
    error: FloatArray = getattr(prediction, f"{name}_error")
    _, std = per_atom(prediction, name)
    owner = prediction.structure if name == "forces" else np.arange(prediction.n_structures)
    frame = np.broadcast_to(owner.reshape(-1, *[1] * (error.ndim - 1)), error.shape)
    known = np.isfinite(error) & (True if std is None else np.isfinite(std))
    return error[known], None if std is None else std[known], frame[known]


def rmse_calibration(prediction: SetPrediction) -> Calibration:
    """:meth:`Calibration.constant` with the RMSE of ``prediction`` in each labelled property: the error bars of a model
    that has none, from its validation frames.
    """
    errors = {}
    for name in PROPERTIES:
        error, _, frame = residuals(prediction, name)
        errors[name] = error[~wrong_frames(prediction, name)[frame]]
    return Calibration.constant(**{name: _rms(e) for name, e in errors.items() if e.size})


def calibrate(prediction: SetPrediction, *, scale_prior: float = SCALE_PRIOR) -> Calibration:
    """Fit aleatoric noise of every labelled property, and one scale, on calibration frames.

    The scale is the posterior's, hence that of every property: it is fitted on the forces, which have many residuals
    per frame, and on a property's own where forces say nothing.

    Args:
        prediction: of the calibration frames; nothing else may have been chosen on them.
        scale_prior: std of the prior of ln(scale); ``math.inf`` for plain maximum likelihood.
    """
    fitted: dict[str, PropertyCalibration] = {}
    scale: float | None = None
    for name in ("forces", *(p for p in PROPERTIES if p != "forces")):
        error, std, frame = residuals(prediction, name)
        wrong = wrong_frames(prediction, name)
        if wrong.any():
            kept = ~wrong[frame]
            error, std, frame = error[kept], None if std is None else std[kept], frame[kept]
        if error.size:
            item = fit(error, std, frame, scale_prior=scale_prior, scale=scale)
            heaviest, factor = _carrier(error, item.total(std), frame)
            fitted[name] = replace(
                item,
                left_out=tuple(prediction.frames[i] for i in np.flatnonzero(wrong)),
                carried_by="" if heaviest is None else prediction.frames[heaviest],
                carried_factor=factor,
            )
            if name == "forces" and std is not None and error.size >= MIN_RESIDUALS and _rms(std) > 0:
                scale = fitted[name].scale
    return Calibration(**fitted)


def levels_of(prediction: SetPrediction, calibration: Calibration) -> Levels:
    """What calibration frames show, for guards of simulations.

    Args:
        prediction: of the calibration frames.
        calibration: that was fitted on them.
    """
    total = calibration.total_std(prediction).get("forces") if prediction.forces_std is not None else None
    return Levels.of(total, prediction.ood_score, int(prediction.n_atoms.sum()))


def wrong_frames(prediction: SetPrediction, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(F,) frames whose label of a property is wrong beyond doubt, as predictions show (``data.doubt``)."""
    # here: the package of the data opens slowly, and loading a model needs none of it
    from blip_ft.data.check.doubt import wrong_energies, wrong_forces, wrong_stress

    ends = np.cumsum(prediction.n_atoms)[:-1]
    if name == "stress":
        return wrong_stress(prediction.stress_label, prediction.stress)
    if name == "forces":
        return wrong_forces(np.split(prediction.forces_label, ends), np.split(prediction.forces, ends))
    square = np.where(np.isfinite(prediction.forces_error), prediction.forces_error, np.nan) ** 2
    force_error = np.sqrt(prediction.mean_over_atoms(square.mean(axis=1)))
    return wrong_energies(np.split(prediction.numbers, ends), prediction.energy_error, force_error)


def _carrier(error: FloatArray, total: FloatArray, frame: IntArray) -> tuple[int | None, float]:
    """The frame that alone widens the error bars, and by how much.

    Mean squared z-scores of frames are compared: the largest with the mean of the others, as the square of Student's t
    of F - 1 degrees of freedom, corrected for having looked for the largest of F.

    Args:
        error: (N,) residuals.
        total: (N,) total stds.
        frame: (N,) of each residual.

    Returns:
        The frame and the factor by which the error bars are wider with it; ``None`` and 1 where there is none.
    """
    z2 = np.divide(error, total, out=np.zeros_like(error), where=np.broadcast_to(total > 0, error.shape)) ** 2
    names, index, count = np.unique(frame, return_inverse=True, return_counts=True)
    sums = np.bincount(index, weights=z2, minlength=names.size)
    rest, n = sums.sum() - sums, count.sum() - count
    k = int(np.argmax(sums / count))
    if names.size < 3 or rest[k] <= 0:
        return None, 1.0
    factor = math.sqrt(z2.mean() / (rest[k] / n[k]))
    if factor < CARRIED:
        return None, 1.0
    from scipy.stats import t

    others = np.delete(sums / count, k).mean()
    chance = 2 * names.size * t.sf(math.sqrt(sums[k] / count[k] / others), names.size - 1)
    return (int(names[k]), factor) if chance < CHANCE else (None, 1.0)


def fit(
    error: ArrayLike,
    std: ArrayLike | None,
    frame: ArrayLike | None = None,
    *,
    scale_prior: float = SCALE_PRIOR,
    scale: float | None = None,
) -> PropertyCalibration:
    """Fit one property.

    Args:
        error: (N,) residuals, finite.
        std: (N,) epistemic stds, or ``None`` for a model without (then a = rms of ``error``).
        frame: (N,) frame that each residual belongs to; by default each is its own.
        scale_prior: std of the prior of ln(scale); ``math.inf`` for plain maximum likelihood.
        scale: c, where it is known; a alone is then fitted.

    Raises:
        ValueError: no residuals, lengths that differ, negative or non-finite values.
    """
    e = np.asarray(error, dtype=np.float64).reshape(-1)
    s = np.zeros_like(e) if std is None else np.asarray(std, dtype=np.float64).reshape(-1)
    owner = np.arange(e.size) if frame is None else np.asarray(frame).reshape(-1)
    if e.size == 0 or not e.size == s.size == owner.size:
        raise ValueError(f"{e.size} residuals, {s.size} stds, {owner.size} frames")
    if not (np.isfinite(e).all() and np.isfinite(s).all() and (s >= 0).all()):
        raise ValueError("residuals and stds must be finite, stds not negative")
    n_frames = int(np.unique(owner).size)
    from scipy.stats import kurtosis  # here, as all of the module's imports of scipy: it opens slowly

    rms, spread = _rms(e), _rms(s)
    telling = (np.abs(e) > _ZERO * rms) | (s > _ZERO * spread)
    if rms == 0.0:
        aleatoric, scale = 0.0, 1.0 if scale is None else scale
    elif spread == 0.0:
        aleatoric, scale = rms, 0.0 if std is None else 1.0
    elif scale is not None or e.size < MIN_RESIDUALS:
        scale = 1.0 if scale is None else scale
        aleatoric = _noise_only(e[telling], scale * s[telling])
    else:
        aleatoric, scale = _noise_and_scale(e[telling], s[telling], 1.0 / (n_frames * scale_prior**2))
    calibrated = PropertyCalibration(aleatoric, scale)
    total = calibrated.total(s)
    z = np.divide(e, total, out=np.zeros_like(e), where=total > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        before = _nll(e[telling], s[telling] ** 2)
        zms = float(np.mean((e[telling] / s[telling]) ** 2)) if telling.any() else math.inf
    return PropertyCalibration(
        aleatoric=aleatoric,
        scale=scale,
        n_residuals=int(e.size),
        n_frames=n_frames,
        nll_before=_finite(before),
        nll_after=_finite(_nll(e[telling], total[telling] ** 2)),
        zms_before=_finite(zms),
        excess_kurtosis=_finite(float(kurtosis(z))) if e.size >= 4 and np.ptp(z) > 0 else None,
        conformal={level: conformal_quantile(np.abs(z), level, owner) for level in LEVELS},
    )


def conformal_quantile(scores: ArrayLike, level: float, groups: ArrayLike | None = None) -> float:
    r"""Split-conformal quantile of scores \|e\|/std, with the finite-sample correction.

    With one score per frame it is the ceil((n+1) level)-th smallest of n scores (Vovk et al.
    2005; Lei et al. 2018). Scores of one frame are not exchangeable with those of another one
    by one, only frames are: with ``groups`` every one of K frames has weight 1/(K+1), shared
    evenly among its scores, and a new frame has the rest at infinity (hierarchical conformal
    prediction, Lee, Barber and Willett 2023, arXiv 2306.06342). Then a random component of a
    new, exchangeable frame lies inside with probability at least ``level``. Frames far from
    the calibration data are not exchangeable with it, and no interval made here holds there.

    Args:
        scores: (N,) not negative.
        level: wanted coverage, in (0, 1).
        groups: (N,) frame of each score; by default each is its own.

    Returns:
        The quantile; ``inf`` where there are too few frames for the level.
    """
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    owner = np.arange(values.size) if groups is None else np.asarray(groups).reshape(-1)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if values.size == 0:
        return math.inf
    _, index, counts = np.unique(owner, return_inverse=True, return_counts=True)
    weight = 1.0 / (counts[index] * (counts.size + 1.0))
    order = np.argsort(values, kind="stable")
    # 1e-12: the sum of the weights is rounded, the level may sit exactly on a step
    reached = np.flatnonzero(np.cumsum(weight[order]) >= level - 1e-12)
    return float(values[order][reached[0]]) if reached.size else math.inf


def gaussian_nll(error: ArrayLike, std: ArrayLike) -> FloatArray:
    """Negative log density of N(0, std^2) at ``error``, elementwise."""
    from scipy.stats import norm

    return -np.asarray(norm.logpdf(error, scale=std), dtype=np.float64)


# ---- the fits --------------------------------------------------------------------------------


def _rms(x: FloatArray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _nll(e: FloatArray, variance: FloatArray) -> float:
    """Mean Gaussian NLL; ``inf`` where a variance is zero."""
    if e.size == 0 or (variance <= 0).any():
        return math.inf
    return float(np.mean(0.5 * (np.log(2 * np.pi * variance) + e**2 / variance)))


def _noise_only(e: FloatArray, s: FloatArray) -> float:
    """Best a beside a spread s. The optimum lies below max|e|: above it the NLL only grows."""
    top = float(np.abs(e).max())
    return _refined_minimum(lambda a: _nll(e, a**2 + s**2), top * np.logspace(-5, 0, 51), [0.0])


def _noise_and_scale(e: FloatArray, s: FloatArray, prior: float) -> tuple[float, float]:
    """Best (a, c) by the profile over w; ``prior`` = 1/(frames * variance of ln c)."""
    s2 = s**2 / np.mean(s**2)

    def factors(logit: float) -> tuple[float, float]:
        """(a^2, c^2 <s^2>) with the most likely common factor t for a given logit(w)."""
        noise, scale = _sigmoid(-logit), _sigmoid(logit)
        t = float(np.mean(e**2 / (noise + scale * s2)))
        return t * noise, t * scale

    def loss(logit: float) -> float:
        a2, c2 = factors(logit)
        if prior == 0.0:
            return _nll(e, a2 + c2 * s2)
        if c2 == 0.0:
            return math.inf
        return _nll(e, a2 + c2 * s2) + 0.5 * prior * (0.5 * math.log(c2 / np.mean(s**2))) ** 2

    ends = [-math.inf, math.inf] if s.min() > 0 else [-math.inf]
    best = _refined_minimum(loss, _LOGITS, ends)
    a2, c2 = factors(best)
    return math.sqrt(a2), math.sqrt(c2 / np.mean(s**2))


def _refined_minimum(f: Callable[[float], float], grid: FloatArray, ends: Sequence[float]) -> float:
    """Where ``f`` is smallest: every local minimum on the ascending ``grid``, refined between
    its neighbours, and the exact ``ends``.
    """
    from scipy.optimize import minimize_scalar

    values = np.array([f(float(x)) for x in grid])
    padded = np.concatenate([[math.inf], values, [math.inf]])
    valleys: IntArray = np.flatnonzero((padded[1:-1] <= padded[:-2]) & (padded[1:-1] <= padded[2:]))
    candidates: list[tuple[float, float]] = [(f(x), x) for x in [*ends, *grid[valleys].tolist()]]
    for i in valleys:
        bounds = (float(grid[max(i - 1, 0)]), float(grid[min(i + 1, grid.size - 1)]))
        found = minimize_scalar(f, bounds=bounds, method="bounded", options={"xatol": 1e-10})
        candidates.append((float(found.fun), float(found.x)))
    return min(candidates)[1]


def _sigmoid(x: float) -> float:
    """Logistic function, exactly 0 and 1 at -inf and inf."""
    return 0.0 if x == -math.inf else float(1.0 / (1.0 + np.exp(-x)))
