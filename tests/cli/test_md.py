"""``blip-finetune md``: from a structure to a trajectory, how it ends, and what it refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io import read, write

from blip_ft.cli import md_progress
from blip_ft.simulate.guard import Guard, Limits
from blip_ft.system.signals import Stopped
from blip_ft.uncertainty.results import SetPrediction

from .structures import leftovers, structure

QUICK = ("--temperature", "300", "--timestep", "0.5", "--every", "5", "--thin-cell")
FREE = ("--save-above", "off", "--stop-above", "off")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    write(tmp_path / "start.extxyz", structure())
    return tmp_path / "start.extxyz"


def test_a_trajectory_with_error_bars(call: Any, pathwise: Path, start: Path, tmp_path: Path):
    target = tmp_path / "out.extxyz"
    code, out, err = call("md", pathwise, start, "-o", target, "--steps", "10", *QUICK, *FREE, "--json")
    assert code == 0, err
    frames = read(target, ":")
    assert [a.info["step"] for a in frames] == [0, 5, 10]
    for atoms in frames:
        assert atoms.info["energy_std"] > 0
        assert atoms.arrays["forces_std_norm"].shape == (6,)
        assert atoms.get_momenta().any()
        assert np.isfinite(atoms.get_forces()).all()
    last = json.loads(out.splitlines()[-1])
    assert last["steps"] == 10
    assert last["stopped"] is False
    assert last["reason"] == ""
    assert last["worst_atom"] in range(6)
    assert last["largest_std"] > 0
    assert last["drift_mev_per_atom_ps"] is None  # Langevin keeps no energy
    assert "guard: off" in err
    assert leftovers(tmp_path) == ["out.extxyz", "out.log.csv", "out.state.npz", "start.extxyz"]


def test_it_goes_on_and_is_said_to(call: Any, pathwise: Path, start: Path, tmp_path: Path, monkeypatch: Any):
    from blip_ft.simulate import run as module

    options = ("--steps", "20", "--ensemble", "nve", *QUICK, *FREE)
    call("md", pathwise, start, "-o", tmp_path / "whole.extxyz", *options)
    look, seen = module.Run._look, 0

    def stopped(self: Any, **more: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise Stopped(signal.SIGTERM)
        look(self, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "_look", stopped)
        code, _, err = call("md", pathwise, start, "-o", tmp_path / "out.extxyz", *options)
    assert code == 143
    assert "--resume goes on" in err
    assert len(read(tmp_path / "out.extxyz", ":")) == 2
    code, _, err = call("md", pathwise, start, "-o", tmp_path / "out.extxyz", *options)
    assert code == 2
    assert "this file exists" in err
    assert call("md", pathwise, start, "-o", tmp_path / "out.extxyz", *options, "--resume")[0] == 0
    for ending in (".extxyz", ".log.csv"):
        assert (tmp_path / f"out{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    code, _, err = call(
        "md", pathwise, start, "-o", tmp_path / "out.extxyz", *options, "--resume", "--seed", "2"
    )
    assert code == 2
    assert "of another seed" in err


def test_the_guard_ends_it_with_an_exit_code(call: Any, pathwise: Path, start: Path, tmp_path: Path):
    options = ("--steps", "10", *QUICK, "--save-above", "1e-6", "--stop-above", "2e-6", "--patience", "2")
    code, out, err = call("md", pathwise, start, "-o", tmp_path / "out.extxyz", *options, "--json")
    assert code == 3
    last = json.loads(out.splitlines()[-1])
    assert last["stopped"] is True
    assert last["reason"] in err
    assert "1 frames to be labelled are in" in err
    assert (tmp_path / "out.saved.extxyz").is_file()


def test_multiples_of_calibration_frames(call: Any, pathwise: Path, start: Path, tmp_path: Path):
    options = ("--steps", "5", *QUICK)
    code, _, err = call("md", pathwise, start, "-o", tmp_path / "out.extxyz", *options)
    assert code == 2
    assert "does not say which forces_std its calibration frames have" in err
    assert "give a number in eV/Å" in err
    assert not (tmp_path / "out.extxyz").exists()


def test_levels_of_a_run_whose_model_does_not_know_them(run: Path, tmp_path: Path):
    from blip_ft.library import load
    from blip_ft.simulate.levels import known_levels

    potential = load(run)
    assert known_levels(potential, run) is None
    stds = np.full((6, 3), 0.1)
    made = SetPrediction(
        *(
            "calibration",
            np.array([6]),
            np.full(6, 8),
            ["a#0"],
            np.zeros(1),
            np.zeros((6, 3)),
            np.zeros((1, 6)),
        ),
        *(np.zeros(1), np.zeros((6, 3)), np.zeros((1, 6)), np.ones(1), stds, np.ones((1, 6))),
        ood_score=np.arange(6.0),
    )
    (tmp_path / "predictions").mkdir()
    made.save(tmp_path / "predictions" / "blip-calibration.npz")
    levels = known_levels(potential, tmp_path)
    assert levels is not None
    assert levels.forces_std == pytest.approx(np.sqrt(3 * (0.02**2 + 0.3**2)))
    assert levels.ood_score == pytest.approx(4.75)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", "0"), "above 0"),
        (("--steps", "0"), "1 or more"),
        (("--save-above", "3", "--stop-above", "2"), "smaller threshold"),
        (("--ensemble", "nvt", "--pressure", "1"), "--ensemble npt"),
        (("-o", "missing/out.extxyz"), "mkdir -p"),
        (("-o", "out.traj"), ".extxyz"),
        (("--draws", "0", "--stop-above", "1"), "--signal ood_score"),
    ],
)
def test_bad_input(
    call: Any,
    pathwise: Path,
    start: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    words: str,
    monkeypatch: Any,
):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("md", pathwise, start, "-o", "out.extxyz", "--steps", "5", *QUICK, *FREE, *options)
    assert code == 2
    assert words in err
    assert leftovers(tmp_path) == ["start.extxyz"]


def test_a_line_says_time_left_and_worst_atom(capsys: Any, monkeypatch: Any):
    now = iter(range(0, 10**6, 25))  # every look at the clock is 25 s later
    monkeypatch.setattr(md_progress.time, "monotonic", lambda: float(next(now)))
    guard = Guard(Limits())
    with md_progress.shown() as say:
        for step in range(20, 181, 20):
            guard.see(step, np.array([8, 14]), np.array([0.01, 0.02 + step / 1e4]), None)
            say(step, 200, guard)
    assert capsys.readouterr().err.splitlines() == [
        "md: 60/200 steps, 2 min 55 s left, worst atom 1: 0.026 eV/Å",
        "md: 120/200 steps, 1 min 40 s left, worst atom 1: 0.032 eV/Å",
        "md: 180/200 steps, 25 s left, worst atom 1: 0.038 eV/Å",
    ]


# ---- draws as trajectories ---------------------------------------------------------------------

DRAWS = ("--trajectories", "4", "--steps", "20", *QUICK, "--every", "1", "--discard", "0")


def test_draws_give_observables(call: Any, pathwise: Path, start: Path, tmp_path: Path):
    target = tmp_path / "out.extxyz"
    code, out, err = call("md", pathwise, start, "-o", target, *DRAWS)
    assert code == 0, err
    assert "diffusion of O: none yet" in out
    found = json.loads((tmp_path / "out.observables.json").read_text())
    assert found["dynamics"]["steps"] == 20
    names = [f"out.draw-{k}{ending}" for k in range(4) for ending in (".extxyz", ".log.csv", ".state.npz")]
    assert leftovers(tmp_path) == sorted(
        [*names, "out.observables.json", "out.observables.png", "start.extxyz"]
    )
    code, out, _ = call("md", pathwise, start, "-o", target, *DRAWS, "--resume", "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == found
    code, _, err = call("md", pathwise, start, "-o", target, *DRAWS)
    assert code == 2
    assert "this file exists" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*DRAWS, "--trajectories", "3"), "an even number of 4 or more"),
        ((*DRAWS, "--stop-above", "1"), "which has no error bars"),
        ((*DRAWS, "--amplitude", "2"), "above 0 and up to 1"),
        ((*DRAWS, "--steps", "10"), "too few for 5 blocks"),
        (("--steps", "10", *QUICK, "--discard", "0.5"), "add --trajectories"),
    ],
)
def test_bad_input_of_draws(
    call: Any, pathwise: Path, start: Path, tmp_path: Path, options: tuple[str, ...], words: str
):
    code, _, err = call("md", pathwise, start, "-o", tmp_path / "out.extxyz", *options)
    assert code == 2
    assert words in err
    assert leftovers(tmp_path) == ["start.extxyz"]
