"""Fit the out-of-distribution score: the training atoms in the space of the model's features.

What it is stands in :mod:`blip_ft.potential.distance`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.distance import FeatureDistance
from blip_ft.system.out_of_memory import by_halves
from blip_ft.variational.noise import OFF

#: training atoms that are looked at, about; more frames are thinned out evenly
MAX_ATOMS = 20_000
#: frames per call when the training set is looked at
BATCH = 16


def fit_distance(
    potential: BayesianPotential, train: FrameDataset, groups: Sequence[str]
) -> FeatureDistance | None:
    """Look at the training atoms with the mean weights as they are now.

    Args:
        potential: its backbone gives features, else the answer is ``None``.
        train: training frames; of more than about :data:`MAX_ATOMS` atoms an even selection is taken, with
            at least one frame of every element. For a backbone that is not equivariant each also counts
            in a random orientation: training frames often share one, and any other would seem far.
        groups: of the frames.
    """
    backbone, chosen = potential.backbone, _selection(train)

    def work(some: range) -> tuple[NDArray[np.float64], NDArray[np.int64], list[str]] | None:
        index = chosen[some.start : some.stop]
        atoms, graphs = [train[i].atoms for i in index], [train[i].graph for i in index]
        if not backbone.equivariant:
            atoms += [_turned(a, seed=i) for i, a in zip(index, atoms, strict=True)]
            graphs += [backbone.graph(a) for a in atoms[len(index) :]]
            index = [*index, *index]
        batch = backbone.collate(atoms, graphs).to(backbone.device)
        with torch.no_grad():
            out = potential(batch, OFF, forces=False)
        if out.node_features is None:
            return None
        features = out.node_features.detach().double().cpu().numpy()
        owners = [groups[i] for i, n in zip(index, batch.n_atoms.tolist(), strict=True) for _ in range(n)]
        return features, batch.numbers.cpu().numpy(), owners

    features, numbers, owners = [], [], []
    numbers_of = train.frames["numbers"]
    sizes = [len(numbers_of[i]) for i in chosen]
    for start in range(0, len(chosen), BATCH):
        some = range(start, min(start + BATCH, len(chosen)))
        for part in by_halves(work, some, sizes[some.start : some.stop], what="features of training atoms"):
            if part is None:
                return None
            features.append(part[0])
            numbers.append(part[1])
            owners += part[2]
    return FeatureDistance.fit(np.concatenate(features), np.concatenate(numbers), owners)


def _turned(atoms: Atoms, *, seed: int) -> Atoms:
    """A copy in a random orientation."""
    turn = Rotation.random(random_state=seed).as_matrix()
    out: Atoms = atoms.copy()
    out.set_cell(atoms.cell.array @ turn.T)
    out.set_positions(atoms.positions @ turn.T)
    return out


def _selection(train: FrameDataset) -> list[int]:
    """Indices of evenly spaced frames and of one frame for each element that these lack."""
    numbers = train.frames["numbers"]
    total = sum(len(z) for z in numbers)
    stride = max(1, -(-total // MAX_ATOMS))
    chosen = list(range(0, len(numbers), stride))
    found = {z for i in chosen for z in numbers[i]} if stride > 1 else set()
    for i in range(len(numbers)) if stride > 1 else ():
        if not found.issuperset(numbers[i]):
            chosen.append(i)
            found.update(numbers[i])
    return sorted(chosen)
