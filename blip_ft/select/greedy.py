"""Batches: greedily by what labels would still teach, by the least distance from what is chosen, or by a score.

    gain(c | S) = 1/2 ln det (1 + Psi_c P_S Psi_c^T / T),        P_S = (1 + Psi_S^T Psi_S / T)^-1             (1)

is the information, in nats, that the labels of a frame c bring about the weights once those of S are known: Psi are
gradients of its outputs over the noise of their labels, in coordinates in which the posterior is N(0, 1). Gains only
fall as S grows (the information of Gaussian labels is submodular), so that an old one bounds the new one, and few have
to be computed anew (lazy greedy: Minoux 1978); the batch has at least 1 - 1/e of the information of the best one
(Nemhauser, Wolsey and Fisher 1978). Ties go by content key: the order of candidates changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from blip_ft.select.budget import Budget

Floats = NDArray[np.float64]

#: gains, distances and scores within this, relative, are ties: rounding of features made in other batches
TIE = 1e-6
#: candidates whose gain is computed anew together, at first and at most
AT_ONCE, MOST_AT_ONCE = 32, 256


class Rows(Protocol):
    """Rows of every candidate (``features.RowFile``)."""

    def __getitem__(self, i: int) -> Floats:
        """(k, width) of one."""

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        """All of them, one row each, (n, width) at a time."""


class Information:
    """Posterior covariance P of the whitened weights, as labels come in; equation (1).

    Args:
        width: of the rows.
        temperature: T.
    """

    def __init__(self, width: int, temperature: float) -> None:
        self.width, self.temperature = width, temperature
        #: P = 1 - B^T B
        self._known = np.zeros((0, width))

    def covariance(self, rows: Floats, others: Floats | None = None) -> Floats:
        """(A, width), (B, width) -> (A, B) covariance of outputs, over the noise of their labels."""
        others = rows if others is None else others
        return rows @ others.T - (rows @ self._known.T) @ (others @ self._known.T).T

    def gains(self, frames: Sequence[Floats]) -> Floats:
        """Nats that the labels of each frame alone would bring, (n,)."""
        ends = np.cumsum([len(rows) for rows in frames])[:-1]
        along = np.split(np.concatenate(frames) @ self._known.T, ends)
        out = []
        for rows, known in zip(frames, along, strict=True):
            matrix = np.eye(len(rows)) + (rows @ rows.T - known @ known.T) / self.temperature
            out.append(0.5 * max(0.0, float(np.linalg.slogdet(matrix)[1])))
        return np.array(out)

    def take(self, rows: Floats) -> None:
        """Condition on the labels of a frame."""
        left = rows - (rows @ self._known.T) @ self._known
        noise = self.temperature * np.eye(len(rows))
        lower = cholesky(left @ rows.T + noise, lower=True)
        self._known = np.concatenate([self._known, solve_triangular(lower, left, lower=True)])
        if len(self._known) > self.width:
            self._known = np.asarray(np.linalg.qr(self._known, mode="r"))


def most_informative(
    rows: Rows,
    gains: Floats,
    keys: NDArray[np.int64],
    budget: Budget,
    information: Information,
    *,
    progress: Callable[[int], object] = lambda n: None,
) -> Iterator[tuple[int, float]]:
    """Number and gain of each chosen frame, until the budget is used up.

    With a budget in atoms the gain per atom counts.

    Args:
        rows: of every candidate.
        gains: (N,) bounds on the gains: of earlier, smaller sets of labels, such as those of none.
        keys: (N,) content keys.
        budget: is counted down.
        information: what is known; is updated.
        progress: called with 1 for every frame.
    """
    cost = np.ones(len(gains)) if budget.atoms is None else budget.sizes.astype(np.float64)
    bounds, exact = gains / cost, np.zeros(len(gains), dtype=bool)
    while (free := budget.open()).any():
        exact[:] = False
        at_once = AT_ONCE
        while True:
            best = bounds[free & exact].max(initial=-np.inf)
            stale = np.flatnonzero(free & ~exact & (bounds >= best * (1 - TIE)))
            if not len(stale):
                break
            some = stale[np.lexsort((keys[stale], -bounds[stale]))][:at_once]
            bounds[some] = information.gains([rows[i] for i in some]) / cost[some]
            exact[some] = True
            at_once = min(2 * at_once, MOST_AT_ONCE)
        i = first_of_best(bounds, keys, free & exact)
        gain = float(bounds[i] * cost[i])
        budget.take(i)
        information.take(rows[i])
        progress(1)
        yield i, gain


def farthest(
    rows: Rows, keys: NDArray[np.int64], budget: Budget, known: Sequence[int] = ()
) -> Iterator[tuple[int, float]]:
    """Number of each chosen frame, and its distance from the training frames (the origin) and those chosen before.

    Farthest points (Gonzalez 1985; for labels: Sener and Savarese 2018), one row per candidate.

    Args:
        rows: (1, width) of every candidate, its place beside the training frames.
        keys: (N,) content keys.
        budget: is counted down.
        known: candidates that are chosen already.
    """
    least = np.full(len(keys), np.inf)

    def near(place: Floats) -> None:
        for where, block in rows.blocks():
            least[where] = np.minimum(least[where], np.linalg.norm(block - place, axis=1))

    near(np.zeros(1))
    for i in known:
        near(rows[i])
    while (free := budget.open()).any():
        i = first_of_best(least, keys, free)
        distance = float(least[i])
        budget.take(i)
        near(rows[i])
        yield i, distance


def largest(scores: Floats, keys: NDArray[np.int64], budget: Budget) -> Iterator[int]:
    """Candidates by score alone, the largest first."""
    while (free := budget.open()).any():
        i = first_of_best(scores, keys, free)
        budget.take(i)
        yield i


def first_of_best(values: Floats, keys: NDArray[np.int64], free: NDArray[np.bool_]) -> int:
    """The one with the least key among those that are free and, to rounding, the best."""
    best = values[free].max()
    ties = np.flatnonzero(free & (values >= best - TIE * abs(best)))
    return int(ties[np.argmin(keys[ties])])
