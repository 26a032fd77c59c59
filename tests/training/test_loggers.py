"""``trainer.logger``: W&B and MLflow through Lightning's loggers."""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import lightning.pytorch.loggers
import pytest
import yaml
from ase.io import write
from lightning.pytorch.loggers import Logger

from blip_ft import cli
from blip_ft.config import parse_recipe
from blip_ft.config.loggers import chosen_loggers, require_loggers
from blip_ft.errors import RecipeError
from blip_ft.training.loggers import OURS, make_loggers
from blip_ft.training.logs import CsvLog, TensorBoardLog

from .labelled import frames


def tree_of(folder: Path, logger: Any) -> dict[str, Any]:
    write(folder / "frames.extxyz", frames(16, scale=1.1))
    return {
        "output": str(folder / "runs"),
        "name": "run",
        "data": {"train": str(folder / "frames.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"family": "weight", "prior_scale": 0.1},
        "objective": {"temperature": 1e-3},
        "uncertainty": {"n_draws": 2, "linearity_frames": 0},
        "plain": {"enabled": True},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": logger},
    }


def fitted(folder: Path, logger: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree_of(folder, logger)), encoding="utf-8")
    assert cli.main(["fit", str(path)]) == 0
    return folder / "runs" / "run"


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (None, {"tensorboard": {}}),
        (True, {"tensorboard": {}}),
        (False, {}),
        ("wandb", {"wandb": {}}),
        (["csv", "mlflow"], {"csv": {}, "mlflow": {}}),
        ({"wandb": {"project": "x"}}, {"wandb": {"project": "x"}}),
        (["tensorboard", {"wandb": None}], {"tensorboard": {}, "wandb": {}}),
    ],
)
def test_what_the_key_may_say(value: Any, want: dict[str, Any]):
    assert chosen_loggers(value) == want


@pytest.mark.parametrize(
    ("value", "text"),
    [("wandbb", "did you mean 'wandb'"), ([3], "no logger '3'"), ({"wandb": "x"}, "no mapping")],
)
def test_what_it_may_not_say(tmp_path: Path, value: Any, text: str):
    with pytest.raises(RecipeError, match=text):
        parse_recipe(tree_of(tmp_path, value))


def test_an_absent_package_is_told_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "mlflow" else find(n, *a))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree_of(tmp_path, "mlflow")), encoding="utf-8")
    assert cli.main(["fit", str(path)]) == 2
    err = capsys.readouterr().err
    assert "needs the package 'mlflow'" in err
    assert "pip install mlflow" in err
    assert "loading" not in err
    assert not (tmp_path / "runs").exists()
    require_loggers(["csv", "tensorboard"])


def test_metrics_are_always_written_as_a_table(tmp_path: Path):
    recipe = parse_recipe(tree_of(tmp_path, None))
    assert [type(x) for x in make_loggers(recipe, tmp_path / "run")] == [CsvLog, TensorBoardLog]
    recipe = parse_recipe(tree_of(tmp_path, False))
    assert [type(x) for x in make_loggers(recipe, tmp_path / "run")] == [CsvLog]


class Recorded(Logger):
    """Lightning's interface of a logger, which keeps what it is told."""

    made: list[Recorded] = []

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self.metrics, self.params = options, [], {}
        Recorded.made.append(self)

    @property
    def name(self) -> str:
        return "recorded"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: dict[str, Any], *_: Any) -> None:
        self.params = params

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))


def test_mlflow_is_told_the_recipe_and_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    module = types.ModuleType("mlflow")
    module.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setattr(lightning.pytorch.loggers, "MLFlowLogger", Recorded)
    Recorded.made.clear()
    folder = fitted(tmp_path, {"mlflow": {"tracking_uri": "http://localhost:1"}})
    plain, main = Recorded.made
    assert plain.options["run_name"] == "run-plain"
    assert main.options["run_name"] == "run"
    assert main.options["experiment_name"] == "blip_ft"
    assert main.options["tracking_uri"] == "http://localhost:1"
    assert main.params["posterior"]["family"] == "weight"
    with (folder / "metrics.csv").open() as file:
        rows = [float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]]
    told = [m["train/loss"] for _, m in main.metrics if "train/loss" in m]
    assert told == pytest.approx(rows)
    assert any("val/crps" in m for _, m in main.metrics)


def test_what_lightning_refuses_is_an_error_of_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuses(**options: Any) -> None:
        raise TypeError("unexpected keyword argument 'projct'")

    monkeypatch.setitem(OURS, "tensorboard", refuses)
    recipe = parse_recipe(tree_of(tmp_path, {"tensorboard": {"projct": "x"}}))
    with pytest.raises(RecipeError, match="projct") as caught:
        make_loggers(recipe, tmp_path / "run")
    assert caught.value.field == "trainer.logger.tensorboard"


@pytest.mark.default
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = fitted(tmp_path, {"wandb": {"offline": True}})
    for training in (folder, folder / "plain"):
        (written,) = (training / "wandb").glob("offline-run-*")
        (data,) = written.glob("run-*.wandb")
        assert data.stat().st_size > 1000
    import wandb

    assert wandb.run is None
