"""Labels that are wrong beyond doubt are found, and no error of a model is taken for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blip_ft.data.check.doubt import wrong_energies, wrong_forces, wrong_stress

NUMBERS = np.array([14, 14, 8, 8, 8, 8])


def forces(n: int = 12, *, error: float = 0.05, atoms: int = 6, seed: int = 0) -> tuple[Any, Any]:
    """Labels that sum to zero, and predictions ``error`` eV/Å off."""
    rng = np.random.default_rng(seed)
    labels = [rng.normal(0, 1, (atoms, 3)) for _ in range(n)]
    labels = [f - f.mean(axis=0) for f in labels]
    return labels, [f + rng.normal(0, error, f.shape) for f in labels]


@pytest.mark.parametrize("size", [3.0, 50.0, -1e4])
@pytest.mark.parametrize("atoms", [3, 200])
def test_one_component_of_one_frame(size: float, atoms: int) -> None:
    labels, predictions = forces(atoms=atoms)
    assert not wrong_forces(labels, predictions).any()
    labels[7][1, 2] += size
    assert np.flatnonzero(wrong_forces(labels, predictions)).tolist() == [7]


def test_a_model_that_fails_is_no_wrong_label() -> None:
    """However large its error: the forces of such a frame sum to zero, and so do those of the model."""
    labels, predictions = forces()
    rng = np.random.default_rng(1)
    predictions[4] = rng.normal(0, 5, (6, 3))
    labels[5] *= 8.0  # softened by as much as pretrained models are, and more
    assert not wrong_forces(labels, predictions).any()


def test_forces_that_are_tens_of_ev_where_nothing_is_predicted() -> None:
    labels, predictions = forces()
    labels[3][0] += [30.0, 0, 0]
    labels[3][1] -= [30.0, 0, 0]  # they do sum to zero
    assert np.flatnonzero(wrong_forces(labels, predictions)).tolist() == [3]


def test_net_forces_of_a_whole_set_are_a_property_of_it() -> None:
    """Of an external field, say: a frame among others of its kind is not wrong."""
    labels, predictions = forces()
    for f in labels:
        f += [0.6, 0.0, 0.0]
    assert not wrong_forces(labels, predictions).any()


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_frames_say_nothing(n: int) -> None:
    labels, predictions = forces(n)
    if n:
        labels[0][0, 0] += 50.0
    assert not wrong_forces(labels, predictions).any()
    assert not wrong_energies([NUMBERS] * n, np.linspace(0, 9, n)).any()
    assert not wrong_stress(np.ones((n, 6)), np.zeros((n, 6))).any()


def test_half_of_the_frames_are_no_exception() -> None:
    labels, predictions = forces()
    for f in labels[:6]:
        f[0, 0] += 50.0
    assert not wrong_forces(labels, predictions).any()


def test_missing_labels_are_passed_over() -> None:
    labels, predictions = forces()
    labels[0], labels[1] = None, np.full((6, 3), np.nan)
    labels[7][1, 2] += 50.0
    assert np.flatnonzero(wrong_forces(labels, predictions)).tolist() == [7]


def test_one_energy_beside_good_forces() -> None:
    rng = np.random.default_rng(0)
    error, force_error = rng.normal(-3.0, 0.01, 12), np.full(12, 0.05)
    assert not wrong_energies([NUMBERS] * 12, error, force_error).any()
    error[5] += 2.0
    assert np.flatnonzero(wrong_energies([NUMBERS] * 12, error, force_error)).tolist() == [5]
    force_error[5] = 1.0  # the model fails on this structure: its energy may be as far off
    assert not wrong_energies([NUMBERS] * 12, error, force_error).any()
    error[5] += 40.0  # more than any bond
    assert np.flatnonzero(wrong_energies([NUMBERS] * 12, error, force_error)).tolist() == [5]


def test_energies_of_another_composition_are_not_compared() -> None:
    """The constant of a composition may be undetermined by references; of a lone frame nothing is known."""
    error = np.concatenate([np.random.default_rng(0).normal(0, 0.01, 10), [40.0]])
    numbers = [NUMBERS] * 10 + [np.array([8, 8])]
    assert not wrong_energies(numbers, error, np.full(11, 0.05)).any()


def test_one_stress() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(0, 0.02, (12, 6))
    predictions = 0.8 * labels + 0.01  # another level of theory
    assert not wrong_stress(labels, predictions).any()
    labels[4, 2] = -3.0
    assert np.flatnonzero(wrong_stress(labels, predictions)).tolist() == [4]
