from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import covalent_radii
from ase.neighborlist import neighbor_list
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.check.overlaps import OVERLAP, worst_overlap


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 12),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    outside=st.booleans(),
)
def test_against_the_neighbour_list_of_ase(seed: int, n: int, pbc: tuple[bool, ...], outside: bool) -> None:
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(2.5, 6, 3)) + rng.uniform(-0.8, 0.8, (3, 3))
    atoms = Atoms(rng.choice([1, 8, 14], n), scaled_positions=rng.random((n, 3)), cell=cell, pbc=pbc)
    if outside:
        atoms.positions += rng.integers(-3, 4, (n, 3)) * np.array(pbc) @ cell
    i, j, d = neighbor_list("ijd", atoms, OVERLAP * covalent_radii[atoms.numbers])
    found = worst_overlap(atoms)
    assert (found is not None) == bool(len(d))
    if found is not None:
        assert found[0] == pytest.approx(d.min())
        assert {found[1], found[2]} == {i[d.argmin()], j[d.argmin()]}


@pytest.mark.parametrize("atoms", [molecule("CH3CH2OH"), molecule("H2"), bulk("Si"), Atoms("O")], ids=str)
def test_real_structures_do_not_overlap(atoms: Atoms) -> None:
    assert worst_overlap(atoms) is None


def test_lengths_in_nanometres_overlap() -> None:
    atoms = bulk("Si")
    atoms.set_cell(0.1 * atoms.cell, scale_atoms=True)
    assert worst_overlap(atoms) is not None


def test_one_atom_and_its_own_image() -> None:
    assert worst_overlap(Atoms("Si", cell=[0.5, 9, 9], pbc=True)) == (pytest.approx(0.5), 0, 0)
    assert worst_overlap(Atoms("Si", cell=[0.5, 9, 9], pbc=(False, True, True))) is None


def test_atoms_at_one_place() -> None:
    assert worst_overlap(Atoms("SiO", positions=[[1, 1, 1], [1, 1, 1]])) == (0.0, 0, 1)
