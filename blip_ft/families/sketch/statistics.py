"""What a sketch keeps of gradient rows: sums in m x m, and a bounded sample of rows to score left-out groups on.

With phi = g S the features of a row, all that the posterior needs is H = sum phi phi^T; the left-out rule needs the
same of every group, and sum phi times target. Groups are left out by taking their own sums off (down-dating). None of
it grows with the number of frames but the list of who they are, 16 bytes a frame.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from blip_ft.errors import BlipError, DataError
from blip_ft.families.base.gram import added, as_many_threads_as_torch, mirrored
from blip_ft.families.base.linear import Collected, LinearizedModel
from blip_ft.families.base.spectrum import Scores, Spectrum, scores_from_others
from blip_ft.families.sketch.buckets import folded
from blip_ft.families.sketch.budget import FOLDS, scoring_width

#: rows of each fold that are kept to be scored, evenly spread
SCORED = 1024
#: largest share of the prior's variance that a sketch absorbs and that is given back (:func:`ridge`)
MOST_ABSORBED = 0.75


def ridge(values: np.ndarray, noise: float, buckets: int, *, exact: bool = False) -> float:
    """The x with which features solve what all weights solve with T/s^2: x = c (1 - d(x)/m), d(x) = sum l/(l + x).

    A sketch of m numbers spends d of them on what the labels determine and has m - d left for the rest: at x = c the
    prior would be narrower by the share d/m of its variance (docs/theory.md).

    Args:
        values: eigenvalues l of H.
        noise: c = T/s^2.
        buckets: m.
        exact: the sketch is the identity, and absorbs nothing.
    """

    def excess(x: float) -> float:
        return x - noise * (1 - float(np.sum(values / (values + x))) / buckets)

    least = (1 - MOST_ABSORBED) * noise
    if exact or not values.any():
        return noise
    return least if excess(least) >= 0 else float(brentq(excess, least, noise, xtol=1e-12 * noise))


@dataclass
class _Sample:
    """Evenly spaced rows of a sequence whose length is not known beforehand; at most :data:`SCORED`."""

    every: int = 1
    seen: int = 0
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: list[Tensor] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)

    def add(self, rows: Tensor, targets: np.ndarray) -> None:
        numbers = self.seen + np.arange(len(rows))
        self.seen += len(rows)
        self._keep(np.concatenate([self.numbers, numbers]), [*self.rows, *rows], [*self.targets, *targets])
        while len(self.rows) > SCORED:
            self.every *= 2
            self._keep(self.numbers, self.rows, self.targets)

    def _keep(self, numbers: np.ndarray, rows: list[Tensor], targets: list[float]) -> None:
        keep = np.flatnonzero(numbers % self.every == 0)
        self.numbers = numbers[keep]
        # of its own memory: a view would hold the whole block that it came with
        self.rows = [rows[i].clone() if rows[i]._is_view() else rows[i] for i in keep]
        self.targets = [targets[i] for i in keep]


@dataclass
class _Fold:
    """Sums over the rows of some groups, the upper half of the matrix, and rows to score them on."""

    matrix: np.ndarray
    pulled: np.ndarray
    scored: _Sample = field(default_factory=_Sample)
    others: _Sample = field(default_factory=_Sample)


class Statistics(Collected):
    """Sums over gradient rows.

    Args:
        reduce: (B, P) gradients -> (B, width) features.
        buckets: of the features.
        exact: the sketch is the identity.
    """

    def __init__(
        self,
        reduce: Callable[[Tensor], Tensor],
        buckets: int,
        *,
        exact: bool,
    ) -> None:
        self._reduce, self.width, self.exact = reduce, buckets, exact
        self._total = np.zeros((buckets, buckets), order="F")
        self._scoring = buckets if exact else scoring_width(buckets)
        self._folds: list[_Fold] = []
        self._fold_of: dict[str, int] = {}
        self.frames: Counter[int] = Counter()
        self.rows = self.labelled = 0

    def features(self, gradients: Tensor) -> Tensor:
        """See the base class."""
        return self._reduce(gradients)

    def add(self, rows: LinearizedModel) -> None:
        """See the base class."""
        train = rows.is_train
        features = rows.labelled.detach().cpu()
        targets, groups, scored = rows.targets[train], rows.groups[train], rows.scored[train]
        self.rows += len(train)
        self.labelled += len(features)
        with as_many_threads_as_torch():
            self._total = added(self._total, features.double().numpy().T)
            narrow = features if self._scoring == self.width else folded(features, self._scoring)
            for group in dict.fromkeys(rows.groups.tolist()):
                inside = groups == group
                self._add_to(
                    self._fold(group), narrow[torch.from_numpy(inside)], targets[inside], scored[inside]
                )
        if rows.keys is not None:
            self.frames.update(rows.keys[train].tolist())

    def _fold(self, group: str) -> _Fold:
        """That of a group: its own for the first :data:`FOLDS` groups."""
        if group not in self._fold_of:
            self._fold_of[group] = len(self._fold_of) % FOLDS
            if len(self._folds) < len(self._fold_of) <= FOLDS:
                n = self._scoring
                self._folds.append(_Fold(np.zeros((n, n), order="F"), np.zeros(n)))
        return self._folds[self._fold_of[group]]

    @staticmethod
    def _add_to(fold: _Fold, rows: Tensor, targets: np.ndarray, scored: np.ndarray) -> None:
        wide = rows.double().numpy()
        fold.matrix = added(fold.matrix, wide.T)
        fold.pulled += wide.T @ targets
        chosen = torch.from_numpy(scored)
        fold.scored.add(rows[chosen], targets[scored])
        fold.others.add(rows[~chosen], targets[~scored])

    def left_out(self, scales: Sequence[float], temperature: float) -> Scores:
        """As ``left_out_scores``, in the space of the features: the law of v given the other groups.

        Raises:
            ValueError: fewer than two groups.
            DataError: more groups than labels.
        """
        if len(self._fold_of) < 2:
            raise ValueError("the left-out rule needs at least two groups")
        if self.labelled < len(self._fold_of):
            raise DataError(
                f"the prior's scale is chosen by leaving groups of training frames out: {len(self._fold_of)} groups "
                f"have {self.labelled} labels",
                field="posterior.prior_scale",
                remedy="label more frames, name fewer groups, or give a number, for instance posterior.prior_scale=0.1",
            )
        total: np.ndarray = np.sum([f.matrix for f in self._folds], axis=0)
        pulled: np.ndarray = np.sum([f.pulled for f in self._folds], axis=0)
        known = any(f.scored.rows for f in self._folds)  # else energies alone are labelled, and are scored
        columns = []
        for fold in self._folds:
            sample = fold.scored if known else fold.others
            if not sample.rows:
                continue
            with as_many_threads_as_torch():
                others = Spectrum.of_matrix(mirrored(np.asfortranarray(total - fold.matrix)), of_weights=True)
                noises = [
                    ridge(others.values, temperature / s**2, self._scoring, exact=self.exact) for s in scales
                ]
                columns.append(
                    scores_from_others(
                        others,
                        pulled - fold.pulled,
                        torch.stack(sample.rows).double().numpy(),
                        np.array(sample.targets),
                        noises,
                        temperature,
                    )
                )
        return {s: np.array([column[i] for column in columns]) for i, s in enumerate(scales)}

    def matrix(self, buckets: int) -> np.ndarray:
        """(m, m) H in as many buckets as sum up to these, or fewer that divide them; both halves."""
        whole = mirrored(self._total.copy(order="F"))
        ratio = self.width // buckets
        if ratio == 1:
            return whole
        return np.asfortranarray(whole.reshape(ratio, buckets, ratio, buckets).sum(axis=(0, 2)))


@dataclass
class Known:
    """What rows can be added to and removed from: H of the fitted posterior, and who is in it.

    Attributes:
        matrix: (m, m) H, the upper half; by columns.
        frames: rows of every frame, by its key.
        rows: of all frames, those without a key too.
        scale: s.
        temperature: T.
    """

    matrix: np.ndarray
    frames: Counter[int]
    rows: int
    scale: float
    temperature: float

    def changed(self, rows: LinearizedModel, *, remove: bool) -> Known:
        """With frames added, or removed.

        Raises:
            BlipError: a frame that is there already, or is not there, or has other rows.
        """
        if rows.keys is None:
            raise ValueError("rows of an update need the keys of their frames")
        train = rows.is_train
        mine = Counter(rows.keys[train].tolist())
        energies = Counter(rows.keys[~rows.scored].tolist())  # every frame has one, with a label or without
        twice = next((key for key, count in energies.items() if count > 1), None)
        if twice is not None:
            raise BlipError(
                f"a frame (key {twice}) is given twice: it would count double",
                field="frames",
                remedy="give each frame once",
            )
        for key, count in mine.items():
            known = self.frames.get(key, 0)
            if known and not remove:
                raise BlipError(
                    f"a frame (key {key}) is in the posterior already: added twice it would count double",
                    field="frames",
                    remedy="add each frame once; to change its labels remove it first",
                )
            if remove and known != count:
                raise BlipError(
                    f"a frame (key {key}) is in the posterior with {known} labels, and {count} are to be removed"
                    if known
                    else f"a frame (key {key}) is not in the posterior and cannot be removed",
                    field="frames",
                    remedy="remove what was added: the same frames, at the same mean, with the same projections",
                )
        wide = rows.labelled.detach().cpu().double().numpy()
        with as_many_threads_as_torch():
            matrix = added(self.matrix.copy(order="F"), wide.T, -1.0 if remove else 1.0)
        frames = self.frames - mine if remove else self.frames + mine
        count = self.rows + (-len(wide) if remove else len(wide))
        return replace(self, matrix=matrix, frames=frames, rows=count)

    def tensors(self) -> dict[str, Tensor]:
        """For a file; the matrix as its triangle."""
        keys = sorted(self.frames)
        upper = self.matrix[np.triu_indices(len(self.matrix))]
        return {
            "matrix": torch.from_numpy(upper),
            "keys": torch.tensor(keys, dtype=torch.int64),
            "counts": torch.tensor([self.frames[k] for k in keys], dtype=torch.int64),
            "rows": torch.tensor(self.rows),
            "scales": torch.tensor([self.scale, self.temperature], dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Known:
        """The inverse of :meth:`tensors`."""
        size = side(len(tensors["matrix"]))
        matrix = np.zeros((size, size), order="F")
        matrix[np.triu_indices(size)] = tensors["matrix"].numpy()
        frames = Counter(dict(zip(tensors["keys"].tolist(), tensors["counts"].tolist(), strict=True)))
        scale, temperature = tensors["scales"].tolist()
        return cls(matrix, frames, int(tensors["rows"]), scale, temperature)


def side(triangle: int) -> int:
    """How many columns a triangle of m (m + 1) / 2 numbers has."""
    return (math.isqrt(8 * triangle + 1) - 1) // 2
