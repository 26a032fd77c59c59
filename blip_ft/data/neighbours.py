"""All pairs of atoms within a distance, periodic images included, by a k-d tree.

ASE's neighbour list spends tens of milliseconds on a small dense cell; a check looks at thousands.
"""

from __future__ import annotations

import itertools

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import complete_cell
from numpy.typing import NDArray
from scipy.spatial import KDTree

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def pairs_within(atoms: Atoms, cutoff: float) -> tuple[Ints, Ints, Floats, Floats]:
    """Atom i, atom j, distance and vector from i to j of every ordered pair.

    Args:
        atoms: the structure; a periodic direction must have a lattice vector.
        cutoff: largest distance, Å.

    Returns:
        (m,), (m,), (m,) Å, (m, 3) Å. An atom is paired with its own images, not with itself.
    """
    cell = complete_cell(atoms.cell)
    inverse = np.linalg.inv(cell)
    scaled = atoms.positions @ inverse
    scaled = scaled - np.floor(scaled) * atoms.pbc
    margin = cutoff * np.linalg.norm(inverse, axis=0)  # cutoff over the heights of the cell
    reach = [range(-k, k + 1) if p else range(1) for k, p in zip(_whole(margin), atoms.pbc, strict=True)]
    shifts = np.array(list(itertools.product(*reach)), dtype=float)
    images = (scaled[None] + shifts[:, None]).reshape(-1, 3)
    near = (((images >= -margin) & (images <= 1.0 + margin)) | ~atoms.pbc).all(axis=1)
    owner = np.tile(np.arange(len(atoms)), len(shifts))[near]
    original = np.tile((shifts == 0).all(axis=1)[:, None], (1, len(atoms))).reshape(-1)[near]
    here, there = scaled @ cell, images[near] @ cell
    found = KDTree(here).sparse_distance_matrix(KDTree(there), cutoff, output_type="ndarray")
    i, place, distance = found["i"], found["j"], found["v"]
    other = (i != owner[place]) | ~original[place]
    i, place = i[other], place[other]
    return i, owner[place], distance[other], there[place] - here[i]


def contact(atoms: Atoms) -> float:
    """The shortest distance over the sum of the covalent radii; infinite where no two atoms are within it."""
    radii = covalent_radii[atoms.numbers]
    i, j, distance, _ = pairs_within(atoms, 2 * float(radii.max()))
    return float((distance / (radii[i] + radii[j])).min(initial=np.inf))


def _whole(margin: Floats) -> list[int]:
    """Cells that a sphere around any point of a cell reaches into, on either side."""
    return [int(np.ceil(m)) for m in margin]
