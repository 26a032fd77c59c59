"""Simulations: laws of their integrators, files, and runs that go on as if nothing had ended them."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.constraints import FixAtoms
from ase.io import read

from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.simulate.guard import Limits
from blip_ft.simulate.integrators import integrator
from blip_ft.simulate.options import Dynamics
from blip_ft.simulate.output import Output, paths
from blip_ft.simulate.run import Outcome, simulate
from blip_ft.simulate.start import degrees_of_freedom, with_velocities

from .systems import Springs, structure

RUNS: dict[str, dict[str, Any]] = {
    "nve": {"ensemble": "nve", "temperature": 300},
    "langevin": {"ensemble": "nvt", "temperature": 300},
    "heated": {"ensemble": "nvt", "temperature": 300, "heat_to": 3000},
    "nose-hoover": {"ensemble": "nvt", "temperature": 300, "thermostat": "nose-hoover"},
    "npt": {"ensemble": "npt", "temperature": 300, "pressure": 1.0, "pressure_damping": 50},
    "npt, full cell": {"ensemble": "npt", "temperature": 300, "cell": "full", "pressure_damping": 50},
}


def dynamics(name: str, steps: int = 24, **options: Any) -> Dynamics:
    return Dynamics(**({"steps": steps, "every": 4, "timestep": 0.5} | RUNS[name] | options))


def run(
    potential: BayesianPotential, target: Path, options: Dynamics, limits: Limits | None = None, **more: Any
) -> Outcome:
    return simulate(potential, structure(), target, options, limits or Limits(), **more)


def contents(target: Path) -> dict[str, bytes]:
    return {k: p.read_bytes() for k, p in paths(target).items() if k != "state" and p.exists()}


def log(target: Path) -> list[dict[str, str]]:
    with paths(target)["log"].open(newline="") as file:
        return list(csv.DictReader(file))


# ---- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in RUNS if n != "heated"])
def test_a_continued_run_is_the_uninterrupted_one(potential: BayesianPotential, tmp_path: Path, name: str):
    whole, parts = tmp_path / "whole.extxyz", tmp_path / "parts.extxyz"
    limits = Limits(save=0.044, patience=1)
    run(potential, whole, dynamics(name), limits)
    for steps in (8, 12, 24):
        run(potential, parts, dynamics(name, steps), limits, resume=True)
    assert contents(whole) == contents(parts)
    frames = read(whole, ":")
    assert [a.info["step"] for a in frames] == list(range(0, 25, 4))
    assert not np.allclose(frames[0].positions, frames[-1].positions)


def _killed_at(event: int, work: Any) -> bool:
    """Do some work in a process that kills itself at an evaluation or write; whether it did."""
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            _kill_at(event)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _kill_at(event: int) -> None:  # pragma: no cover
    from blip_ft.simulate import forces, output

    seen = 0

    def now() -> bool:
        nonlocal seen
        seen += 1
        return seen == event

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    calculate, append, savez = forces.Forces.calculate, output.Output._append, np.savez

    def calculates(self: Any, *args: Any, **more: Any) -> None:
        if now():
            die()
        calculate(self, *args, **more)

    def appends(self: Any, kind: str, text: str) -> None:
        if now():
            append(self, kind, text[: len(text) // 2])
            die()
        append(self, kind, text)
        if now():
            die()

    def saves(file: Any, **arrays: Any) -> None:
        if now():
            file.write(b"half")
            file.flush()
            die()
        savez(file, **arrays)

    forces.Forces.calculate, output.Output._append, output.np.savez = calculates, appends, saves  # type: ignore


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("name", list(RUNS))
def test_killed_at_random_steps_and_between_files(potential: BayesianPotential, tmp_path: Path, name: str):
    limits = Limits(save=0.044, patience=1)
    whole, parts = tmp_path / "whole.extxyz", tmp_path / "parts.extxyz"
    run(potential, whole, dynamics(name), limits)
    rng = np.random.default_rng(sum(name.encode()))
    kills = 0
    while _killed_at(
        int(rng.integers(2, 18)),
        lambda: run(potential, parts, dynamics(name), limits, resume=True, overwrite=True),
    ):
        kills += 1
        assert kills < 60
    assert kills >= 3
    assert paths(whole)["saved"].exists() or "npt" in name
    run(potential, parts, dynamics(name), limits, resume=True)
    assert contents(whole) == contents(parts)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


# ---- laws --------------------------------------------------------------------------------------


def test_energy_is_kept_to_second_order_in_the_step(potential: BayesianPotential, tmp_path: Path):
    errors = []
    for i, step in enumerate((0.5, 1.0)):
        target = tmp_path / f"{i}.extxyz"
        run(potential, target, dynamics("nve", int(30 / step), every=1, timestep=step, draws=0))
        errors.append(np.std([float(r["conserved_eV"]) for r in log(target)]))
    assert errors[1] / errors[0] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("name", ["nose-hoover", "npt", "npt, full cell"])
def test_the_extended_energy_is_kept(potential: BayesianPotential, tmp_path: Path, name: str):
    target = tmp_path / "out.extxyz"
    run(potential, target, dynamics(name, 120, every=2, timestep=0.25, draws=0, damping=10))
    rows = log(target)
    kept = np.array([float(r["conserved_eV"]) for r in rows])
    moved = np.array([float(r["potential_eV"]) + float(r["kinetic_eV"]) for r in rows])
    assert np.ptp(kept) < 0.02 * np.ptp(moved)


@pytest.mark.parametrize("name", ["langevin", "nose-hoover"])
def test_the_temperature_is_the_one_asked_for(name: str):
    """Of the 3 n - 3 components that move: with four atoms a wrong count would be 25 % off."""
    at = structure().positions[:4]
    atoms = Atoms("SiO2Si", positions=at)
    atoms.calc = Springs(at.copy(), 2.0)
    options = dynamics(name, 12000, timestep=1.0, damping=20, friction=50)
    with_velocities(atoms, options)
    free = degrees_of_freedom(atoms)
    md, found = integrator(atoms, options), []
    for _ in range(options.steps):
        md.step()
        found.append(2 * atoms.get_kinetic_energy() / (free * units.kB))
    assert np.mean(found) == pytest.approx(300, rel=0.05)
    np.testing.assert_allclose(atoms.get_momenta().sum(axis=0), 0, atol=1e-10)


def test_first_velocities_have_the_temperature_and_no_motion_of_the_whole():
    atoms = structure()
    with_velocities(atoms, dynamics("nve", seed=3))
    assert 2 * atoms.get_kinetic_energy() / (15 * units.kB) == pytest.approx(300)
    np.testing.assert_allclose(atoms.get_momenta().sum(axis=0), 0, atol=1e-12)
    other = structure()
    with_velocities(other, dynamics("nve", seed=4))
    assert not np.allclose(atoms.get_momenta(), other.get_momenta())
    kept = atoms.get_momenta()
    with_velocities(atoms, dynamics("nve", temperature=900))
    np.testing.assert_array_equal(atoms.get_momenta(), kept)


def test_fixed_atoms_stay(potential: BayesianPotential, tmp_path: Path):
    start = structure()
    start.set_constraint(FixAtoms([1, 4]))
    simulate(potential, start, tmp_path / "out.extxyz", dynamics("langevin"), Limits())
    frames = read(tmp_path / "out.extxyz", ":")
    moved = np.abs(frames[-1].positions - start.positions).max(axis=1)
    assert (moved > 1e-3).tolist() == [True, False, True, True, False, True]
    assert frames[-1].constraints[0].index.tolist() == [1, 4]


def test_pressure_of_the_log_includes_the_motion_of_the_atoms(potential: BayesianPotential, tmp_path: Path):
    target = tmp_path / "out.extxyz"
    run(potential, target, dynamics("npt"))
    for row, frame in zip(log(target), read(target, ":"), strict=True):
        kinetic = (frame.get_momenta() ** 2 / frame.get_masses()[:, None]).sum() / (3 * frame.get_volume())
        expected = kinetic - frame.get_stress()[:3].mean()
        assert float(row["pressure_GPa"]) == pytest.approx(expected / units.GPa, rel=1e-9)
        assert float(row["volume_A3"]) == pytest.approx(frame.get_volume())


# ---- outcome -----------------------------------------------------------------------------------


def test_the_guard_ends_a_run_and_says_why(potential: BayesianPotential, tmp_path: Path):
    target = tmp_path / "out.extxyz"
    limits = Limits("ood_score", save=1.5, stop=2.0, patience=2)
    done = run(potential, target, dynamics("nve", 400), limits)
    assert (done.stopped, done.steps) == (True, 40)
    assert f"step {done.steps}: ood_score of atom" in done.reason
    assert "above 2 in 2 error bars in a row" in done.reason
    last = read(target, -1)
    assert last.info["step"] == done.steps
    assert last.info["guard"] == done.reason
    saved = read(paths(target)["saved"], ":")
    assert [a.info["step"] for a in saved] == [20, 28, 36]
    assert done.saved == 3
    assert done.largest_std == max(float(r["worst_forces_std_total_eV_per_A"]) for r in log(target))
    assert log(target)[-1]["guard"] == "stop"
    # with the same thresholds it stays where it is, with others it goes on
    before = contents(target)
    assert run(potential, target, dynamics("nve", 400), limits, resume=True) == done
    assert contents(target) == before
    assert run(potential, target, dynamics("nve", 60), Limits(), resume=True).steps == 60


def test_scores_ask_for_error_bars_between_two_turns(potential: BayesianPotential, tmp_path: Path):
    target = tmp_path / "out.extxyz"
    hot = dynamics("nve", 40, temperature=20000, every=20)
    run(potential, target, hot, Limits(suspect=1e-6))
    steps = [int(r["step"]) for r in log(target)]
    assert set(steps) > {0, 20, 40}
    assert [a.info["step"] for a in read(target, ":")] == [0, 20, 40]
    quiet = tmp_path / "quiet.extxyz"
    run(potential, quiet, hot, Limits())
    assert [int(r["step"]) for r in log(quiet)] == [0, 20, 40]
    # error bars change nothing of the motion
    assert read(quiet, -1).positions == pytest.approx(read(target, -1).positions, abs=0)


def test_an_explosion_ends_the_run_at_its_last_whole_frame(
    potential: BayesianPotential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from blip_ft.simulate import forces

    calculate, calls = forces.Forces.calculate, 0

    def explodes(self: Any, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        calculate(self, *args, **options)
        if calls > 10:
            self.results["forces"][0] = np.nan

    monkeypatch.setattr(forces.Forces, "calculate", explodes)
    target = tmp_path / "out.extxyz"
    done = run(potential, target, dynamics("nve"))
    assert done.stopped
    assert "step 10: the run has exploded" in done.reason
    assert [a.info["step"] for a in read(target, ":")] == [0, 4, 8]
    monkeypatch.undo()
    assert run(potential, target, dynamics("nve"), resume=True).reason == done.reason


def test_without_error_bars_nothing_is_said_of_them(potential: BayesianPotential, tmp_path: Path):
    target = tmp_path / "out.extxyz"
    done = run(potential, target, dynamics("nve", draws=0))
    assert (done.worst_atom, done.largest_std) == (None, None)
    assert "energy_std" not in read(target, -1).info
    assert log(target)[-1]["worst_atom"] == ""
    assert done.drift is not None


# ---- what does not go on -----------------------------------------------------------------------


def test_only_the_same_run_goes_on(potential: BayesianPotential, tmp_path: Path):
    target = tmp_path / "out.extxyz"
    run(potential, target, dynamics("langevin", 8))
    before = contents(target)
    with pytest.raises(BlipError, match="this file exists"):
        run(potential, target, dynamics("langevin"))
    for options, what in (
        (dynamics("langevin", seed=1), "seed"),
        (dynamics("langevin", temperature=400), "temperature"),
        (dynamics("nve"), "ensemble"),
        (dynamics("langevin", timestep=0.25), "timestep"),
        (dynamics("langevin", every=2), "every"),
    ):
        with pytest.raises(BlipError, match=f"is of another.* {what} "):
            run(potential, target, options, resume=True)
    with pytest.raises(BlipError, match="another structure"):
        simulate(potential, structure(1), target, dynamics("langevin"), Limits(), resume=True)
    assert contents(target) == before


@pytest.mark.parametrize("damage", ["shorter", "other", "state", "no state"])
def test_damaged_files_do_not_go_on(potential: BayesianPotential, tmp_path: Path, damage: str):
    target = tmp_path / "out.extxyz"
    run(potential, target, dynamics("nve", 8))
    text, state = target.read_bytes(), paths(target)["state"]
    if damage == "shorter":
        target.write_bytes(text[:-100])
    elif damage == "other":
        target.write_bytes(text.replace(b"Si", b"Ge", 1))
    elif damage == "state":
        state.write_bytes(state.read_bytes()[:200])
    else:
        state.unlink()
    with pytest.raises(BlipError, match=r"--overwrite"):
        run(potential, target, dynamics("nve"), resume=True)
    assert run(potential, target, dynamics("nve"), overwrite=True).steps == 24


def test_two_programs_do_not_write_one_trajectory(potential: BayesianPotential, tmp_path: Path):
    target = tmp_path / "out.extxyz"
    run(potential, target, dynamics("nve", 8))
    import fcntl

    with target.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlipError, match="another program is writing"):
            run(potential, target, dynamics("nve"), resume=True)


def test_what_was_to_be_replaced_stays_where_nothing_comes_in_its_place(
    potential: BayesianPotential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from blip_ft.simulate import forces

    target = tmp_path / "out.extxyz"
    run(potential, target, dynamics("nve", 8))
    before, files = contents(target), sorted(tmp_path.iterdir())
    calculate = forces.Forces.calculate

    def broken(self: Any, *args: Any, **options: Any) -> None:
        calculate(self, *args, **options)
        self.results["forces"][0] = np.nan

    monkeypatch.setattr(forces.Forces, "calculate", broken)
    with pytest.raises(BlipError, match="not finite"):
        run(potential, target, dynamics("nve", seed=1), overwrite=True)
    assert contents(target) == before
    assert sorted(tmp_path.iterdir()) == files
    with pytest.raises(BlipError, match="not finite"):
        run(potential, tmp_path / "new.extxyz", dynamics("nve"))
    assert sorted(tmp_path.iterdir()) == files


def test_a_run_that_cannot_begin_leaves_nothing(
    potential: BayesianPotential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Output, "commit", lambda *_: (_ for _ in ()).throw(BlipError("full")))
    with pytest.raises(BlipError, match="full"):
        run(potential, tmp_path / "out.extxyz", dynamics("nve"))
    assert list(tmp_path.iterdir()) == []
