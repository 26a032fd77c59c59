"""Observables of trajectories against what they must be, and their two errors against those that were planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.simulate import observables as o
from blip_ft.simulate.observables import Track, estimate
from blip_ft.simulate.options import Dynamics
from blip_ft.simulate.trajectories import Ensemble, files, simulate_draws

from .systems import structure


def series(K: int, T: int, model: float, noise: float, seed: int) -> np.ndarray:
    """(K, blocks) means of correlated series around means that scatter by ``model``."""
    rng = np.random.default_rng(seed)
    x = np.zeros((K, T))
    for i in range(1, T):
        x[:, i] = 0.9 * x[:, i - 1] + rng.normal(size=K)
    x *= noise / np.sqrt((1 + 0.9) / (1 - 0.9) * x.var() / T)  # std of the mean of T such numbers
    x += 5 + model * rng.normal(size=(K, 1))
    return x.reshape(K, o.BLOCKS, -1).mean(axis=2)


def test_the_two_errors_are_told_apart():
    """Over many repeats: model std and statistical std are those that were planted, the mean scatters as stated."""
    K, model, noise = 8, 0.3, 0.2
    found = [estimate(series(K, 1000, model, noise, seed)) for seed in range(150)]
    assert np.sqrt(np.mean([e.model_std**2 for e in found])) == pytest.approx(model, rel=0.12)
    assert np.sqrt(np.mean([e.statistical_std**2 for e in found])) == pytest.approx(
        noise / np.sqrt(K), rel=0.12
    )
    off = [e.value - 5 for e in found]
    assert np.std(off) == pytest.approx(np.hypot(model, noise) / np.sqrt(K), rel=0.15)


def test_models_that_are_one_are_not_resolved():
    found = [estimate(series(8, 1000, 0.0, 0.2, seed)) for seed in range(150)]
    assert np.mean([e.resolved for e in found]) < 0.12
    assert np.mean([estimate(series(8, 1000, 1.0, 0.2, seed)).resolved for seed in range(20)]) == 1


@given(st.integers(2, 6), st.floats(0.1, 10))
def test_it_scales_with_the_width_of_the_draws(K: int, factor: float):
    blocks = np.random.default_rng(K).normal(size=(K, 5, 3))
    one, other = estimate(blocks), estimate(blocks, factor)
    np.testing.assert_allclose(other.model_std, factor * one.model_std)
    np.testing.assert_array_equal(other.statistical_std, one.statistical_std)
    np.testing.assert_allclose(one.total_std**2, one.statistical_std**2 + one.model_std**2)


# ---- known answers -----------------------------------------------------------------------------


def test_neighbours_of_a_crystal_and_of_a_gas():
    crystal = bulk("Si", cubic=True) * (2, 2, 2)
    (g,) = o.distributions(Track([crystal], np.zeros(1)), [(14, 14)])[0]
    r = (np.arange(len(g)) + 0.5) * o.BIN
    shells = 4 * np.pi * r**2 * o.BIN * len(crystal) / crystal.get_volume() * g
    assert shells[r < 3].sum() == pytest.approx(4, rel=0.01)
    assert shells[(r > 3) & (r < 4.2)].sum() == pytest.approx(12, rel=0.01)
    rng = np.random.default_rng(0)
    gas = Track(
        [Atoms("Si20O30", rng.uniform(0, 9, (50, 3)), cell=[9, 9, 9], pbc=True) for _ in range(60)],
        np.zeros(60),
    )
    g = o.distributions(gas, [(8, 8), (8, 14), (14, 14)]).mean(axis=0)
    # an atom is no neighbour of its own, but its images are, further away
    np.testing.assert_allclose(g[:, 40:].mean(axis=1), [29 / 30, 1, 19 / 20], atol=0.01)


def walk(steps: np.ndarray, time: float, **atoms: Any) -> Track:
    places = np.cumsum(steps, axis=0)
    frames = [Atoms(positions=p, **atoms) for p in places]
    return Track(frames, time * np.arange(len(frames)))


def test_diffusion_of_a_random_walk():
    """Steps of std s in each direction every t: D = s^2 / (2 t)."""
    steps = np.random.default_rng(1).normal(0, 0.1, (1500, 40, 3))
    track = walk(steps, 10.0, symbols="O40")
    time, curve = o.displacements(track, slice(None), [8])
    np.testing.assert_allclose(curve[0, :50], 3 * 0.01 * np.arange(50) * (39 / 40), rtol=0.1)
    assert o._slopes(time[:200], curve[:, :200])[0] == pytest.approx(0.01 / (2 * 0.01), rel=0.15)


def test_vibrations_are_no_diffusion():
    time = np.linspace(0, 1000, 50)
    assert o.diffusive(time, 0.01 * time)
    assert not o.diffusive(time, 2.0 * (1 - np.exp(-time / 20)))  # a wide cage
    assert not o.diffusive(time, 1e-4 * time)  # a slope of nothing


def test_what_is_held_fixed_has_no_error():
    blocks = 91.4 + 1e-14 * np.random.default_rng(0).normal(size=(8, 5))
    found = estimate(blocks)
    assert found.total_std == 0
    assert not found.resolved


def test_motion_of_the_whole_does_not_count():
    track = walk(np.ones((40, 6, 3)), 1.0, symbols="O2Si4")
    _, curves = o.displacements(track, slice(None), [8, 14])
    np.testing.assert_allclose(curves, 0, atol=1e-12)


def test_a_cell_that_breathes_does_not_diffuse():
    frames = [bulk("Si", cubic=True, a=5.4 + 0.1 * np.sin(i)) for i in range(40)]
    _, curves = o.displacements(Track(frames, np.arange(40.0)), slice(None), [14])
    np.testing.assert_allclose(curves, 0, atol=1e-12)


def test_density_and_cell():
    track = Track([bulk("Si", cubic=True, a=5.431)], np.zeros(1))
    assert o.densities(track)[0] == pytest.approx(2.329, abs=0.002)
    np.testing.assert_allclose(o.cells(track)[0], [5.431] * 3 + [90] * 3)


# ---- draws as trajectories ---------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
def test_draws_have_trajectories_and_results(potential: BayesianPotential, tmp_path: Path, ensemble: str):
    target = tmp_path / "out.extxyz"
    dynamics = Dynamics(ensemble, 40, temperature=300.0, every=1, timestep=0.5, pressure_damping=100.0)  # type: ignore
    found, outcomes = simulate_draws(potential, structure(), target, dynamics, Ensemble(4))
    tracks, results, picture = files(target, 4)
    assert [p.name for p in tracks] == [f"out.draw-{k}.extxyz" for k in range(4)]
    assert [d.steps for d in outcomes] == [40] * 4
    assert len({read(p, -1).positions.tobytes() for p in tracks}) == 4
    assert json.loads(results.read_text()) == found
    assert picture.read_bytes().startswith(b"\x89PNG")
    kinds = {"rdf", "msd", "diffusion"} | ({"density", "cell"} if ensemble == "npt" else set())
    assert set(found["observables"]) == kinds
    assert set(found["observables"]["rdf"]) == {"O-O", "O-Si", "Si-Si"}
    assert found["scale"] == 3.0
    lines = o.summary(found["observables"])
    assert sum("none yet, atoms move about their places" in x for x in lines) == 2
    assert len(lines) == (2 if ensemble == "nvt" else 6)  # density and three lengths; angles are held
    # it goes on: nothing is run again, and the results are the same
    before = {p: p.read_bytes() for p in (*tracks, results)}
    simulate_draws(potential, structure(), target, dynamics, Ensemble(4), resume=True)
    assert before == {p: p.read_bytes() for p in (*tracks, results)}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"trajectories": 2}, "--trajectories"),
        ({"trajectories": 5}, "--trajectories"),
        ({"amplitude": 0.0}, "--amplitude"),
        ({"amplitude": 2.0}, "--amplitude"),
        ({"discard": 1.0}, "--discard"),
    ],
)
def test_ensembles_that_make_no_sense(options: dict[str, Any], field: str):
    with pytest.raises(BlipError) as caught:
        Ensemble(**({"trajectories": 4} | options))
    assert caught.value.field == field


def test_too_few_frames_are_told_before(potential: BayesianPotential, tmp_path: Path):
    dynamics = Dynamics("nvt", 40, temperature=300.0)
    with pytest.raises(BlipError, match="too few for 5 blocks of 4"):
        simulate_draws(potential, structure(), tmp_path / "out.extxyz", dynamics, Ensemble(4))
    assert list(tmp_path.iterdir()) == []
