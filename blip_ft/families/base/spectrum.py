"""Linear algebra of the linearised model, from one eigendecomposition for all prior scales.

With G (m, P) the gradient rows, every solve of a fit is one with G G^T + c or with G^T G + c: for the steps of the
mean, the samples of the posterior, and for each of the prior scales that left-out groups compare. One
eigendecomposition of the smaller of the two matrices serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor

from blip_ft.families.base.gram import as_many_threads_as_torch, combine, gram_matrix, self_product

#: s -> (G,) scores of the left-out groups
Scores = dict[float, np.ndarray]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of G G^T, or of G^T G where there are far fewer weights than outputs.

    Attributes:
        values: (k,) ascending, at least 0.
        vectors: (k, k), one in every column.
        of_weights: k is P, the number of weights, not m, that of the outputs.
    """

    values: np.ndarray
    vectors: np.ndarray
    of_weights: bool = False

    @classmethod
    def of_rows(cls, rows: Tensor) -> Spectrum:
        """Of (m, P) rows, in the space that is smaller.

        That of weights has to be less than half the other: left-out groups need a decomposition each there.
        """
        if 2 * rows.shape[1] < len(rows):
            return cls.of_matrix(gram_matrix(rows.T), of_weights=True)
        return cls.of_matrix(gram_matrix(rows))

    @classmethod
    def of_matrix(cls, matrix: np.ndarray, *, of_weights: bool = False) -> Spectrum:
        """Of a Gram matrix."""
        with as_many_threads_as_torch():
            values, vectors = np.linalg.eigh(matrix)
        return cls(values.clip(min=0), vectors, of_weights)

    def solve(self, rhs: np.ndarray, noise: float) -> np.ndarray:
        """(k, n) -> (k, n) (matrix + noise)^-1 rhs."""
        with as_many_threads_as_torch():
            out: np.ndarray = self.vectors @ ((self.vectors.T @ rhs) / (self.values + noise)[:, None])
        return out

    def weights(self, errors: np.ndarray, noises: Sequence[float], rows: Tensor) -> Tensor:
        """G^T (G G^T + noise)^-1 e for several noises, (len(noises), P), in the precision of the rows.

        Args:
            errors: (m,) e.
            noises: positive numbers.
            rows: (m, P) G, of which this is the spectrum.
        """
        if self.of_weights:  # the same as (G^T G + noise)^-1 G^T e
            pulled = combine(errors[None], rows, torch.float64)[0].cpu().numpy()
            steps = np.stack([self.solve(pulled[:, None], noise)[:, 0] for noise in noises])
            return torch.from_numpy(steps).to(rows)
        return combine(np.stack([self.solve(errors[:, None], noise)[:, 0] for noise in noises]), rows)


def left_out_nll(
    gram: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    scored: np.ndarray,
    *,
    scales: Sequence[float],
    temperature: float = 1.0,
) -> Scores:
    """:func:`left_out_scores` from an (m, m) Gram matrix."""
    return left_out_scores(
        Spectrum.of_matrix(gram), targets, groups, scored, scales=scales, temperature=temperature
    )


def left_out_scores(
    spectrum: Spectrum,
    targets: np.ndarray,
    groups: np.ndarray,
    scored: np.ndarray,
    *,
    scales: Sequence[float],
    temperature: float = 1.0,
    rows: Tensor | None = None,
) -> Scores:
    """Score s by groups of training rows predicted from the other groups.

    The model is Bayesian linear regression on the rows, weights ~ N(0, s^2 I), noise variance T
    (rows are in units of their noise): in function space a Gaussian process with covariance C = s^2 G G^T + T. With
    A = C^-1 what is known of group g from all others is Gaussian, of error (A_gg)^-1 (A y)_g and covariance
    (A_gg)^-1 (Rasmussen and Williams 2006, section 5.4.2, for groups), so that no group and no s needs a
    decomposition of its own but that of the group's block. With few weights the law of the weights given the
    other groups, which costs one decomposition for each group, is written down instead.

    Args:
        spectrum: of the training rows.
        targets: (m,) label minus linearised pretrained model, over the noise.
        groups: (m,) group of each row; one group alone cannot be left out.
        scored: (m,) rows that count.
        scales: values of s.
        temperature: T.
        rows: (m, P) training rows; needed where the spectrum is that of the weights.

    Returns:
        {s: (G,) mean Gaussian NLL of the scored rows of every group that has some, when it is left out}.

    Raises:
        ValueError: fewer than two groups.
    """
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError("the left-out rule needs at least two groups")
    members = [inside for inside in (groups == name for name in names) if (inside & scored).any()]
    with as_many_threads_as_torch():
        if not spectrum.of_weights:
            return {s: _of_outputs(spectrum, targets, members, scored, s, temperature) for s in scales}
        assert rows is not None
        columns = [_of_weights(rows, targets, inside, scored, scales, temperature) for inside in members]
    return {s: np.array([column[i] for column in columns]) for i, s in enumerate(scales)}


def _of_outputs(
    spectrum: Spectrum,
    targets: np.ndarray,
    members: Sequence[np.ndarray],
    scored: np.ndarray,
    s: float,
    temperature: float,
) -> np.ndarray:
    """Score of each group from the inverse of the whole covariance."""
    inverse = 1 / (s * s * spectrum.values + temperature)
    whole = spectrum.vectors @ (inverse * (spectrum.vectors.T @ targets))
    scores = []
    for inside in members:
        mine = spectrum.vectors[inside]
        covariance = _inverse(self_product(mine * np.sqrt(inverse)), floor=inverse[-1])
        counted = scored[inside]
        error = (covariance @ whole[inside])[counted]
        scores.append(_nll(error, covariance.diagonal()[counted], temperature))
    return np.array(scores)


def _inverse(matrix: np.ndarray, floor: float) -> np.ndarray:
    """Inverse of a symmetric matrix whose eigenvalues cannot be less than ``floor``, but for rounding."""
    try:
        out: np.ndarray = cho_solve(cho_factor(matrix, lower=True), np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix)
        out = (vectors / values.clip(min=floor)) @ vectors.T
    return out


def _of_weights(
    rows: Tensor,
    targets: np.ndarray,
    inside: np.ndarray,
    scored: np.ndarray,
    scales: Sequence[float],
    temperature: float,
) -> list[float]:
    """Score of one group for every scale from the law of the weights given the other groups."""
    others = rows[torch.from_numpy(~inside).to(rows.device)]
    spectrum = Spectrum.of_matrix(gram_matrix(others.T), of_weights=True)
    pulled = combine(targets[~inside][None], others, torch.float64)[0].cpu().numpy()
    wanted = rows[torch.from_numpy(inside & scored).to(rows.device)].double().cpu().numpy()
    noises = [temperature / s**2 for s in scales]
    return scores_from_others(spectrum, pulled, wanted, targets[inside & scored], noises, temperature)


def scores_from_others(
    others: Spectrum,
    pulled: np.ndarray,
    rows: np.ndarray,
    targets: np.ndarray,
    noises: Sequence[float],
    temperature: float,
) -> list[float]:
    """Mean Gaussian NLL of rows that other rows predict, by the law of the weights that these leave.

    Args:
        others: of G^T G, G the other rows.
        pulled: (k,) G^T times their targets.
        rows: (n, k) that are predicted.
        targets: (n,) theirs.
        noises: T/s^2, for each s.
        temperature: T.
    """
    wanted, along = rows @ others.vectors, others.vectors.T @ pulled
    squares = wanted**2
    scores = []
    for noise in noises:
        spread = 1 / (others.values + noise)  # variance over T along each eigenvector
        error = targets - wanted @ (spread * along)
        scores.append(_nll(error, temperature * (1 + squares @ spread), temperature))
    return scores


def _nll(error: np.ndarray, variance: np.ndarray, temperature: float) -> float:
    variance = np.maximum(variance, 1e-12 * temperature)
    return float(np.mean(0.5 * np.log(2 * math.pi * variance) + 0.5 * error**2 / variance))
