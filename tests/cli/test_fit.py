"""``fit``, and what is done with its run: ``evaluate``, ``predict``, ``report``."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from blip_ft import cli
from blip_ft.config import load_recipe
from blip_ft.potential.checkpoint import load_model
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.predict import predict_atoms

from .structures import labelled, leftovers, structure


def test_evaluate_writes_metrics(call: Any, run: Path, tmp_path: Path):
    write(tmp_path / "in.extxyz", [labelled(structure(seed=i), seed=i) for i in range(5)])
    code, out, _ = call("evaluate", run, tmp_path / "in.extxyz", "-o", tmp_path / "metrics.json")
    assert code == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_structures"] == 5
    labels = read(tmp_path / "in.extxyz", ":")
    predicted = predict_atoms(load_model(run), labels)
    mae = np.mean(
        [np.abs(p["forces"] - a.get_forces()).mean() for p, a in zip(predicted, labels, strict=True)]
    )
    assert metrics["force_mae_mev_per_ang"] == pytest.approx(1e3 * mae)
    assert 0 <= metrics["coverage90"] <= 1
    assert [key for key in metrics if key not in out] == []


@pytest.mark.parametrize(
    ("options", "has"),
    [
        (("--method", "energy"), {"coverage90_energy"}),
        (("--method", "linear"), {"coverage90_energy", "coverage90"}),
        (("--method", "linear", "--draws", "4"), {"coverage90_energy", "coverage90"}),
        (("--draws", "0"), set()),
    ],
)
def test_evaluate_with_other_error_bars(
    call: Any, pathwise: Path, tmp_path: Path, options: tuple[str, ...], has: set[str]
):
    write(tmp_path / "in.extxyz", [labelled(structure(seed=i), i) for i in range(5)])
    arguments = ("evaluate", pathwise, tmp_path / "in.extxyz", "-o", tmp_path / "metrics.json", *options)
    code, _, err = call(*arguments)
    assert code == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {k for k in ("coverage90", "coverage90_energy") if metrics.get(k) is not None} == has
    assert metrics["force_mae_mev_per_ang"] > 0


def test_evaluate_refuses_an_existing_file_first(call: Any, run: Path, tmp_path: Path):
    (tmp_path / "metrics.json").write_text("precious")
    code, _, err = call("evaluate", run, tmp_path / "none.xyz", "-o", tmp_path / "metrics.json")
    assert code == 2
    assert "--overwrite" in err
    assert (tmp_path / "metrics.json").read_text() == "precious"


def test_evaluate_needs_labels(call: Any, run: Path, frames: Path, tmp_path: Path):
    code, _, err = call("evaluate", run, frames, "-o", tmp_path / "metrics.json")
    assert code == 2
    assert "in.extxyz" in err
    assert leftovers(tmp_path) == ["in.extxyz"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``fake.yaml``, its frames, and ``runs/first``, which the program made from them."""
    folder: Path = tmp_path_factory.mktemp("fit")
    calculator = FakeBackbone.load("tiny").stock_calculator()
    frames = []
    for i in range(16):
        atoms = structure(seed=i)
        atoms.calc = calculator
        labels = {"energy": atoms.get_potential_energy() - 3.0, "forces": 1.1 * atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        atoms.info["trajectory"] = f"t{i // 2}"
        frames.append(atoms)
    write(folder / "frames.extxyz", frames)
    recipe = {
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "frames.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"family": "weight", "prior_scale": 0.1},
        "objective": {"temperature": 1e-3},
        "uncertainty": {"n_draws": 3},
        "plain": {"enabled": True},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    (folder / "fake.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert cli.main(["fit", str(folder / "fake.yaml"), "name=first"]) == 0
    return folder


def test_fit_writes_the_run(fitted: Path):
    run = fitted / "runs" / "first"
    expected = {"metrics.json", "metrics.csv", "report.html", "receipt.json", "recipe.yaml", "model"}
    assert expected <= set(leftovers(run))
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"pretrained", "plain", "blip"}
    rows = (run / "metrics.csv").read_text().splitlines()
    assert {"step", "train/loss"} <= set(rows[0].split(","))
    assert load_recipe(str(run / "recipe.yaml")).name == "first"


def test_fit_refuses_an_existing_run_and_leaves_it(call: Any, fitted: Path):
    before = (fitted / "runs/first/metrics.json").read_bytes()
    code, _, err = call("fit", fitted / "fake.yaml", "name=first")
    assert code == 2
    assert "overwrite=true" in err
    assert (fitted / "runs/first/metrics.json").read_bytes() == before


def test_fit_replaces_a_run_if_told_and_says_so(call: Any, fitted: Path):
    shutil.copytree(fitted / "runs/first", fitted / "runs/second")
    (fitted / "runs/second/old").touch()
    options = ("name=second", "overwrite=true", "plain={}")
    code, out, err = call("fit", fitted / "fake.yaml", *options)
    assert code == 0
    # plain fine-tuning is an option: neither trained nor in the table and the report where nobody asks for it
    assert "plain" not in out
    assert "plain fine-tuning" not in (fitted / "runs/second/report.html").read_text()
    assert "replacing the earlier run" in err
    assert not (fitted / "runs/second/old").exists()
    assert set(json.loads((fitted / "runs/second/metrics.json").read_text())) == {"pretrained", "blip"}


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("objectve.temperature=1", "did you mean 'objective'?"),
        ("data.train=nowhere.extxyz", "nowhere.extxyz"),
        ("model.adapter=fak", "did you mean 'fake'?"),
        ("model.noise=nothing_like_it", "matches no convertible module"),
        ("data.units={forces: kcal/mol}", "units"),
    ],
)
def test_fit_refuses_bad_input_before_writing(call: Any, fitted: Path, override: str, text: str):
    code, _, err = call("fit", fitted / "fake.yaml", "name=third", override)
    assert code == 2
    assert text in err
    assert "Traceback" not in err
    assert not (fitted / "runs/third").exists()


def test_evaluate_and_predict_take_the_run(call: Any, fitted: Path, tmp_path: Path):
    frames = fitted / "frames.extxyz"
    assert call("predict", fitted / "runs/first", frames, "-o", tmp_path / "out.extxyz")[0] == 0
    assert call("evaluate", fitted / "runs/first", f"{frames}@0:3", "-o", tmp_path / "m.json")[0] == 0
    assert json.loads((tmp_path / "m.json").read_text())["n_structures"] == 3


def test_report_is_the_same_when_made_again(call: Any, fitted: Path):
    def without_ids(text: str) -> str:
        return re.sub(r"\b[a-z][0-9a-f]{10}\b", "", text)  # matplotlib's, random

    report = fitted / "runs/first/report.html"
    first = report.read_text()
    report.unlink()
    assert call("report", fitted / "runs/first")[:2] == (0, f"{report}\n")
    assert without_ids(report.read_text()) == without_ids(first)


def test_report_of_a_run_of_an_earlier_version(call: Any, fitted: Path, tmp_path: Path):
    """Its recipe has the keys of all posterior families, of which others are refused in a new run."""
    run = shutil.copytree(fitted / "runs/first", tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["posterior"] |= {"rank": 128, "storage": "auto", "min_std": 1e-4, "projections": "all"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert call("report", run)[0] == 0
    code, _, err = call("fit", run / "recipe.yaml", "name=again")
    assert code == 2
    assert "posterior.storage" in err
    assert "posterior.family=subspace" in " ".join(err.split())
    recipe["posterior"]["rnak"] = 3
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = call("report", run)
    assert code == 2
    assert "posterior.rnak" in err


@pytest.mark.parametrize("name", ["metrics.json", "receipt.json", "calibration.json"])
def test_report_of_an_unfinished_run(call: Any, fitted: Path, tmp_path: Path, name: str):
    shutil.copytree(fitted / "runs/first", tmp_path / "run")
    (tmp_path / "run" / name).write_text("{")
    code, _, err = call("report", tmp_path / "run")
    assert code == 2
    assert name in err


def test_evaluate_says_how_few_values_a_number_rests_on(call: Any, run: Path, tmp_path: Path):
    write(tmp_path / "in.extxyz", [labelled(structure(seed=i), seed=i) for i in range(3)])
    code, out, _ = call("evaluate", run, tmp_path / "in.extxyz")
    assert code == 0
    rows = {line.split()[1]: line for line in out.splitlines() if len(line.split()) > 3}
    assert "(of 3)" in rows["energy_mae_mev_per_atom"]
    assert "(of " not in rows["force_mae_mev_per_ang"]
    assert "(of " not in rows["n_structures"]
    assert not re.search(r"\b(nan|None)\b", out)
