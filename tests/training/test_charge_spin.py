"""A model that sees charge and spin sees those of the frames in every stage before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.io import write
from rich.console import Console

import blip_ft
from blip_ft import cli
from blip_ft.config import Recipe
from blip_ft.data.read.sources import load_source
from blip_ft.data.write.convert import convert
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training.prepare import prepare
from blip_ft.uncertainty.calculator import BlipCalculator

STATES = [(0, 1), (1, 2), (-1, 2), (2, 1)]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """40 frames in four states with the labels of the charged model itself."""
    rng = np.random.default_rng(0)
    calculator = FakeBackbone("charged").stock_calculator()
    frames = []
    for i in range(40):
        a = Atoms("SiO2", positions=[(0, 0, 0), (1.6, 0, 0), (0, 1.6, 0)], cell=[5, 5, 5], pbc=True)
        a.positions += rng.normal(0, 0.1, (3, 3))
        charge, spin = STATES[i % 4]
        a.info = {"charge": charge, "spin": spin}
        calculator.reset()
        a.calc = calculator
        energy, forces = a.get_potential_energy(), a.get_forces().copy()
        a.calc = None
        a.info["REF_energy"], a.arrays["REF_forces"] = energy, forces
        frames.append(a)
    write(tmp_path / "train.extxyz", frames)
    return tmp_path / "train.extxyz"


def recipe_of(source: Path, **changes: object) -> dict[str, object]:
    return {
        "name": "run",
        "output": str(source.parent / "runs"),
        "data": {"train": str(source), "references": "keep"},
        "model": {"adapter": "fake", "checkpoint": "charged", "dtype": "float64"},
        "posterior": {"family": "weight", "prior_scale": 0.1},
        "objective": {"temperature": 1e-3},
        "plain": {"enabled": False},
        "uncertainty": {"n_draws": 3},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
        **changes,
    }


@pytest.mark.parametrize("ending", ["extxyz", "traj", "db", "parquet", "jsonl"])
def test_labels_of_the_model_itself_have_no_error(labelled: Path, ending: str) -> None:
    source = labelled
    if ending != "extxyz":
        source = convert(load_source(str(labelled)), labelled.with_name(f"again.{ending}"))
    prepared = prepare(Recipe.model_validate(recipe_of(source)), Console(quiet=True))
    assert prepared.report is not None
    for errors in prepared.report.model.values():
        assert errors["energy_mae_mev_per_atom"] < 1e-3
        assert errors["force_mae_mev_per_ang"] < 1e-3
    assert prepared.step_zero.energy_ev_per_atom < 1e-9
    assert {
        a.atoms.info["charge"] for d in prepared.sets.values() for a in map(d.__getitem__, range(len(d)))
    } == {
        0,
        1,
        -1,
        2,
    }
    assert not [f for f in prepared.findings if "charge" in f.message or f.kind == "label"]


def test_fit_evaluate_and_predict_see_the_same(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (labelled.parent / "r.yaml").write_text(yaml.safe_dump(recipe_of(labelled)))
    assert cli.main(["fit", str(labelled.parent / "r.yaml")]) == 0
    capsys.readouterr()
    model = labelled.parent / "runs" / "run" / "model"
    out = labelled.parent / "metrics.json"
    assert cli.main(["evaluate", str(model), str(labelled), "-o", str(out)]) == 0
    first = json.loads(out.read_text())
    potential = blip_ft.load(model)
    frames = load_source(str(labelled))
    atoms = [Atoms(r["numbers"], r["positions"], cell=r["cell"], pbc=True) for r in frames]
    for a, row in zip(atoms, frames, strict=True):
        a.info = {"charge": row["charge"], "spin": row["spin"]}
        a.calc = BlipCalculator(potential, n_draws=0)
    energies = [a.get_potential_energy() for a in atoms]
    error = np.abs(np.array(energies) - frames["energy"]) / 3
    assert error.max() < 0.05  # one epoch moves the model a little; a state that is lost costs more
    lost = [a.copy() for a in atoms]
    for a in lost:
        a.info, a.calc = {}, BlipCalculator(potential, n_draws=0)
    without = np.abs(np.array([a.get_potential_energy() for a in lost]) - frames["energy"]) / 3
    assert without.max() > 2 * error.max()
    assert first
