from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

from blip_ft.data.check.pairwise import PairFunctions, pair_corrections


def rattled(seed: int) -> Atoms:
    atoms = bulk("NaCl", "rocksalt", 5.6, cubic=True)
    atoms.rattle(0.1, seed=seed)
    return atoms


def test_forces_are_the_gradient_of_the_energies() -> None:
    for atoms in (rattled(0), molecule("CH3CH2OH")):
        functions = PairFunctions([atoms])
        weights = np.random.default_rng(0).normal(size=functions.size)
        forces = (functions.forces(atoms) @ weights).reshape(-1, 3)
        np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-9)
        for k, axis in ((0, 0), (1, 2)):
            both = []
            for step in (1e-4, -1e-4):
                moved = atoms.copy()
                moved.positions[k, axis] += step
                both.append(len(atoms) * float(functions.energies(moved) @ weights))
            assert np.isclose(forces[k, axis], -(both[0] - both[1]) / 2e-4, rtol=1e-4, atol=1e-6)


def test_energies_per_atom_do_not_depend_on_the_cell_that_is_chosen() -> None:
    atoms = rattled(1)
    functions = PairFunctions([atoms])
    np.testing.assert_allclose(functions.energies(atoms.repeat((2, 1, 1))), functions.energies(atoms))


def test_a_pairwise_error_is_taken_away_and_bad_frames_do_not_spoil_it() -> None:
    frames = [rattled(i) for i in range(20)]
    functions = PairFunctions(frames)
    weights = 0.3 * np.random.default_rng(0).normal(size=functions.size)
    truth = [(functions.forces(a) @ weights).reshape(-1, 3) for a in frames]
    residuals: list[np.ndarray | None] = [t.copy() for t in truth]
    residuals[3] = np.random.default_rng(1).normal(size=truth[3].shape)
    residuals[7] = None
    added = pair_corrections(frames, residuals, functions)
    size = np.sqrt(np.mean(np.square(truth)))
    for k in (0, 3, 7):
        assert np.sqrt(np.mean((added[k] - truth[k]) ** 2)) < 0.1 * size


def test_too_few_labels_change_nothing() -> None:
    frames = [rattled(i) for i in range(6)]
    functions = PairFunctions(frames)
    added = pair_corrections(frames, [None] * 6, functions)
    assert all(not a.any() and a.shape == (8, 3) for a in added)


def test_many_elements_are_bounded() -> None:
    atoms = Atoms(numbers=range(1, 61), positions=np.random.default_rng(0).uniform(0, 20, (60, 3)))
    assert PairFunctions([atoms]).size == 24 * 12
