"""What all closed-form posteriors share: gradient rows, the scales, and a step of the mean, in the linearised model.

LinearizedModel are gradients of model outputs with respect to the noisy weights, in units of rms(w0), over the noise of
their label. The prior's scale s has a closed form: leave one group of training frames out at a time
in the linearised model and take the s with the best log likelihood of what was left out
(:func:`~blip_ft.families.base.spectrum.left_out_scores`). Derivations: docs/theory.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip_ft.families.base.spectrum import Scores, Spectrum, left_out_scores

#: s that are tried when the recipe says ``auto``
PRIOR_SCALES = tuple(float(s) for s in 10.0 ** np.arange(-2.5, 0.51, 0.125))


@dataclass
class LinearizedModel:
    """Gradients of model outputs at the present mean, in units of their label's noise.

    Attributes:
        gradients: (m, P) d(output)/d(weight) * D / noise, all noisy sites side by side; or their features, of a
            family that reduces rows as they are made (:class:`Collected`).
        targets: (m,) label minus output of the model linearised at its mean, at the pretrained
            weights, over the noise; NaN for context rows, which have no label.
        groups: (m,) group of the frame (trajectory, phase, ...), for the left-out rule.
        scored: (m,) rows whose likelihood counts in the left-out rule (forces).
        errors: (m,) label minus output at the mean, over the noise; NaN for context rows. Only
            :meth:`steps` needs it.
        keys: (m,) identity of the frame of each row (``blip_ft.data.frame.content_key``), where it is known.
    """

    gradients: Tensor
    targets: np.ndarray
    groups: np.ndarray
    scored: np.ndarray
    errors: np.ndarray | None = None
    keys: np.ndarray | None = None

    @property
    def is_train(self) -> np.ndarray:
        """(m,) rows that have a label."""
        finite: np.ndarray = np.isfinite(self.targets)
        return finite

    @property
    def labelled(self) -> Tensor:
        """(m', P) rows that have a label; without a copy where they come first, as large as all are."""
        train = self.is_train
        n = int(train.sum())
        if train[:n].all():
            return self.gradients[:n]
        return self.gradients[torch.from_numpy(train).to(self.gradients.device)]

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the labelled rows: the scales, the covariance and a step of the mean all need it."""
        return Spectrum.of_rows(self.labelled)

    def left_out(self, scales: Sequence[float], temperature: float) -> Scores:
        """Score of every group of labelled rows that is left out, for each s."""
        train = self.is_train
        return left_out_scores(
            self.spectrum,
            self.targets[train],
            self.groups[train],
            self.scored[train],
            scales=scales,
            temperature=temperature,
            rows=self.labelled if self.spectrum.of_weights else None,
        )

    def steps(self, scales: Sequence[float]) -> Tensor:
        """Steps of the weights, in units of rms(w0), towards the labels; (len(scales), P).

        argmin over d of 1/2 |e - G d|^2 + 1/2 |d|^2 / s^2 = G^T (G G^T + I/s^2)^-1 e: the mean of the
        linearised model at T = 1 whose prior N(theta, s^2) is centred at the present mean, that is one
        natural-gradient step of the ELBO's mean with a trust region in place of the pull to w0
        (Levenberg-Marquardt). G are the gradients of the labelled outputs, e is label minus output, over the noise
        (``errors``).

        Args:
            scales: values of s.
        """
        assert self.errors is not None
        return self.spectrum.weights(self.errors[self.is_train], [1 / s**2 for s in scales], self.labelled)


class Collected(ABC):
    """What a family that holds no rows keeps of them, in place of a :class:`LinearizedModel`.

    The mean makes no steps with it.

    Attributes:
        width: numbers that :meth:`features` leaves of a row.
    """

    width: int

    @abstractmethod
    def features(self, gradients: Tensor) -> Tensor:
        """(B, P) gradients, weights in units of rms -> (B, width), of which rows are made."""

    @abstractmethod
    def add(self, rows: LinearizedModel) -> None:
        """Take the next rows in; ``gradients`` are features, rows without a label are not used."""

    @abstractmethod
    def left_out(self, scales: Sequence[float], temperature: float) -> Scores:
        """As :meth:`LinearizedModel.left_out`."""


@dataclass
class ClosedFormData:
    """What a fit needs from the model and the data.

    Attributes:
        rows: gradient rows at the present mean, or what the family has kept of them.
        prior_scale: s; ``None`` to choose it by left-out groups.
        temperature: T; 1 is the noise of the labels as the objective states it.
    """

    rows: LinearizedModel | Collected
    prior_scale: float | None = None
    temperature: float = 1.0

    @property
    def held(self) -> LinearizedModel:
        """The rows, of a family that holds them."""
        assert isinstance(self.rows, LinearizedModel)
        return self.rows


def choose_scales(data: ClosedFormData, report: dict[str, Any]) -> tuple[float, float]:
    """Temperature T as given, prior scale s too or else by left-out groups (:func:`widest_as_good`).

    T is not chosen along with s: a large T explains what a linear model leaves unexplained as label
    noise, and a small s beside it is then as good as a wide one at T = 1, so that the smallest change of
    the rows moves the minimum from one to the other.

    Args:
        data: rows, and what is given.
        report: gets ``left_out_nll``, pairs of s and score.
    """
    if data.prior_scale is not None:
        return data.prior_scale, data.temperature
    table = data.rows.left_out(PRIOR_SCALES, data.temperature)
    report["left_out_nll"] = [[s, float(scores.mean())] for s, scores in table.items()]
    return widest_as_good(table), data.temperature


def widest_as_good(scores: dict[float, np.ndarray]) -> float:
    """The largest s whose score is within one standard error of the best one's.

    Where the groups that are left out lie close to the others, s hardly matters to them, and the minimum of a
    flat curve says nothing about frames farther away; of values that the groups cannot tell apart the widest
    is the one that errs on the side of caution. The standard error is that of the groups' paired differences
    (the rule of Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).

    Args:
        scores: {s: (G,) score of every group, less is better}.
    """
    best = min(scores, key=lambda s: scores[s].mean())
    widest = best
    for s, values in scores.items():
        if s > widest and as_good(values, scores[best]):
            widest = s
    return widest


def as_good(scores: np.ndarray, best: np.ndarray) -> bool:
    """Whether scores are within a standard error of the best ones, that of their paired differences.

    Args:
        scores: (F,) score of every frame or group, less is better.
        best: (F,) those of the best option.
    """
    loss = scores - best
    error = loss.std(ddof=1) / math.sqrt(len(loss)) if len(loss) > 1 else 0.0
    return bool(loss.mean() <= error)
