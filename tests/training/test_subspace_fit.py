"""What the fit of a subspace posterior does to the mean and to the width of the draws."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from ase.io import write
from rich.console import Console

from blip_ft.closed_form.fitter import ClosedFormFitter, Misfit
from blip_ft.config import PosteriorConfig, Recipe, parse_recipe
from blip_ft.families.pathwise.posterior import PathwisePosterior
from blip_ft.families.registry import without_foreign_keys
from blip_ft.families.subspace import posterior as law
from blip_ft.families.subspace.posterior import SubspacePosterior
from blip_ft.training.loop import train
from blip_ft.training.prepare import Prepared, prepare
from blip_ft.uncertainty.predict import predict_set

from .labelled import frames

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
            "posterior": {"family": "subspace", "rank": 4, "projections": 4, "mean_steps": 3},
            "trainer": {"max_epochs": 0, "accelerator": "cpu"},
        }
    )
    return recipe, prepare(recipe, QUIET)


def fitter_of(recipe: Recipe, prepared: Prepared) -> ClosedFormFitter:
    return ClosedFormFitter(recipe, prepared.potential, prepared.sets, QUIET)


def test_gauss_newton_alone(prepared: tuple[Recipe, Prepared], tmp_path: Path) -> None:
    """No epochs: every step is in the history, the first from the pretrained weights, and they help."""
    recipe, ready = prepared
    before = fitter_of(recipe, ready).validation_misfit().value
    history = train(recipe, ready.potential, ready.sets, tmp_path, QUIET, plain=False)
    assert [sorted(row) for row in history] == 3 * [["epoch", "seconds", "val_energy_mae", "val_force_mae"]]
    assert [row["epoch"] for row in history] == [0.0, 1.0, 2.0]
    fitter = fitter_of(recipe, ready)
    assert fitter.validation_misfit().value < before - 1.0
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
    assert fitter_of(recipe, ready).validation_misfit().value == pytest.approx(
        least / len(p.n_atoms), rel=1e-4
    )


@pytest.mark.parametrize(("amplitude", "other", "tolerance"), [(0.05, 1.0, 0.1), (1.0, 0.05, 0.3)])
def test_the_covariance_is_stationary_for_draws_of_its_amplitude(
    amplitude: float,
    other: float,
    tolerance: float,
    prepared: tuple[Recipe, Prepared],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounds of averaging approach S^-1 = I/s^2 + H, H at draws of S; draws of another width want another S."""
    recipe, ready = prepared
    options = recipe.posterior
    options.amplitude, options.prior_scale, options.mean_steps = amplitude, 0.5, 0
    monkeypatch.setattr(law, "FINAL_ROUNDS", 5)
    fitter = fitter_of(recipe, ready)
    one = fitter.rows.hessian

    def average(basis: torch.Tensor, projections: int | None, draw: int) -> np.ndarray:
        """Over twelve draws per structure: one is a noisy average, wide draws have outliers."""
        return np.mean([one(basis, projections, 12 * draw + i) for i in range(12)], axis=0)

    monkeypatch.setattr(fitter.rows, "hessian", average)
    report = fitter.fit(final=True)
    posterior = ready.potential.posterior
    assert isinstance(posterior, SubspacePosterior)
    assert ready.potential.amplitude == report["amplitude"] == amplitude

    def off(width: float) -> float:
        """Largest factor, its logarithm, between S^-1 and what draws of a width ask for."""
        ready.potential.amplitude = width
        projections = fitter.options.projections_of_fit(last=False)
        hessian = np.mean([average(posterior.directions, projections, 100 + i) for i in range(3)], axis=0)
        stationary = np.eye(posterior.rank) / report["prior_scale"] ** 2 + hessian
        return float(np.abs(np.log(scipy.linalg.eigvalsh(posterior.precision(), stationary))).max())

    assert off(amplitude) < tolerance
    assert off(other) > 1.0


def test_narrow_draws_do_not_move_the_mean(prepared: tuple[Recipe, Prepared]) -> None:
    recipe, ready = prepared
    fitter_of(recipe, ready).fit(final=True)
    shares = []
    for amplitude in (0.1, 1.0):
        ready.potential.amplitude = amplitude
        mean, spread = (
            predict_set(ready.potential, ready.sets["validation"], "validation", n_draws=n, stress=False)
            for n in (0, 6)
        )
        assert spread.forces_std is not None
        shares.append(np.abs(spread.forces - mean.forces).mean() / spread.forces_std.mean())
    assert shares[0] < 0.02
    assert shares[0] == pytest.approx(0.01 * shares[1], rel=0.3)  # curvature: as the square of the width


def misfit(*forces: float) -> Misfit:
    """One force error per frame, and an exact energy where there is one."""
    return Misfit([[np.array([f, -f]), np.array([0.1, math.nan])] for f in forces])


def test_a_step_of_the_mean_has_to_be_better_by_more_than_chance() -> None:
    rest, narrowest = misfit(1.0, 2.0, 3.0, 2.0), ClosedFormFitter._narrowest
    better, worse = misfit(0.9, 1.9, 2.9, 1.9), misfit(1.1, 2.1, 3.1, 2.1)
    assert narrowest({0.0: rest, 0.5: better, 1.0: worse}) == 0.5
    by_chance = misfit(1.5, 1.4, 2.9, 1.9)  # better on average, not on all
    assert narrowest({0.0: rest, 0.5: by_chance, 1.0: misfit(9, 9, 9, 9)}) == 0.0
    assert narrowest({0.0: rest, 1.0: worse}) == 0.0


def test_a_step_is_no_wider_than_it_has_to_be() -> None:
    """Of steps that four frames cannot tell apart the narrowest, however much better all are than none."""
    rest, narrowest = misfit(1.0, 2.0, 3.0, 2.0), ClosedFormFitter._narrowest
    narrow, wide = misfit(0.5, 1.0, 1.5, 1.0), misfit(0.6, 0.8, 1.4, 1.1)
    assert wide.value < narrow.value
    assert narrowest({0.0: rest, 0.5: narrow, 1.0: wide}) == 0.5
    assert narrowest({0.0: rest, 0.5: narrow, 1.0: misfit(0.3, 0.8, 1.2, 0.8)}) == 1.0


def test_a_step_may_not_pay_with_energies() -> None:
    """Forces better by a tenth in every frame, energies ten times worse, though both are tiny."""
    rest = Misfit([[np.full(12, 1e-3), np.array([1e-5])] for _ in range(4)])
    step = Misfit([[np.full(12, 9e-4), np.array([1e-4])] for _ in range(4)])
    assert ClosedFormFitter._narrowest({0.0: rest, 1.0: step}) == 0.0


def test_weights_that_are_not_trained_take_no_step(prepared: tuple[Recipe, Prepared]) -> None:
    recipe, ready = prepared
    deltas = ready.potential.converted.deltas
    noisy = ready.potential.posterior.sites[0].name
    assert fitter_of(recipe, ready).mean_is_free
    deltas[noisy].requires_grad_(False)
    before = {name: d.detach().clone() for name, d in deltas.items()}
    assert fitter_of(recipe, ready).fit(final=True)["mean_steps"] == []
    assert all(torch.equal(d, before[name]) for name, d in deltas.items())


def test_a_refused_step_leaves_the_mean_as_it_was(
    prepared: tuple[Recipe, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: trying steps must not add up to rounding."""
    recipe, ready = prepared
    fitter, deltas = fitter_of(recipe, ready), ready.potential.converted.deltas
    before = {name: d.detach().clone() for name, d in deltas.items()}
    rows = fitter.rows.rows(2)
    monkeypatch.setattr(ClosedFormFitter, "_narrowest", staticmethod(lambda tried: 0.0))
    assert fitter.move_mean(rows, 0.5) == 0.0
    for name, d in deltas.items():
        assert torch.equal(d, before[name])


def test_the_covariance_is_that_of_the_mean_that_is_kept(prepared: tuple[Recipe, Prepared]) -> None:
    """A step of the mean comes before the last gradients, not after them."""
    recipe, ready = prepared
    changed = recipe.posterior.model_dump() | {"family": "pathwise", "projections": "all"}
    recipe.posterior = PosteriorConfig(**without_foreign_keys(changed))
    ready.potential.posterior = PathwisePosterior(
        ready.potential.posterior.sites, ready.potential.prior, 0.01, rank=4
    )
    assert fitter_of(recipe, ready).fit(final=True)["mean_steps"][0] > 0
    found = ready.potential.posterior.directions.clone()
    recipe.posterior.mean_steps = 0
    assert fitter_of(recipe, ready).fit(final=True)["mean_steps"] == []
    torch.testing.assert_close(ready.potential.posterior.directions, found, rtol=1e-9, atol=1e-12)


def test_every_force_component_has_a_row(prepared: tuple[Recipe, Prepared]) -> None:
    """H of all components is the expectation of H of random projections, and steering fits take few."""
    recipe, ready = prepared
    fitter = fitter_of(recipe, ready)
    done: list[int] = []
    whole = fitter.rows.rows(None, progress=done.append)
    n_train = len(ready.sets["train"])
    assert sum(done) == n_train
    assert len(whole.gradients) == n_train * (1 + 3 * 3)
    np.testing.assert_allclose(whole.gradients.norm(dim=1).numpy() > 0, True)
    exact = (whole.gradients.T @ whole.gradients).numpy()
    many = [fitter.rows.rows(8, number=i) for i in range(40)]
    mean = np.mean([(r.gradients.T @ r.gradients).numpy() for r in many], axis=0)
    assert np.abs(mean - exact).max() < 0.15 * np.abs(exact).max()
