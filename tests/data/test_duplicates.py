from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.split.duplicates import first_same, same_structure, sketch


def crystal(seed: int = 0, pbc: object = True) -> Atoms:
    rng = np.random.default_rng(seed)
    cell = np.array([[5.0, 0, 0], [1.0, 6.0, 0], [-0.5, 0.7, 7.0]])
    return Atoms("Si2O4", scaled_positions=rng.random((6, 3)), cell=cell, pbc=pbc)


@given(
    seed=st.integers(0, 1000),
    shift=st.lists(st.integers(-3, 3), min_size=18, max_size=18),
    wrap=st.booleans(),
)
def test_images_order_and_rounding_do_not_matter(seed: int, shift: list[int], wrap: bool) -> None:
    rng = np.random.default_rng(seed)
    atoms = crystal(seed)
    copy = atoms[rng.permutation(6)]
    copy.positions += np.reshape(shift, (6, 3)) @ atoms.cell.array
    copy.positions += rng.uniform(-1, 1, (6, 3)) * 3e-7
    if wrap:
        copy.wrap()
    assert same_structure(atoms, copy)
    assert first_same([crystal(seed + 5000), atoms, copy]) == [0, 1, 1]


@given(
    seed=st.integers(0, 1000),
    atom=st.integers(0, 5),
    axis=st.integers(0, 2),
    step=st.sampled_from([1e-5, 1e-3, 0.5]),
)
def test_a_moved_atom_makes_another_structure(seed: int, atom: int, axis: int, step: float) -> None:
    atoms = crystal(seed)
    moved = atoms.copy()
    moved.positions[atom, axis] += step
    assert not same_structure(atoms, moved)
    assert first_same([atoms, moved]) == [0, 1]


def change_cell(atoms: Atoms) -> None:
    atoms.cell[2, 2] += 1e-4


def swap_elements(atoms: Atoms) -> None:
    atoms.numbers[[0, 2]] = atoms.numbers[[2, 0]]


def replace_element(atoms: Atoms) -> None:
    atoms.numbers[0] = 32


def open_boundary(atoms: Atoms) -> None:
    atoms.pbc = (True, True, False)


@pytest.mark.parametrize("change", [change_cell, swap_elements, replace_element, open_boundary])
def test_other_changes_make_another_structure(change: object) -> None:
    atoms = crystal()
    other = atoms.copy()
    change(other)  # type: ignore[operator]
    assert first_same([atoms, other]) == [0, 1]


def test_molecules_without_cell() -> None:
    ethanol = molecule("CH3CH2OH")
    copy = ethanol[::-1]
    moved = ethanol.copy()
    moved.positions += 0.1
    stretched = ethanol.copy()
    stretched.positions[0] += [0, 0, 1e-4]
    assert first_same([ethanol, moved, copy, stretched]) == [0, 1, 0, 3]


def test_an_image_along_an_open_direction_is_another_structure() -> None:
    slab = crystal(pbc=(True, True, False))
    along, across = slab.copy(), slab.copy()
    along.positions[0] += slab.cell[0]
    across.positions[0] += slab.cell[2]
    assert first_same([slab, along, across]) == [0, 0, 2]


def test_two_atoms_are_not_matched_with_one() -> None:
    a = Atoms("O2", positions=[[0, 0, 0], [0, 0, 0]])
    b = Atoms("O2", positions=[[0, 0, 0], [0, 0, 1.2]])
    assert not same_structure(a, b)


def test_all_alike_is_fast_and_names_the_first() -> None:
    assert first_same([bulk("Si")] * 500) == [0] * 500


def test_sketch_is_of_the_structure_not_of_its_writing() -> None:
    atoms = crystal()
    copy = atoms[[3, 2, 1, 0, 5, 4]]
    copy.positions += atoms.cell.array[1] - 4 * atoms.cell.array[2]
    np.testing.assert_allclose(sketch(copy), sketch(atoms), atol=1e-9)
    assert np.abs(sketch(atoms) - sketch(crystal(1))).max() > 1.0


def test_many_frames_cost_no_pairwise_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(
        "blip_ft.data.split.duplicates.same_structure",
        lambda a, b: compared.append(1) or same_structure(a, b),
    )
    frames = [crystal(seed) for seed in range(400)]
    assert first_same([*frames, *frames[:5]]) == [*range(400), *range(5)]
    assert len(compared) < 50  # of 82000 pairs
