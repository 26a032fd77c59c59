"""Graphs made of directed edges: checks, batching, and forces and stress from edge gradients.

Convention: edge e goes from a receiving atom ``i = edge_index[0, e]`` to a sending atom
``j = edge_index[1, e]``, and ``edge_vec = r_j - r_i`` (to the image of j that the edge means).
An energy that depends on positions through these vectors only has, with g = dE/d(edge_vec),

    force on k = sum over edges with i = k of g  -  sum over edges with j = k of g,
    dE/d(strain) = sum over edges of edge_vec (outer) g.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.geometry import complete_cell, minkowski_reduce
from torch import Tensor

from blip_ft.backbones.conservative import sum_rows
from blip_ft.backbones.protocol import Batch
from blip_ft.errors import DataError

#: lattice vectors are exchanged for shorter ones where these are shorter by this factor
_SKEWED = 1.5
#: a structure that is not periodic is moved where it is so far from the origin, Å
_FAR = 100.0


def bare(atoms: Atoms) -> Atoms:
    """The structure with numbers, positions, cell and pbc only, described as vendors' searches see it best.

    Vendors round coordinates, or look for neighbours among a few images only. So atoms outside the cell are brought
    back by lattice vectors, very skewed cells are described by shorter vectors, left-handed ones by the opposite
    vectors, and a free structure far from the origin is moved as a whole. None of this changes a distance or turns
    anything: forces and stress are those of the structure as it was given, atom by atom. What needs none of it is
    copied bit for bit.

    Raises:
        DataError: a periodic direction without a lattice vector, or lattice vectors in a plane.
    """
    cell = atoms.cell.array.copy()
    periodic = cell[atoms.pbc]
    if np.linalg.matrix_rank(periodic) < len(periodic):
        raise DataError(
            f"the structure is periodic in {len(periodic)} directions, but its lattice vectors there "
            "are missing or linearly dependent",
            remedy="set the cell, or pbc=False for a molecule",
            field="cell",
        )
    copy = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=cell, pbc=atoms.pbc)
    if atoms.pbc.any():
        _reduce(copy)
        _wrap(copy)
    elif len(atoms) and np.abs(centre := copy.positions.mean(axis=0)).max() > _FAR:
        copy.positions -= centre.round()
    return copy


def boxed(atoms: Atoms, padding: float) -> Atoms:
    """A fully periodic copy whose images do not touch in directions that were not periodic.

    Lattice vectors of these directions are replaced by ones normal to the others and longer than the
    structure by ``padding`` (Å). Positions are those of :func:`bare`, moved as a whole where the box is elsewhere.

    Raises:
        DataError: as for :func:`bare`.
    """
    copy = bare(atoms)
    if copy.pbc.all():
        return copy
    cell = copy.cell.array
    cell[~copy.pbc] = 0.0
    cell = complete_cell(cell)  # unit vectors normal to the periodic ones
    for axis in np.flatnonzero(~copy.pbc):
        along = copy.positions @ cell[axis]
        length = np.ptp(along) + padding
        middle = (along.min() + along.max()) / 2 / length
        if not -1 < middle < 2:
            copy.positions -= np.floor(middle) * length * cell[axis]
        cell[axis] *= length
    copy.set_cell(cell)
    copy.pbc = True
    _turn(copy)
    return copy


def _reduce(atoms: Atoms) -> None:
    """Shorter lattice vectors in place of very skewed ones, and right-handed ones in place of left-handed ones."""
    full = _completed(atoms)
    lengths = np.linalg.norm(full, axis=1)
    # shorter vectors span the same volume: where these fill it so well, none is shorter by that factor
    if abs(np.linalg.det(full)) * _SKEWED < lengths.prod():
        short = np.asarray(minkowski_reduce(full, atoms.pbc)[0])
        if lengths[atoms.pbc].max() > _SKEWED * np.linalg.norm(short[atoms.pbc], axis=1).max():
            cell = atoms.cell.array.copy()
            cell[atoms.pbc] = short[atoms.pbc]
            atoms.set_cell(cell)
    if atoms.pbc.all():
        _turn(atoms)


def _turn(atoms: Atoms) -> None:
    """The opposite lattice vectors in place of left-handed ones: the same lattice."""
    if np.linalg.det(atoms.cell.array) < 0:
        atoms.set_cell(-atoms.cell.array)


def _wrap(atoms: Atoms) -> None:
    """Atoms outside the cell moved into it by lattice vectors; those inside stay as they are, bit for bit."""
    full = _completed(atoms)
    place = np.linalg.solve(full.T, atoms.positions.T).T
    outside = ((place < -1e-6) | (place > 1 + 1e-6)) & atoms.pbc
    if outside.any():
        atoms.positions -= np.where(outside, np.floor(place), 0.0) @ full


def _completed(atoms: Atoms) -> Any:
    """(3, 3) lattice vectors, with unit vectors normal to the others in open directions, Å."""
    cell = atoms.cell.array.copy()
    cell[~atoms.pbc] = 0.0
    return complete_cell(cell)


def scalars(atoms: Atoms) -> dict[str, Tensor]:
    """``periodic`` () and ``volume`` () in Å^3; the volume is 1 where there is no stress to divide."""
    periodic = bool(atoms.pbc.all())
    volume = atoms.cell.volume if periodic else 1.0
    return {
        "periodic": torch.tensor(periodic),
        "volume": torch.tensor(volume, dtype=torch.float64),
    }


def one_direction(index: Tensor, shift: Tensor) -> Tensor:
    """(e,) which edges to keep so that one of the two directions of every pair of neighbours is left.

    An atom's edges to its own images come in pairs of opposite shifts.

    Args:
        index: (2, e) atoms of all edges, in both directions.
        shift: (e, 3) lattice vectors from the one's cell to the other's.
    """
    first = torch.where(
        shift[:, 0] != 0, shift[:, 0], torch.where(shift[:, 1] != 0, shift[:, 1], shift[:, 2])
    )
    return (index[0] < index[1]) | ((index[0] == index[1]) & (first > 0))


def starts(counts: Tensor) -> list[int]:
    """Offset of every structure's first row, from the number of rows per structure."""
    return (torch.cumsum(counts, 0) - counts).tolist()


def collate(atoms: Sequence[Atoms], graphs: Sequence[dict[str, Tensor]]) -> Batch:
    """Concatenate graphs with ``edge_index`` (2, e), ``edge_vec`` (e, 3), ``volume``, ``periodic``."""
    n_atoms = torch.tensor([len(a) for a in atoms])
    n_edges = torch.tensor([g["edge_vec"].shape[0] for g in graphs])
    index = torch.arange(len(atoms))
    edges = [g["edge_index"] + start for g, start in zip(graphs, starts(n_atoms), strict=True)]
    return Batch(
        graph={
            "edge_index": torch.cat(edges, dim=1),
            "edge_vec": torch.cat([g["edge_vec"] for g in graphs]),
            "volume": torch.stack([g["volume"] for g in graphs]),
            "periodic": torch.stack([g["periodic"] for g in graphs]),
        },
        n_atoms=n_atoms,
        numbers=torch.cat([torch.as_tensor(a.numbers, dtype=torch.int64) for a in atoms]),
        rows={
            "atom": torch.repeat_interleave(index, n_atoms),
            "edge": torch.repeat_interleave(index, n_edges),
        },
    )


def forces(batch: Batch, pull: Tensor) -> Tensor:
    """Forces (n, 3) from ``dE/d(edge_vec)`` (e, 3)."""
    receiver, sender = batch.graph["edge_index"]
    n = batch.numbers.numel()
    return sum_rows(pull, receiver, n) - sum_rows(pull, sender, n)


def stress(batch: Batch, pull: Tensor) -> Tensor:
    """Stress (B, 3, 3) from ``dE/d(edge_vec)`` (e, 3); NaN where not periodic in all directions.

    It is symmetric as far as the energy is rotationally invariant, that is to rounding.
    """
    edge_vec = batch.graph["edge_vec"].to(pull.dtype)
    strain = sum_rows(edge_vec.unsqueeze(2) * pull.unsqueeze(1), batch.rows["edge"], batch.n_structures)
    result: Tensor = strain / batch.graph["volume"].to(pull.dtype).reshape(-1, 1, 1)
    return result.masked_fill(~batch.graph["periodic"].reshape(-1, 1, 1), torch.nan)


def voigt(matrix: Tensor) -> Tensor:
    """(B, 3, 3) to (B, 6) in the order xx yy zz yz xz xy, symmetrised."""
    symmetric = (matrix + matrix.transpose(1, 2)) / 2
    rows, columns = (0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)
    return symmetric[:, rows, columns]
