"""Charge and spin in ``atoms.info``: names, numbers, what is the same, and what the calculator notices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from blip_ft.backbones import electrons
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import DataError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training import sanity_checks
from blip_ft.uncertainty.calculator import BlipCalculator


def water(**info: Any) -> Atoms:
    atoms = molecule("H2O")
    atoms.info = info
    return atoms


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ({}, {}),
        ({"charge": -1, "spin": 2}, {"charge": -1.0, "spin": 2.0}),
        ({"total_charge": np.int64(1), "total_spin": 1.0}, {"charge": 1.0, "spin": 1.0}),
        ({"spin_multiplicity": 3, "charge": None}, {"spin": 3.0}),
        ({"charge": "+2", "multiplicity": np.array([1])}, {"charge": 2.0, "spin": 1.0}),
        ({"key_value_pairs": {"charge": 1}, "data": {"spin": 2}}, {"charge": 1.0, "spin": 2.0}),
    ],
)
def test_names_and_numbers(info: dict[str, Any], found: dict[str, float]) -> None:
    assert electrons.given(info) == found


@pytest.mark.parametrize("value", ["positive", float("nan"), float("inf"), True, np.zeros(3)])
def test_no_number_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(DataError, match=r"a\.xyz, frame 3, field 'charge': the charge is .*no number"):
        electrons.given({"charge": value}, file="a.xyz", frame=3)


def test_a_frame_that_says_nothing_is_a_neutral_singlet() -> None:
    assert electrons.state(None, None) == electrons.state(0.0, 1.0) == electrons.state(0.0, 0.0)
    assert electrons.state_bytes(0.0, None) == b""
    assert len({electrons.state_bytes(c, s) for c, s in ((1, 2), (-1, 2), (1, 4), (None, 3), (0, 1))}) == 5


@pytest.fixture
def charged() -> BayesianPotential:
    model = ModelConfig(adapter="fake", checkpoint="charged")
    posterior = PosteriorConfig(family="weight", prior_scale=0.1)
    return BayesianPotential(FakeBackbone("charged"), model, posterior)


def test_the_calculator_notices_a_changed_charge(charged: BayesianPotential) -> None:
    atoms = water(charge=0, spin=1)
    atoms.calc = BlipCalculator(charged, n_draws=0)
    neutral = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    cation = atoms.get_potential_energy()
    atoms.info["spin"] = 2
    doublet = atoms.get_potential_energy()
    assert len({neutral, cation, doublet}) == 3
    for energy, info in ((cation, {"charge": 1, "spin": 1}), (doublet, {"charge": 1, "spin": 2})):
        fresh = water(**info)
        fresh.calc = BlipCalculator(charged, n_draws=0)
        assert fresh.get_potential_energy() == energy
    assert atoms.calc.check_state(atoms) == []


def test_step_zero_asks_a_calculator_that_overlooks_charge_afresh() -> None:
    """As Orb's: its cache knows positions, cell and numbers only."""
    backbone = FakeBackbone("charged")
    states = [water(charge=c, spin=1) for c in (0, 1, -1)]
    found = [p["energy"] for p in sanity_checks.stock_predictions(backbone.stock_calculator(), states)]
    wanted = backbone(backbone.batch(states)).energy.tolist()
    assert found == pytest.approx(wanted, abs=1e-12)
    assert min(np.diff(np.sort(found))) > 1e-3
