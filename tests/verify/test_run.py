"""The verdict of a run: in its folder and report after a fit, and after ``verify``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from blip_ft import fit
from blip_ft.cli import main
from blip_ft.cli.verify_target import open_target
from blip_ft.config import parse_recipe
from blip_ft.testing.fake import FakeBackbone
from blip_ft.verify import dynamics
from blip_ft.verify.frames import temperature_of

pytestmark = pytest.mark.default


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on twelve frames, and its frames."""
    place = tmp_path_factory.mktemp("verify")
    rng, frames = np.random.default_rng(0), []
    for k in range(20):
        atoms = bulk("SiO", "rocksalt", 4.6)
        atoms.rattle(0.1, rng=rng)
        atoms.calc = FakeBackbone.load("tiny", seed=1).stock_calculator()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["run"] = f"run-{k % 5}-400K"
        frames.append(atoms)
    write(place / "frames.extxyz", frames)
    recipe = {
        "name": "x",
        "output": str(place),
        "data": {"train": str(place / "frames.extxyz"), "fields": {"group": "run"}},
        "model": {"adapter": "fake", "checkpoint": "tiny"},
        "posterior": {"family": "subspace", "rank": 4},
        "plain": {"enabled": True},
        "uncertainty": {"linearity_frames": 0},
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    fit(parse_recipe(recipe))
    return place / "x"


def test_a_fit_ends_with_a_verdict(folder: Path) -> None:
    stored = json.loads((folder / "verify.json").read_text())
    names = [c["name"] for c in stored["checks"]]
    assert names[:2] == ["forces", "virial"]
    assert {"dimer_O-O", "dimer_O-Si", "dimer_Si-Si", "hydrostatic_scan", "pretrained_drift"} <= set(names)
    assert stored["hottest"] is None
    assert set(stored["beside"]) == {"pretrained", "plain"}
    page = (folder / "report.html").read_text()
    assert '<section id="verdict">' in page
    assert "Plain fine-tuning" in page or "plain" in page
    assert "md_high_temperature" not in page.lower()


def test_the_command_adds_dynamics_to_the_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dynamics, "NVE_TIME", 0.1)
    monkeypatch.setattr(dynamics, "HOT_TIME", 0.2)
    before = json.loads((folder / "verify.json").read_text())
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr()
    assert "training frames kept" in said.err
    stored = json.loads((folder / "verify.json").read_text())
    assert stored["hottest"] == 400.0
    assert stored["beside"]["plain"] == before["beside"]["plain"]
    static = {c["name"]: c["value"] for c in before["checks"]}
    assert static == pytest.approx(
        {c["name"]: c["value"] for c in stored["checks"] if c["name"] in static}, rel=1e-5
    )
    page = (folder / "report.html").read_text()
    assert "Md high temperature" in page
    assert stored["sentence"] in said.out
    (folder / "verify.extxyz").unlink()  # a run of an earlier version: its frames are read again
    target = open_target(str(folder / "model"), None)
    assert "recipe.yaml" in target.about
    assert temperature_of(target.frames) == 400.0
    assert target.run == folder.resolve()
