"""One table of outputs: calculator, predicted files, stored sets and documents follow it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.outputs import BY_NAME, IN_ARRAYS, IN_INFO, OUTPUTS, markdown
from blip_ft.uncertainty.predict import predict_atoms
from blip_ft.uncertainty.results import SetPrediction

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def potential() -> BayesianPotential:
    potential = BayesianPotential(
        FakeBackbone.load("tiny"),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(family="weight"),
    )
    potential.calibration = Calibration.constant(energy=0.01, forces=0.02, stress=0.001)
    return potential


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(OUTPUTS)


@pytest.mark.parametrize("method", ["draws", "energy", "linear"])
def test_what_is_predicted_is_in_the_table_and_has_its_shape(
    potential: BayesianPotential, method: str
) -> None:
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.05, seed=0)
    options = {"n_draws": 4} if method == "linear" else {}
    (item,) = predict_atoms(potential, [atoms], method=method, **options)
    assert item.keys() <= BY_NAME.keys()
    for name, value in item.items():
        assert np.shape(value) == BY_NAME[name].size(1, len(atoms))[BY_NAME[name].per == "structure" :], name


def test_the_calculator_knows_all_of_it() -> None:
    assert set(BlipCalculator.implemented_properties) == {*BY_NAME, "free_energy"}


def test_files_hold_everything_but_covariances() -> None:
    standard = {o.name for o in OUTPUTS if o.standard}
    assert {*IN_INFO, *IN_ARRAYS, *standard} == BY_NAME.keys() - {"forces_cov"}


def test_stored_sets_hold_outputs_and_their_labels() -> None:
    own = {"name", "n_atoms", "numbers", "frames"}
    names = {f.name.removesuffix("_label") for f in fields(SetPrediction)} - own
    assert names <= BY_NAME.keys()


def test_the_document_has_the_table() -> None:
    assert markdown() in (ROOT / "docs" / "uncertainty.md").read_text(encoding="utf-8")
