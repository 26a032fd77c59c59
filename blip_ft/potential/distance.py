"""An out-of-distribution score that does not come from the posterior.

The posterior says how much the training labels leave the weights open. This score asks the model's own
features instead whether an atom is like those it was trained on: the Mahalanobis distance (Mahalanobis
1936; Lee et al., NeurIPS 2018) of its features from those of the training atoms of its element,

    d^2 = (x - m_z)^T S_z^-1 (x - m_z),        score = d / d_z,

with d_z the median distance of training atoms that were **left out**, group by group: 1 is an atom as
far from the training set as half of one group's atoms are from the other groups. The features are the
invariant ones that every backbone gives with its energies (``Prediction.node_features``, before the
last linear maps), so the score costs no call of the model. Zhu et al. (J. Chem. Phys. 158, 164111, 2023) fit
Gaussian mixtures to such features of an interatomic potential; there is one Gaussian per element here,
since a few dozen frames determine no more.

**Covariances.** With A_z the scatter matrix of the n_z training atoms of an element,

    S_z = (A_z + f T) / (n_z + f),

T the covariance tied over elements (the one of Lee et al.), shrunk towards a multiple of the identity
(Ledoit and Wolf 2004). It counts as much as f atoms, f the number of features: an element with fewer atoms
than features has mostly T, one with many its own covariance.

**Storage.** Means, the r leading eigenvectors of every S_z with their variances, and one mean variance for
all other directions; r is at most :data:`RANK` and such that all fits :data:`MAX_BYTES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

#: directions per element with a variance of their own, at most
RANK = 32
#: size of the stored numbers, at most, unless one direction per element is more (four bytes each)
MAX_BYTES = 160_000
#: parts that the groups are gathered into for leaving out
MAX_FOLDS = 8
#: smallest std of a feature, in units of the rms feature: rounding of single precision
MIN_STD = 1e-5


@dataclass
class FeatureDistance:
    """Where the training atoms are in feature space; E elements, f features, r directions.

    Attributes:
        numbers: (E,) atomic numbers, ascending.
        mean: (E, f) m_z.
        directions: (E, r, f) leading eigenvectors of S_z.
        variances: (E, r + 1) their eigenvalues, and the mean of the others (any number if there are none).
        scale: (E,) d_z.
    """

    numbers: Tensor
    mean: Tensor
    directions: Tensor
    variances: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        E, r, f = self.directions.shape
        wanted = {"numbers": (E,), "mean": (E, f), "variances": (E, r + 1), "scale": (E,)}
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"ood.{name} has shape {tuple(getattr(self, name).shape)}, expected {shape}")

    # ---- score -----------------------------------------------------------------------------
    def score(self, features: Tensor, numbers: Tensor) -> Tensor:
        """Score of every atom, (n,) float64 on the CPU; infinite for elements without training atoms.

        Args:
            features: (n, f) invariant features.
            numbers: (n,) atomic numbers.
        """
        x, numbers = features.detach().double().cpu(), numbers.cpu()
        out = torch.full((len(x),), torch.inf, dtype=torch.float64)
        for i, z in enumerate(self.numbers.tolist()):
            atoms = numbers == z
            if atoms.any():
                out[atoms] = self._distance(i, x[atoms]) / self.scale[i].double()
        return out

    def coordinates(self, features: Tensor, numbers: Tensor) -> Tensor:
        """Place of every atom beside the training atoms of its element, (n, f) float64 on the CPU: the features,
        whitened by S_z and over d_z, so that its length is the score. NaN for elements without training atoms.

        Args:
            features: (n, f) invariant features.
            numbers: (n,) atomic numbers.
        """
        x, numbers = features.detach().double().cpu(), numbers.cpu()
        out = torch.full_like(x, torch.nan)
        for i, z in enumerate(self.numbers.tolist()):
            atoms = numbers == z
            off, axes, variances = (
                x[atoms] - self.mean[i].double(),
                self.directions[i].double(),
                self.variances[i].double(),
            )
            along = off @ axes.T
            rest = (off - along @ axes) / variances[-1].sqrt()
            out[atoms] = (rest + (along / variances[:-1].sqrt()) @ axes) / self.scale[i].double()
        return out

    def _distance(self, i: int, x: Tensor) -> Tensor:
        """(n,) d of atoms of element number ``i``."""
        off, axes = x - self.mean[i].double(), self.directions[i].double()
        along = off @ axes.T
        rest = off - along @ axes
        variances = self.variances[i].double()
        return (along.square() @ (1 / variances[:-1]) + rest.square().sum(dim=1) / variances[-1]).sqrt()

    # ---- fit -------------------------------------------------------------------------------
    @classmethod
    def fit(cls, features: Floats, numbers: NDArray[np.int64], groups: Sequence[str]) -> FeatureDistance:
        """Fit to training atoms.

        Args:
            features: (n, f), one row per atom.
            numbers: (n,) atomic numbers.
            groups: n group names; atoms of one group are left out together. With a single group nothing can
                be left out: d_z is then the median of the atoms that the fit has seen.
        """
        x, z = np.asarray(features, dtype=np.float64), np.asarray(numbers, dtype=np.int64)
        names = np.unique(np.asarray(groups), return_inverse=True)[1]
        fold = names % MAX_FOLDS
        folds = np.unique(fold)
        splits = [(fold != k, fold == k) for k in folds] if len(folds) > 1 else [(fold >= 0, fold >= 0)]
        rank = _rank(len(np.unique(z)), x.shape[1])
        left_out = np.full(len(x), np.nan)
        for seen, out in splits:
            model = _gaussians(x[seen], z[seen], rank)
            for i, number in enumerate(model.numbers.tolist()):
                atoms = out & (z == number)
                left_out[atoms] = model._distance(i, torch.from_numpy(x[atoms])).numpy()
        model = _gaussians(x, z, rank)
        model.scale = _medians(model.numbers.tolist(), left_out, z)
        return cls.from_tensors(model.tensors())  # rounded once: what scores is what is stored

    # ---- files -----------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """What a model file holds: float32, whatever the precision of the weights, in the layout of a file, with
        which products round as well.
        """
        return {
            f.name: value
            if (value := getattr(self, f.name)).dtype == torch.int64
            else value.float().contiguous()
            for f in fields(self)
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FeatureDistance:
        """The inverse of :meth:`tensors`.

        Raises:
            TypeError: a tensor is missing or unknown.
            ValueError: shapes do not fit together.
        """
        return cls(**tensors)


def _rank(n_elements: int, n_features: int) -> int:
    """Directions per element that fit into :data:`MAX_BYTES` beside the means."""
    rows = MAX_BYTES // (4 * n_elements * n_features) - 1
    return max(1, min(RANK, n_features, rows))


def _medians(elements: list[int], distance: Floats, numbers: NDArray[np.int64]) -> Tensor:
    """(E,) median left-out distance per element; that of all where an element stands in one group only."""
    known = np.isfinite(distance) & (distance > 0)
    common = float(np.median(distance[known])) if known.any() else 1.0
    own = [distance[known & (numbers == z)] for z in elements]
    return torch.tensor([float(np.median(d)) if len(d) else common for d in own], dtype=torch.float64)


def _gaussians(x: Floats, z: NDArray[np.int64], rank: int) -> FeatureDistance:
    """Means and covariances of atoms (n, f) by element, with a scale of 1."""
    numbers, element = np.unique(z, return_inverse=True)
    means = np.stack([x[z == k].mean(axis=0) for k in numbers])
    off, f = x - means[element], x.shape[1]
    floor = max(MIN_STD**2 * float(np.mean(means**2)), float(np.finfo(np.float32).tiny))
    tied = ledoit_wolf(off)
    directions, variances = [], []
    for i in range(len(numbers)):
        own = off[element == i]
        values, vectors = np.linalg.eigh((own.T @ own + f * tied) / (len(own) + f))
        values = np.maximum(values, floor)
        directions.append(vectors[:, -rank:].T)
        rest = values[:-rank].mean() if rank < f else values[0]
        variances.append(np.append(values[-rank:], rest))
    return FeatureDistance(
        torch.from_numpy(numbers),
        torch.from_numpy(means),
        torch.from_numpy(np.stack(directions)),
        torch.from_numpy(np.stack(variances)),
        torch.ones(len(numbers), dtype=torch.float64),
    )


def ledoit_wolf(x: Floats) -> Floats:
    """Covariance of centred rows (n, f), shrunk towards mu I by the weight that Ledoit and Wolf derive.

    J. Multivariate Anal. 88, 365 (2004), equations 14 to 17: with S = X^T X / n, mu = tr S / f,
    d^2 = |S - mu I|^2 and b^2 = 1/n^2 sum |x_k x_k^T - S|^2, the weight of mu I is min(b^2, d^2) / d^2.
    """
    n, f = x.shape
    S = x.T @ x / n
    mu = np.trace(S) / f
    # |x x^T - S|^2 = |x|^4 - 2 x^T S x + |S|^2, and the mean of x^T S x is |S|^2
    b2 = (np.mean((x**2).sum(axis=1) ** 2) - (S**2).sum()) / n
    d2 = ((S - mu * np.eye(f)) ** 2).sum()
    weight = min(max(b2 / d2, 0.0), 1.0) if d2 > 0 else 1.0
    shrunk: Floats = (1 - weight) * S + weight * mu * np.eye(f)
    return shrunk
