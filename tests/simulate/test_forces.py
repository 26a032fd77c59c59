"""Forces of a simulation are the model's, and its error bars those of the model."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms

from blip_ft.library import Potential
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.simulate.forces import Forces
from blip_ft.uncertainty.calculator import BlipCalculator

from .systems import structure


def evaluated(potential: BayesianPotential, atoms: Atoms, **options: object) -> Forces:
    forces = Forces(potential, stress=True)
    for name, value in options.items():
        setattr(forces, name, value)
    atoms.calc = forces
    atoms.get_forces()
    return forces


@pytest.mark.parametrize("with_energy_std", [False, True])
def test_forces_are_those_of_the_mean_weights(potential: BayesianPotential, with_energy_std: bool):
    atoms = structure()
    found = evaluated(potential, atoms, with_energy_std=with_energy_std).results
    atoms.calc = BlipCalculator(potential, method="energy")
    atoms.get_forces()
    for name in ("energy", "forces", "stress", "ood_score"):
        np.testing.assert_allclose(found[name], atoms.calc.results[name], rtol=1e-9, atol=1e-10)
    assert ("energy_std" in found) == with_energy_std
    if with_energy_std:
        assert found["energy_std"] == pytest.approx(atoms.calc.results["energy_std"])


def test_error_bars_of_many_draws_are_those_of_the_linearised_model(potential: BayesianPotential):
    atoms = structure()
    bars = evaluated(potential, atoms).error_bars(400, 0)
    atoms.calc = BlipCalculator(potential, method="linear")
    atoms.get_forces()
    exact = atoms.calc.results
    np.testing.assert_allclose(bars.forces_std, exact["forces_std"], rtol=0.2)
    assert np.mean(bars.forces_std_norm / exact["forces_std_norm"]) == pytest.approx(1, abs=0.06)
    assert bars.energy_std == pytest.approx(exact["energy_std"], rel=0.15)
    assert bars.sampling_error == pytest.approx(1 / np.sqrt(800))
    np.testing.assert_allclose(bars.forces_total, np.sqrt(3 * 0.02**2 + bars.forces_std_norm**2))


def test_each_turn_has_other_draws_and_each_draw_its_turn(potential: BayesianPotential):
    forces = evaluated(potential, structure())
    turns = [forces.error_bars(2, t).forces_std_norm for t in range(4)]
    assert not np.allclose(turns[0], turns[1])
    np.testing.assert_array_equal(turns[0], turns[2])  # eight draws in pairs are four directions
    both = np.sqrt((turns[0] ** 2 + turns[1] ** 2) / 2)
    np.testing.assert_allclose(forces.error_bars(4, 0).forces_std_norm, both)


@pytest.mark.parametrize("family", ["weight", "channel"])
def test_families_without_pairs(family: str):
    potential = _other(family)
    bars = evaluated(potential, structure(), with_energy_std=True).error_bars(8, 0)
    assert (bars.forces_std_norm > 0).all()
    assert bars.energy_std > 0


def _other(family: str) -> BayesianPotential:
    from blip_ft.config import ModelConfig, PosteriorConfig
    from blip_ft.testing.fake import FakeBackbone

    return Potential(
        FakeBackbone.load("tiny"),
        ModelConfig(adapter="fake", checkpoint="tiny", dtype="float64"),
        PosteriorConfig(family=family, prior_scale=0.1, init_std=0.02),
        n_draws=8,
    ).eval()


def test_draws_of_large_structures_are_those_of_small_ones(
    potential: BayesianPotential, monkeypatch: pytest.MonkeyPatch
):
    forces = evaluated(potential, structure())
    together = forces.error_bars(4, 0)
    monkeypatch.setattr("blip_ft.simulate.forces.TOGETHER", 0)
    np.testing.assert_allclose(forces.error_bars(4, 0).forces_std, together.forces_std, rtol=1e-6)


def test_a_draw_has_its_own_forces(potential: BayesianPotential):
    atoms = structure()
    mean = evaluated(potential, atoms).results["forces"]
    found = []
    for k in range(4):
        atoms.calc = Forces(potential, stress=False, draw=(k, 4, 1.0))
        found.append(atoms.get_forces())
        assert not atoms.calc.has_error_bars
    assert len({f.tobytes() for f in [mean, *found]}) == 5
    # a pair lies on both sides of the mean
    off = [(f - mean).ravel() for f in found[:2]]
    assert np.dot(*off) < -0.5 * np.linalg.norm(off[0]) * np.linalg.norm(off[1])
