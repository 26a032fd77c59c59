"""How good predictions and their error bars are.

e = label - prediction, s = **total** std (aleatoric and scaled epistemic, see ``calibration``)
unless the epistemic std is named. Errors of energies are per atom, those of forces per
component; a structure's force error is the mean over its atoms of the error vector's norm.

==================================  ==========================================================
key                                 meaning
==================================  ==========================================================
``energy_mae_mev_per_atom``         mean absolute error; likewise ``energy_rmse_...``
``force_mae_mev_per_ang``           mean absolute error per component; ``force_rmse_...``
``stress_mae_gpa``                  mean absolute error per component
``energy_crps_mev_per_atom``        CRPS of N(prediction, s^2), closed form (Gneiting and
                                    Raftery 2007, eq. 21); ``force_crps_mev_per_ang``
``force_nll``                       mean Gaussian NLL per component, e and s in eV/Å
``coverage90``                      share of force components inside 1.645 s;
                                    ``coverage90_energy``
``zms``                             mean (e/s)^2 of force components; 1 is right
``ence``                            mean over bins of s of |RMV - RMSE| / RMV (Levi et al. 2022)
``spread_skill``                    sqrt(mean s^2) / RMSE of force components; 1 is right
``miscalibration_area``             area between observed and expected coverage of central
                                    intervals, force components; 0 is right, 0.5 the worst
``spearman_atom``                   rank correlation of the **epistemic** ``forces_std_norm``
                                    with the norm of the atom's error vector
``spearman_structure``              the same of their means over the atoms of a structure
``spearman_*_reference``            what these would be if the error bars were exactly right:
                                    mean over simulated errors N(0, s^2) (Rasmussen et al.
                                    2023). Errors of the atoms of a structure are simulated as
                                    independent, so per structure it is an upper bound.
``spearman_atom_null_force``        |predicted force| in place of the uncertainty
``spearman_structure_null_energy``  predicted energy per atom in place of the uncertainty
``partial_spearman_structure``      ``spearman_structure`` given the predicted energy per atom
``spearman_atom_ood``               out-of-distribution score (``ood``) in place of the std
``spearman_structure_ood``          the structure's largest score with its mean error norm
``partial_spearman_structure_ood``  the same given the predicted energy per atom
``ood_score_median``                median score of the atoms: 1 is like the training set
``n_structures``, ``n_atoms``       sizes of the set
``n_energy_labels``                 energies that the scores of energies rest on; ``n_force_labels``,
                                    ``n_stress_labels``: components
``n_ranked_atoms``                  atoms that rank correlations rest on; ``n_ranked_structures``
==================================  ==========================================================

A key is present where it has a meaning (a label, a std), and ``None`` where the frames do not
determine it (a rank correlation of fewer than three items or of constant values). No
correction for the finite number of draws is made: c was fitted with that same number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
from ase import units
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, norm, spearmanr

from blip_ft.errors import DataError
from blip_ft.objectives.crps import gaussian_crps
from blip_ft.potential.calibration import Calibration
from blip_ft.uncertainty.calibration import gaussian_nll, residuals
from blip_ft.uncertainty.results import FloatArray, SetPrediction

Metrics = dict[str, float | int | None]

#: numbers that rest on fewer values than this say so wherever they are shown
FEW = 5

#: half width of the central 90 % interval of a Gaussian, in stds
Z90 = float(norm.ppf(0.95))
#: stds below this (eV/atom, eV/Å) are taken as this, so that scores stay finite
MIN_STD = 1e-12
#: simulated sets of errors behind ``spearman_*_reference``
N_REFERENCE = 20
#: names that a test set cannot have beside others: they stand for pooled sets
POOLED = ("unseen", "all")


def single_sets(names: Collection[str]) -> list[str]:
    """The names of a table of metrics without those of pools, ``seen`` first.

    A set called ``unseen`` is a pool where there are other unseen sets, else it is a set.
    """
    own = [n for n in names if n not in POOLED]
    if "unseen" in names and not set(own) - {"seen"}:
        own.append("unseen")
    return sorted(own, key=lambda n: n != "seen")


def basis(metrics: Mapping[str, float | int | None], key: str) -> int | None:
    """How many values the metric ``key`` of a set rests on; ``None`` where nobody has counted."""
    if "structure" in key:
        name = "n_ranked_structures"
    elif "spearman" in key:
        name = "n_ranked_atoms"
    elif "energy" in key:
        name = "n_energy_labels"
    elif key.startswith("stress"):
        name = "n_stress_labels"
    else:
        name = "n_atoms" if key.startswith("ood") else "n_force_labels"
    count = metrics.get(name)
    return None if count is None else int(count)


# ---- scores of residuals ---------------------------------------------------------------------


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Spearman's rho of the pairs without NaN; ``None`` below three pairs or if one is constant."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if x.size < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def partial_spearman(a: ArrayLike, b: ArrayLike, given: ArrayLike) -> float | None:
    """Rank correlation of ``a`` and ``b`` with the linear effect of the ranks of ``given`` removed.

    The first-order partial correlation (r_ab - r_ac r_bc) / sqrt((1 - r_ac^2)(1 - r_bc^2)) of
    the ranks; Conover, *Practical Nonparametric Statistics*, 3rd ed. (1999), section 5.4.
    ``None`` below four triples, for constant values, and where ``given`` fixes a or b.
    """
    x, y, z = (np.asarray(v, dtype=np.float64) for v in (a, b, given))
    known = np.isfinite(x) & np.isfinite(y) & np.isfinite(z)
    if known.sum() < 4:
        return None
    x, y, z = x[known], y[known], z[known]
    ab, ac, bc = spearman(x, y), spearman(x, z), spearman(y, z)
    if ab is None or ac is None or bc is None:
        return None
    rest = (1 - ac**2) * (1 - bc**2)
    return (ab - ac * bc) / math.sqrt(rest) if rest > 1e-12 else None


def coverage_curve(error: ArrayLike, std: ArrayLike, levels: ArrayLike) -> FloatArray:
    """Share of errors inside the central Gaussian interval of each level (observed coverage)."""
    inside = np.sort(_central_level(error, std))
    counts = np.searchsorted(inside, np.asarray(levels, dtype=np.float64), side="right")
    return np.asarray(counts / max(inside.size, 1), dtype=np.float64)


def miscalibration_area(error: ArrayLike, std: ArrayLike) -> float:
    """Integral over p in (0, 1) of |observed coverage(p) - p|, exact for the step function.

    Tran et al. 2020 (Mach. Learn.: Sci. Technol. 1, 025006), with central intervals.
    """
    inside = np.sort(_central_level(error, std))
    edges = np.concatenate([[0.0], inside, [1.0]])
    step = np.arange(inside.size + 1) / inside.size

    def primitive(p: FloatArray) -> FloatArray:
        """Antiderivative of |step - p| in p."""
        return 0.5 * (p - step) * np.abs(p - step)

    return float((primitive(edges[1:]) - primitive(edges[:-1])).sum())


def _central_level(error: ArrayLike, std: ArrayLike) -> FloatArray:
    """Level of the smallest central Gaussian interval that holds each error."""
    z = np.abs(np.asarray(error, dtype=np.float64)) / np.maximum(np.asarray(std, dtype=np.float64), MIN_STD)
    return np.asarray(2 * norm.cdf(z) - 1, dtype=np.float64).reshape(-1)


def binned_errors(
    error: ArrayLike, std: ArrayLike, *, n_bins: int = 10, min_count: int = 10
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Error against std in bins of equal counts of ascending std.

    Equal stds stay in one bin; fewer bins are made rather than bins below ``min_count``.

    Returns:
        RMV = sqrt(mean std^2), RMSE and count of each bin, each (bins,).
    """
    e = np.asarray(error, dtype=np.float64).reshape(-1)
    s = np.broadcast_to(np.asarray(std, dtype=np.float64), np.shape(error)).reshape(-1)
    bins = max(1, min(n_bins, e.size // min_count))
    inner = np.unique(np.quantile(s, np.arange(1, bins) / bins)) if e.size else np.zeros(0)
    which = np.searchsorted(inner, s, side="left")
    count = np.bincount(which, minlength=1).astype(np.float64)
    filled = count > 0
    rmv = np.sqrt(np.bincount(which, weights=s**2, minlength=1)[filled] / count[filled])
    rmse = np.sqrt(np.bincount(which, weights=e**2, minlength=1)[filled] / count[filled])
    return rmv, rmse, count[filled]


def ence(error: ArrayLike, std: ArrayLike, *, n_bins: int = 10) -> float:
    """Expected normalised calibration error, mean over bins of |RMV - RMSE| / RMV.

    Levi et al. 2022 (Sensors 22, 5540). Its value for perfect error bars is not 0 but falls as
    sqrt(bins / N) (Pernot 2023, arXiv 2305.11905).
    """
    rmv, rmse, _ = binned_errors(error, std, n_bins=n_bins)
    return float(np.mean(np.abs(rmv - rmse) / np.maximum(rmv, MIN_STD)))


def bootstrap_ci(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval over frames of a (weighted) mean.

    Args:
        values: (F,) one number per frame (see :func:`per_frame`); the difference of two models
            on the same frames makes it a paired comparison. NaN are left out.
        weights: (F,) for instance atoms per frame, so that the mean is that over atoms.
        level: of the interval.
        n_resamples: bootstrap samples.
        seed: the same seed gives the same interval.

    Returns:
        (low, high), or ``None`` for fewer than two frames.
    """
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    known = np.isfinite(v)
    if known.sum() < 2:
        return None

    def mean(v: FloatArray, w: FloatArray, axis: int = -1) -> FloatArray:
        return np.asarray((v * w).sum(axis=axis) / w.sum(axis=axis), dtype=np.float64)

    found = bootstrap(
        (v[known], w[known]),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, 10_000_000 // int(known.sum())),
        confidence_level=level,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


# ---- metrics of a set ------------------------------------------------------------------------


def per_frame(prediction: SetPrediction, calibration: Calibration | None = None) -> dict[str, FloatArray]:
    """One number per frame, (F,) each, NaN where not defined: what bootstraps resample.

    Keys ``energy_mae_mev_per_atom`` and ``force_mae_mev_per_ang``; with a calibration also
    ``energy_crps_mev_per_atom``, ``force_crps_mev_per_ang`` and ``force_nll``; ``force_error`` (eV/Å, mean
    norm) and, for a model with spread, ``force_uncertainty`` (eV/Å, mean epistemic norm).
    Force values are means over the frame's components: weight them by ``n_atoms``.
    """
    error, std = prediction.forces_error, _stds(prediction, calibration)

    def forces(components: FloatArray) -> FloatArray:
        return prediction.mean_over_atoms(components.mean(axis=1))

    out = {
        "energy_mae_mev_per_atom": 1e3 * np.abs(prediction.energy_error),
        "force_mae_mev_per_ang": 1e3 * forces(np.abs(error)),
        "force_error": prediction.mean_over_atoms(np.linalg.norm(error, axis=1)),
    }
    if "energy" in std:
        out["energy_crps_mev_per_atom"] = 1e3 * gaussian_crps(prediction.energy_error, std["energy"])
    if "forces" in std:
        out["force_crps_mev_per_ang"] = 1e3 * forces(gaussian_crps(error, std["forces"]))
        out["force_nll"] = forces(gaussian_nll(error, np.maximum(std["forces"], MIN_STD)))
    if prediction.forces_std_norm is not None:
        known = np.isfinite(error).all(axis=1)
        out["force_uncertainty"] = prediction.mean_over_atoms(
            np.where(known, prediction.forces_std_norm, np.nan)
        )
    return out


def set_metrics(
    prediction: SetPrediction, calibration: Calibration | None = None, *, seed: int = 0
) -> Metrics:
    """All metrics of the module's table that have a meaning for one set of frames.

    Args:
        prediction: of the set.
        calibration: turns the epistemic std into the total one; what it has not measured has no probabilistic
            scores. Without it the epistemic std is taken as it is; a model without spread then has no
            probabilistic scores. For such a model give ``rmse_calibration(validation)``: a constant std.
        seed: of the simulated reference correlations.
    """
    out: Metrics = {"n_structures": prediction.n_structures, "n_atoms": int(prediction.n_atoms.sum())}
    std = _stds(prediction, calibration)
    for name, prefix, unit, scale in (
        ("energy", "energy", "mev_per_atom", 1e3),
        ("forces", "force", "mev_per_ang", 1e3),
    ):
        error, _, _ = residuals(prediction, name)
        if error.size == 0:
            continue
        out[f"n_{prefix}_labels"] = int(error.size)
        out[f"{prefix}_mae_{unit}"] = scale * float(np.abs(error).mean())
        out[f"{prefix}_rmse_{unit}"] = scale * float(np.sqrt((error**2).mean()))
        if name in std:
            s = std[name][np.isfinite(getattr(prediction, f"{name}_error"))]
            out[f"{prefix}_crps_{unit}"] = scale * float(gaussian_crps(error, s).mean())
            out["coverage90" if name == "forces" else "coverage90_energy"] = float(
                (np.abs(error) <= Z90 * s).mean()
            )
            if name == "forces":
                out |= _force_calibration(error, s)
    stress, _, _ = residuals(prediction, "stress")
    if stress.size:
        out["stress_mae_gpa"] = float(np.abs(stress).mean() / units.GPa)
        out["n_stress_labels"] = int(stress.size)
    if prediction.ood_score is not None and prediction.ood_score.size:
        median = float(np.median(prediction.ood_score))
        out["ood_score_median"] = median if math.isfinite(median) else None
    if np.isfinite(prediction.forces_error).any():
        out |= _rankings(prediction, std.get("forces"), seed)
    return out


def metrics_table(
    predictions: Mapping[str, SetPrediction], calibration: Calibration | None = None, *, seed: int = 0
) -> dict[str, Metrics]:
    """Metrics of every test set, of all unseen sets pooled (``unseen``) and of all (``all``).

    Args:
        predictions: by name of the test set: ``seen`` and any number of unseen ones.
        calibration: as in :func:`set_metrics`.
        seed: of the simulated reference correlations.

    Raises:
        DataError: a set is called ``all``, or ``unseen`` while there are other unseen ones.
    """
    unseen = [n for n in predictions if n != "seen"]
    if "all" in unseen or ("unseen" in unseen and len(unseen) > 1):
        clash = "all" if "all" in unseen else "unseen"
        raise DataError(
            f"a test set cannot be called '{clash}': that name stands for several sets together",
            remedy="rename the set",
            field="data.test",
        )
    sets = dict(predictions)
    if unseen:
        sets["unseen"] = SetPrediction.concatenate([predictions[n] for n in unseen], "unseen")
    if predictions:
        sets["all"] = SetPrediction.concatenate(list(predictions.values()), "all")
    return {name: set_metrics(p, calibration, seed=seed) for name, p in sets.items()}


def _stds(prediction: SetPrediction, calibration: Calibration | None) -> dict[str, FloatArray]:
    """Total std per property where there is one; energies **per atom**; never below MIN_STD.

    A calibration without labels of a property does not say what its total std is. One without any labels
    (``Calibration.identity``) stands for the posterior's own error bars.
    """
    calibration = calibration or Calibration.identity()
    total = calibration.total_std(prediction)
    if calibration != Calibration.identity():
        total = {name: s for name, s in total.items() if getattr(calibration, name).measured}
    if "energy" in total:
        total["energy"] /= prediction.n_atoms
    return {n: np.maximum(s, MIN_STD) for n, s in total.items()}


def _force_calibration(error: FloatArray, std: FloatArray) -> Metrics:
    """Scores of the error bars of force components."""
    rmse = float(np.sqrt((error**2).mean()))
    return {
        "force_nll": float(gaussian_nll(error, std).mean()),
        "zms": float(((error / std) ** 2).mean()),
        "ence": ence(error, std),
        "spread_skill": float(np.sqrt((std**2).mean())) / rmse if rmse > 0 else None,
        "miscalibration_area": miscalibration_area(error, std),
    }


def _rankings(prediction: SetPrediction, total: FloatArray | None, seed: int) -> Metrics:
    """Rank correlations of uncertainty and force error, their nulls and references."""
    norm_error = np.linalg.norm(prediction.forces_error, axis=1)
    structure_error = prediction.mean_over_atoms(norm_error)
    energy = prediction.energy / prediction.n_atoms
    out: Metrics = {
        "n_ranked_atoms": int(np.isfinite(norm_error).sum()),
        "n_ranked_structures": int(np.isfinite(structure_error).sum()),
        "spearman_atom_null_force": spearman(np.linalg.norm(prediction.forces, axis=1), norm_error),
        "spearman_structure_null_energy": spearman(energy, structure_error),
    }
    if prediction.ood_score is not None:
        # infinite, for elements without training atoms, is the highest rank
        score = np.minimum(prediction.ood_score, np.finfo(np.float64).max)
        largest = prediction.max_over_atoms(score)
        out["spearman_atom_ood"] = spearman(score, norm_error)
        out["spearman_structure_ood"] = spearman(largest, structure_error)
        out["partial_spearman_structure_ood"] = partial_spearman(largest, structure_error, energy)
    spread = prediction.forces_std_norm
    if spread is None:
        return out
    spread = np.where(np.isfinite(norm_error), spread, np.nan)
    structure_spread = prediction.mean_over_atoms(spread)
    out["spearman_atom"] = spearman(spread, norm_error)
    out["spearman_structure"] = spearman(structure_spread, structure_error)
    out["partial_spearman_structure"] = partial_spearman(structure_spread, structure_error, energy)
    if total is not None:
        rng = np.random.default_rng(seed)
        pairs = []
        for _ in range(N_REFERENCE):
            simulated = np.linalg.norm(rng.normal(size=total.shape) * total, axis=1)
            simulated[~np.isfinite(spread)] = np.nan
            of_structure = prediction.mean_over_atoms(simulated)
            pairs.append((spearman(spread, simulated), spearman(structure_spread, of_structure)))
        for key, rhos in zip(("atom", "structure"), zip(*pairs, strict=True), strict=True):
            known = [r for r in rhos if r is not None]
            out[f"spearman_{key}_reference"] = float(np.mean(known)) if known else None
    return out
