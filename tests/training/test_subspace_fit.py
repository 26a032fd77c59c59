"""What the fit of a subspace posterior does to the mean and to the width of the draws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from ase.io import write
from rich.console import Console

from blip_ft.config import Recipe, parse_recipe
from blip_ft.training.fit import Prepared, prepare
from blip_ft.training.loop import train
from blip_ft.training.subspace import SubspaceFitter, first_as_good
from blip_ft.uncertainty.linearity import MAX_SHIFT
from blip_ft.uncertainty.predict import predict_batch, predict_set

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


def test_the_mean_over_draws_stays_the_mean_model(prepared: tuple[Recipe, Prepared]) -> None:
    """On the context frames, at the amplitude that is chosen; wider draws leave it."""
    recipe, ready = prepared
    potential = ready.potential
    fitter = fitter_of(recipe, ready)
    fitter.fit(final=True)
    potential.posterior.set_covariance(np.eye(4), 3.0, 1e6)  # type: ignore[operator] # curvature matters
    amplitude = fitter.choose_amplitude()
    batch = fitter._batch(fitter.context)
    mean = predict_batch(potential, batch, n_draws=0).mean.forces
    assert mean is not None
    shares = []
    for factor in (0.5, 1.0, 2.0):
        potential.amplitude = factor * amplitude
        moments = predict_batch(potential, batch, n_draws=6)
        assert moments.mean.forces is not None
        assert moments.forces_std is not None
        shift = (moments.mean.forces - mean).square().mean().sqrt()
        shares.append(float(shift / moments.forces_std.square().mean().sqrt()))
    assert amplitude < 1.0
    assert shares[0] < shares[1] < 1.5 * MAX_SHIFT < shares[2]


def test_a_later_option_has_to_be_better_by_more_than_chance() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 2.0]), np.array([1.5, 1.4, 2.9, 1.9])
    assert first_as_good([a, b]) == 0  # b is better on average, not on all
    assert first_as_good([a, a - 0.1]) == 1
    assert first_as_good([a, a + 0.1, a - 0.5]) == 2
    assert first_as_good([a[:1], b[:1]]) == 0
