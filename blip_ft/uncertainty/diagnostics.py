"""Failure signatures of variational fine-tuning: what goes wrong, how it shows, what to do.

Four failures are known from the method's paper and its reproductions: error bars far too wide
on data like the training set, far too narrow on data unlike it, a posterior that explodes, and
one that never leaves its start. Found beside them: a spread that the calibration had to switch off, one
calibration frame that alone widens all error bars, and labels that no calibration should see. Each has a
detector here, and a remedy in terms of recipe keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from blip_ft.errors import readable
from blip_ft.potential.calibration import PROPERTIES, Calibration, PropertyCalibration
from blip_ft.uncertainty.metrics import single_sets

#: calibrated scale below which the model's own spread was shrunk beyond reason
SMALL_SCALE = 1 / 3
#: mean squared z-score on calibration frames, before calibration, below which bars are too wide
WIDE_ZMS = 0.25
#: mean squared z-score on an unseen set above which bars are too narrow
NARROW_ZMS = 4.0
#: coverage of the 90 % interval on an unseen set below which bars are too narrow
NARROW_COVERAGE = 0.6
#: posterior std, in units of the prior's, above which the posterior explodes
EXPLODED_STD = 2.0
#: growth of the posterior std over the run that is worth a warning
EXPLODED_GROWTH = 10.0
#: change of ln(posterior std) over the run below which it never left its start
STUCK_CHANGE = 1e-2


@dataclass(frozen=True)
class Diagnostic:
    """One failure that was found.

    Attributes:
        name: ``over_wide_seen``, ``spread_switched_off``, ``over_narrow_unseen``,
            ``exploding_variance``, ``sigma_stuck``, ``one_frame_carries_the_scale`` or ``wrong_labels``.
        severity: ``error``: do not use the error bars; ``warning``: read before you do.
        message: what was seen, with numbers.
        remedy: what to change, in terms of recipe keys.
    """

    name: str
    severity: Literal["error", "warning"]
    message: str
    remedy: str

    def to_dict(self) -> dict[str, str]:
        """JSON-serialisable form."""
        return asdict(self)


def find_diagnostics(
    *,
    metrics: Mapping[str, Mapping[str, Any]],
    calibration: Calibration,
    history: Sequence[Mapping[str, Any]],
) -> list[Diagnostic]:
    """Run every detector.

    Args:
        metrics: of the Bayesian model by test set, as from ``metrics_table``.
        calibration: as fitted on the calibration frames.
        history: one mapping per epoch, in order. Read here: ``epoch``, ``train_loss``, and
            ``posterior_std_mean``, the geometric mean over weights of posterior std / prior std.
    """
    found: list[Diagnostic] = []
    for name in PROPERTIES:
        item: PropertyCalibration = getattr(calibration, name)
        found += wrong_labels(name, item) + one_frame_carries(name, item) + over_wide_seen(name, item)
    return found + over_narrow_unseen(metrics) + exploding_variance(history) + sigma_stuck(history)


def wrong_labels(name: str, item: PropertyCalibration) -> list[Diagnostic]:
    """Calibration frames that were left out, as their labels are wrong beyond doubt."""
    if not item.left_out:
        return []
    return [
        Diagnostic(
            "wrong_labels",
            "warning",
            f"{name}: the labels of {len(item.left_out)} calibration frames are wrong beyond doubt and took no part in "
            f"the calibration ({_some(item.left_out)})",
            "mend the labels or remove the frames, and look for more of the kind in the other sets",
        )
    ]


def one_frame_carries(name: str, item: PropertyCalibration) -> list[Diagnostic]:
    """One calibration frame that alone makes the error bars much wider."""
    if not item.carried_by:
        return []
    return [
        Diagnostic(
            "one_frame_carries_the_scale",
            "warning",
            f"{name}: one frame carries the scale of the error bars ({item.carried_by}): without it they would be "
            f"{item.carried_factor:.2g} times narrower",
            "look at the labels of this frame, and remove it if they are wrong; if they are right, frames like it are "
            "too rare to calibrate on: give more calibration frames",
        )
    ]


def over_wide_seen(name: str, item: PropertyCalibration) -> list[Diagnostic]:
    """Error bars of one property against the residuals of the calibration frames.

    A small scale alone has two causes, which need opposite remedies: the spread is too large
    (mean squared z below 1 before calibration), or it is not but follows the errors so badly
    that a constant explains them better.
    """
    zms = item.zms_before
    if zms is None:
        return []
    wide = zms < WIDE_ZMS or (item.scale < SMALL_SCALE and zms < 1)
    if wide:
        return [
            Diagnostic(
                "over_wide_seen",
                "warning",
                f"{name}: on the calibration frames the model's own error bars are about "
                f"{_ratio(zms)} times as wide as the errors (mean squared z {zms:.2g}); "
                f"calibration multiplied them by {item.scale:.2g}",
                "narrow the posterior: a smaller posterior.prior_scale, a lower objective.temperature "
                "or a smaller objective noise (forces_std, energy_std); if training stopped early, "
                "train longer (trainer.max_epochs) so that the data can narrow it",
            )
        ]
    if item.scale < SMALL_SCALE:
        return [
            Diagnostic(
                "spread_switched_off",
                "warning",
                f"{name}: the spread of the draws does not follow the errors of the calibration "
                f"frames; calibration put the error bar into constant noise (scale {item.scale:.2g})",
                "expect little more than a constant error bar, far from the data too: give more "
                "calibration frames, more draws (uncertainty.n_draws), or a correlated posterior "
                "(posterior.family: pathwise)",
            )
        ]
    return []


def over_narrow_unseen(metrics: Mapping[str, Mapping[str, Any]]) -> list[Diagnostic]:
    """Error bars of forces on every unseen set (the pooled sets are skipped)."""
    found = []
    for name in single_sets(metrics):
        if name == "seen":
            continue
        zms, coverage = _number(metrics[name], "zms"), _number(metrics[name], "coverage90")
        if (zms is not None and zms > NARROW_ZMS) or (coverage is not None and coverage < NARROW_COVERAGE):
            facts = [f"mean squared z {zms:.3g}" if zms is not None else ""]
            facts += [
                f"{100 * coverage:.0f} % of the labels inside the 90 % interval"
                if coverage is not None
                else ""
            ]
            found.append(
                Diagnostic(
                    "over_narrow_unseen",
                    "warning",
                    f"forces of '{name}': error bars are too narrow ({', '.join(f for f in facts if f)})",
                    "do not trust the error bars on structures like these. Widen the posterior where "
                    "the training data say nothing: a larger posterior.prior_scale, a correlated "
                    "posterior (posterior.family: pathwise), noise on more modules (model.noise: all); "
                    "best of all, label a few such frames and train on them",
                )
            )
    return found


def exploding_variance(history: Sequence[Mapping[str, Any]]) -> list[Diagnostic]:
    """A posterior std far above the prior's or its start, or training that is not finite."""
    remedy = (
        "keep the posterior near the prior: a smaller optimizer.std_learning_rate, a shorter "
        "objective.kl_warmup, objective.temperature nearer 1, and a smaller posterior.init_std"
    )
    for row in history:
        for key in ("posterior_std_mean", "train_loss"):
            value = row.get(key)
            if value is not None and not math.isfinite(value):
                return [
                    Diagnostic(
                        "exploding_variance",
                        "error",
                        f"{key.replace('_', ' ')} is {readable(value)} at epoch {_epoch(row)}",
                        f"{remedy}; also a smaller optimizer.learning_rate and trainer.gradient_clip_val",
                    )
                ]
    stds = _series(history, "posterior_std_mean")
    if not stds:
        return []
    if stds[-1] > EXPLODED_STD:
        return [
            Diagnostic(
                "exploding_variance",
                "error",
                f"the mean posterior std ended at {stds[-1]:.3g} times the prior's (start {stds[0]:.3g})",
                remedy,
            )
        ]
    if stds[0] > 0 and stds[-1] > EXPLODED_GROWTH * stds[0]:
        return [
            Diagnostic(
                "exploding_variance",
                "warning",
                f"the mean posterior std grew {stds[-1] / stds[0]:.3g}-fold over the run, to "
                f"{stds[-1]:.3g} times the prior's",
                "if error bars on seen data are right this is the data's verdict and only "
                f"posterior.init_std was small (start nearer {stds[-1]:.2g} x prior_scale); else {remedy}",
            )
        ]
    return []


def sigma_stuck(history: Sequence[Mapping[str, Any]]) -> list[Diagnostic]:
    """A posterior std that did not move: the error bars are then the recipe's, not the data's."""
    stds = _series(history, "posterior_std_mean")
    if len(stds) < 2 or min(stds) <= 0:
        return []
    change = max(abs(math.log(s / stds[0])) for s in stds)
    if change >= STUCK_CHANGE:
        return []
    return [
        Diagnostic(
            "sigma_stuck",
            "warning",
            f"the mean posterior std never left its start ({stds[0]:.3g} of the prior's; largest "
            f"relative change {change:.1g}): the error bars are those of posterior.init_std",
            "a larger optimizer.std_learning_rate, more epochs (trainer.max_epochs), fixed training "
            "noise (objective.learn_noise: false), and check that model.noise matches modules",
        )
    ]


def _some(frames: Sequence[str], most: int = 5) -> str:
    return ", ".join(frames[:most]) + (f" and {len(frames) - most} more" if len(frames) > most else "")


def _ratio(zms: float) -> str:
    return f"{1 / math.sqrt(zms):.2g}" if zms > 0 else "infinitely many"


def _epoch(row: Mapping[str, Any]) -> str:
    return f"{row['epoch']:.0f}" if "epoch" in row else "?"


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return None if value is None else float(value)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The finite values of a column, in order."""
    values = [row.get(key) for row in history]
    return [float(v) for v in values if v is not None and math.isfinite(v)]
