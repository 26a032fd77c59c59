"""What the fit of a subspace posterior does to the mean and to the width of the draws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from ase.io import write
from rich.console import Console

from blip_ft.config import Recipe, parse_recipe
from blip_ft.data import FrameDataset
from blip_ft.potential import BayesianPotential
from blip_ft.training.fit import Prepared, prepare
from blip_ft.training.loop import train
from blip_ft.training.subspace import LEAST_WIDTH, SubspaceFitter
from blip_ft.uncertainty.linearity import MAX_EXCESS
from blip_ft.uncertainty.predict import predict_set

from .test_bad_input import frames

QUIET = Console(quiet=True)


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Recipe, Prepared]:
    data = frames(30)
    for a in data:  # something to learn: the fake potential has right labels otherwise
        a.info["REF_energy"] *= 1.2
        a.arrays["REF_forces"] *= 1.2
    write(tmp_path / "train.extxyz", data)
    recipe = parse_recipe(
        {
            "name": "run",
            "data": {"train": str(tmp_path / "train.extxyz")},
            "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
            "posterior": {"rank": 4, "projections": 4, "mean_steps": 3},
            "trainer": {"max_epochs": 0, "accelerator": "cpu"},
        }
    )
    return recipe, prepare(recipe, QUIET)


def fitter_of(recipe: Recipe, prepared: Prepared) -> SubspaceFitter:
    return SubspaceFitter(recipe, prepared.potential, prepared.sets, QUIET)


def test_gauss_newton_alone(prepared: tuple[Recipe, Prepared], tmp_path: Path) -> None:
    """No epochs: every step is in the history, the first from the pretrained weights, and they help."""
    recipe, ready = prepared
    before = fitter_of(recipe, ready).validation_misfit()
    history = train(recipe, ready.potential, ready.sets, tmp_path, QUIET, plain=False)
    assert [sorted(row) for row in history] == 3 * [["epoch", "seconds", "val_energy_mae", "val_force_mae"]]
    assert [row["epoch"] for row in history] == [0.0, 1.0, 2.0]
    fitter = fitter_of(recipe, ready)
    assert fitter.validation_misfit() < before - 1.0
    assert ready.potential.fit_reports[-1]["mean_steps"][0] > 0
    p = predict_set(ready.potential, ready.sets["validation"], "validation", n_draws=0, stress=False)
    assert history[-1]["val_force_mae"] == pytest.approx(1e3 * np.abs(p.forces_error).mean())
    assert history[-1]["val_energy_mae"] == pytest.approx(1e3 * np.abs(p.energy_error).mean())


def test_misfit_is_a_likelihood_with_the_best_noise(prepared: tuple[Recipe, Prepared]) -> None:
    """n log(mean |e|), up to a constant the least NLL of Laplacian noise."""
    recipe, ready = prepared
    p = predict_set(ready.potential, ready.sets["validation"], "validation", n_draws=0, stress=False)
    least = 0.0
    for error in (np.abs(p.forces_error).ravel(), np.abs(p.energy_error)):
        widths = error.mean() * np.geomspace(0.2, 5, 2001)
        least += min(float(np.sum(np.log(2 * b) + error / b)) for b in widths)
        least -= error.size * (1 + math.log(2))
    assert fitter_of(recipe, ready).validation_misfit() == pytest.approx(least / len(p.n_atoms), rel=1e-4)


def test_draws_are_no_wider_than_curvature_allows_near_the_data(prepared: tuple[Recipe, Prepared]) -> None:
    recipe, ready = prepared
    potential, sets = ready.potential, ready.sets
    fitter = fitter_of(recipe, ready)
    fitter.fit(final=True)
    for s in (3.0, 30.0):  # so wide that curvature matters
        potential.posterior.set_covariance(np.eye(4), s, 1.0)  # type: ignore[operator]
        potential.amplitude = amplitude = fitter.choose_amplitude()
        assert LEAST_WIDTH <= amplitude < 1.0
        wide, narrow = (at(potential, sets["validation"], a) for a in (amplitude, LEAST_WIDTH / 2))
        assert wide == pytest.approx(narrow, rel=3 * MAX_EXCESS)


def at(potential: BayesianPotential, frames: FrameDataset, amplitude: float) -> float:
    """rms over components of the forces' std."""
    potential.amplitude = amplitude
    std = predict_set(potential, frames, "validation", n_draws=24, stress=False).forces_std
    assert std is not None
    return float(np.sqrt(np.square(std).mean()))
