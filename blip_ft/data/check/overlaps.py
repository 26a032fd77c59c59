"""Atoms that lie on top of one another.

Half the sum of two covalent radii is far below any distance that a simulation reaches, and any
pair below it means a wrong unit, cell or file. A general neighbour list spends its time on cells
of the size of that tiny radius; here the few periodic images near the cell are searched by a
k-d tree.
"""

from __future__ import annotations

import itertools

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import complete_cell
from scipy.spatial import KDTree

#: share of the sum of two covalent radii below which atoms overlap
OVERLAP = 0.5


def worst_overlap(atoms: Atoms) -> tuple[float, int, int] | None:
    """Distance (Å) and indices of the pair of overlapping atoms that are closest, or ``None``.

    Nearest periodic images are looked at. A lattice vector so short that farther ones overlap
    too shows up as an atom that overlaps with its own image.
    """
    radii = OVERLAP * covalent_radii[atoms.numbers]
    reach = 2.0 * float(radii.max())
    cell = complete_cell(atoms.cell)
    inverse = np.linalg.inv(cell)
    scaled = atoms.positions @ inverse
    scaled -= np.floor(scaled) * atoms.pbc
    margin = reach * np.linalg.norm(inverse, axis=0)  # reach over the heights of the cell
    shifts = np.array(list(itertools.product(*[(0, -1, 1) if periodic else (0,) for periodic in atoms.pbc])))
    images = (scaled[None] + shifts[:, None]).reshape(-1, 3)
    near = ((images >= -margin) & (images <= 1.0 + margin) | ~atoms.pbc).all(axis=1)
    near[: len(atoms)] = True  # the first shift is zero: the atoms themselves
    owner = np.tile(np.arange(len(atoms)), len(shifts))[near]
    pairs = KDTree(scaled @ cell).sparse_distance_matrix(
        KDTree(images[near] @ cell), reach, output_type="ndarray"
    )
    i, j, distance = pairs["i"], owner[pairs["j"]], pairs["v"]
    close = (distance < radii[i] + radii[j]) & (pairs["i"] != pairs["j"])
    if not close.any():
        return None
    worst = np.flatnonzero(close)[np.argmin(distance[close])]
    return float(distance[worst]), int(min(i[worst], j[worst])), int(max(i[worst], j[worst]))
