from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule, surface
from ase.neighborlist import neighbor_list
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.neighbours import pairs_within


def same_pairs(atoms: Atoms, cutoff: float) -> None:
    expected = neighbor_list("ijd", atoms, cutoff)
    i, j, distance, vector = pairs_within(atoms, cutoff)
    assert len(i) == len(expected[0])
    a = np.lexsort((np.round(expected[2], 6), expected[1], expected[0]))
    b = np.lexsort((np.round(distance, 6), j, i))
    np.testing.assert_array_equal(i[b], expected[0][a])
    np.testing.assert_array_equal(j[b], expected[1][a])
    np.testing.assert_allclose(distance[b], expected[2][a], atol=1e-10)
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), distance, atol=1e-10)


@pytest.mark.parametrize(
    "atoms",
    [
        bulk("Si"),
        bulk("Fe", cubic=True),
        molecule("CH3CH2OH"),
        surface("Cu", (1, 1, 1), 3, vacuum=8),
        Atoms("H"),
    ],
    ids=["primitive", "cubic", "molecule", "slab", "atom"],
)
def test_pairs_are_those_of_ase(atoms: Atoms) -> None:
    same_pairs(atoms, 4.3)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 5), pbc=st.tuples(*[st.booleans()] * 3))
def test_skewed_cells_and_atoms_outside(seed: int, n: int, pbc: tuple[bool, bool, bool]) -> None:
    rng = np.random.default_rng(seed)
    cell = 3.0 * np.eye(3) + rng.uniform(-1, 1, (3, 3))
    same_pairs(Atoms(numbers=[6] * n, positions=rng.uniform(-9, 9, (n, 3)), cell=cell, pbc=pbc), 4.0)
