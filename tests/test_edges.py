"""Structures as vendors' neighbour searches are given them: other words for the same structure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list

from blip_ft.backbones import edges
from blip_ft.errors import DataError
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.calculator import BlipCalculator


def quartz_like(seed: int = 0) -> Atoms:
    atoms = bulk("SiO", "rocksalt", 4.4)
    atoms.rattle(0.1, seed=seed)
    atoms.wrap()
    return atoms


def neighbours(atoms: Atoms) -> np.ndarray:
    """(e, 5) atoms and vector of every edge, sorted."""
    i, j, vector = neighbor_list("ijD", atoms, 5.0)
    rows = np.column_stack([i, j, vector.round(6) + 0.0])
    return rows[np.lexsort(rows.T[::-1])]


PBC = [(True, True, True), (True, True, False), (False, True, False), (True, False, True)]


@pytest.mark.parametrize("pbc", PBC)
@pytest.mark.parametrize("lattice", [[0, 1, 2], [1, 0, 2]], ids=["right", "left"])
def test_nothing_but_the_description_changes(pbc, lattice):
    atoms = quartz_like()
    atoms.set_cell(atoms.cell.array[lattice])
    atoms.pbc = pbc
    moved = atoms.copy()
    whole = np.array([[300, -40, 7], [-2, 1000, 5]]) * np.array(pbc)
    moved.positions += whole @ atoms.cell.array
    skewed = moved.copy()
    change = np.eye(3)
    periodic = np.flatnonzero(pbc)
    for a, b in itertools.pairwise(periodic):
        change[b, a] = 9
    skewed.set_cell(change @ moved.cell.array)
    expected = neighbours(atoms)
    for other in (moved, skewed):
        bare = edges.bare(other)
        assert np.array_equal(bare.numbers, atoms.numbers)
        assert np.array_equal(bare.pbc, atoms.pbc)
        np.testing.assert_allclose(neighbours(bare), expected, atol=2e-6)
        if all(pbc):
            assert np.linalg.det(bare.cell.array) > 0
            assert abs(bare.cell.volume - atoms.cell.volume) < 1e-9
        lengths = np.linalg.norm(bare.cell.array, axis=1)[list(pbc)]
        assert lengths.max() < 6
        box = edges.boxed(other, 12.0)
        assert np.linalg.det(box.cell.array) > 0
        place = np.linalg.solve(box.cell.array.T, box.positions.T).T
        assert np.abs(place).max() < 3
        np.testing.assert_allclose(neighbours(box), expected, atol=2e-6)


@pytest.mark.parametrize("pbc", [*PBC, (False, False, False)])
def test_what_needs_no_change_is_copied_bit_for_bit(pbc):
    atoms = bulk("SiO", "rocksalt", 4.4, cubic=True)
    atoms.rattle(0.1, seed=0)
    atoms.wrap()
    atoms.pbc = pbc
    bare = edges.bare(atoms)
    assert np.array_equal(bare.positions, atoms.positions)
    assert np.array_equal(bare.cell.array, atoms.cell.array)
    water = molecule("H2O")
    assert np.array_equal(edges.boxed(water, 12.0).positions, water.positions)


@pytest.mark.parametrize("offset", [(5000.0, 0.0, -3000.0), (-1e6, 1.0, 2.0)])
def test_a_molecule_far_away_stays_in_one_piece(offset):
    water = molecule("H2O")
    far = water.copy()
    far.positions += offset
    for found in (edges.bare(far), edges.boxed(far, 12.0)):
        assert np.abs(found.positions).max() < 200
        np.testing.assert_allclose(found.get_all_distances(), water.get_all_distances(), atol=1e-8)


def test_the_user_structure_is_left_alone():
    atoms = quartz_like()
    atoms.positions[0] += 7 * atoms.cell.array[1]
    before = atoms.copy()
    edges.bare(atoms)
    edges.boxed(atoms, 12.0)
    assert atoms == before


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_the_calculator_says_that_a_coordinate_is_no_number(value):
    from blip_ft.config import ModelConfig, PosteriorConfig
    from blip_ft.potential.bayesian import BayesianPotential

    potential = BayesianPotential(
        FakeBackbone(), ModelConfig(adapter="fake", checkpoint="tiny"), PosteriorConfig(family="weight")
    )
    atoms = quartz_like()
    atoms.calc = BlipCalculator(potential, n_draws=0)
    atoms.get_potential_energy()
    atoms.positions[1, 2] = value
    with pytest.raises(DataError, match="the position of atom 1 is") as caught:
        atoms.get_forces()
    assert caught.value.field == "positions"
    assert "shorter steps" in caught.value.remedy
