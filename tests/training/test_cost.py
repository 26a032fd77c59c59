"""``check`` predicts what ``fit`` would take: what is counted, with a clock of its own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ase.io import write

from blip_ft import cli
from blip_ft.cli.check_data import check_run
from blip_ft.config import parse_recipe
from blip_ft.training import cost as module

from .labelled import frames


def tree_of(folder: Path, **sections: Any) -> dict[str, Any]:
    if not (folder / "frames.extxyz").exists():
        write(folder / "frames.extxyz", frames(24, scale=1.1))
    tree: dict[str, Any] = {
        "output": str(folder / "runs"),
        "name": "run",
        "data": {"train": str(folder / "frames.extxyz"), "batch_size": 4},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"rank": 8},
        "uncertainty": {"n_draws": 4, "linearity_frames": 2, "linearity_draws": 2},
        "plain": {"enabled": True},
        "trainer": {"max_epochs": 10, "accelerator": "cpu", "devices": 1},
    }
    for name, section in sections.items():
        tree[name] = tree[name] | section if name != "posterior" else section
    return tree


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later, so every call that is timed takes one."""
    monkeypatch.setattr(module.time, "perf_counter", map(float, itertools.count()).__next__)


def cost_of(folder: Path, **sections: Any) -> module.Cost:
    found = check_run(parse_recipe(tree_of(folder, **sections))).cost
    assert found is not None
    return found


ALL = {
    "data and checks",
    "plain training",
    "plain predictions",
    "first fit of the posterior",
    "posterior",
    "training",
    "predictions",
    "draws beside the linear model",
    "report",
}


@pytest.mark.usefixtures("clock")
class TestCounts:
    def test_every_stage_of_the_run_is_there(self, tmp_path: Path):
        found = cost_of(tmp_path)
        assert found.stages.keys() == ALL
        assert all(seconds > 0 for seconds in found.stages.values())
        assert found.seconds == pytest.approx(sum(found.stages.values()))

    def test_training_grows_with_epochs_and_nothing_else_does(self, tmp_path: Path):
        few, many = cost_of(tmp_path), cost_of(tmp_path, trainer={"max_epochs": 30})
        for name in ALL - {"data and checks"}:
            factor = 3 if name in ("plain training", "training") else 1
            assert many.stages[name] == pytest.approx(factor * few.stages[name], rel=1e-6), name
        assert many.steps == 3 * few.steps

    def test_a_step_counts_as_often_as_it_is_taken(self, tmp_path: Path):
        """A batch takes one second by this clock; validation and the loggers add to it."""
        found = cost_of(tmp_path)
        checked = check_run(parse_recipe(tree_of(tmp_path)), cost=False).report.summary
        frames_of = {name: summary["frames"] for name, summary in checked.items()}
        batches = -(-frames_of["train"] // 4)
        assert found.steps == 2 * 10 * batches
        held_out = sum(n for name, n in frames_of.items() if name != "train")
        validation = found.stages["plain predictions"] * frames_of["validation"] / held_out
        want = 10 * (batches * (1 + module.PER_STEP) + validation)
        assert found.stages["plain training"] == pytest.approx(want, rel=0.01)

    def test_what_a_recipe_leaves_out_costs_nothing(self, tmp_path: Path):
        found = cost_of(tmp_path, plain={"enabled": False}, uncertainty={"linearity_frames": 0})
        assert found.stages.keys() == ALL - {"plain training", "plain predictions"}
        assert found.stages["draws beside the linear model"] == 0

    @pytest.mark.parametrize(
        ("posterior", "missing"),
        [
            ({"family": "weight", "prior_scale": 0.1}, {"first fit of the posterior", "posterior"}),
            ({"family": "posthoc_laplace"}, {"first fit of the posterior", "training"}),
            ({"family": "subspace", "rank": 4}, set()),
        ],
    )
    def test_families(self, tmp_path: Path, posterior: dict[str, Any], missing: set[str]):
        options = {"temperature": 1e-3} if posterior["family"] == "weight" else {}
        tree = tree_of(tmp_path, posterior=posterior) | {"objective": options}
        found = check_run(parse_recipe(tree)).cost
        assert found is not None
        assert found.stages.keys() == ALL - missing

    def test_gradient_rows_are_in_the_memory(self, tmp_path: Path):
        few = cost_of(tmp_path, posterior={"rank": 8, "projections": 2})
        write(tmp_path / "frames.extxyz", frames(240, scale=1.1))
        many = cost_of(tmp_path, posterior={"rank": 8})
        rows = 120 * 10 * 472 * 8  # half of the frames train; 1 + 9 outputs, 472 weights
        assert many.memory - few.memory > 0.9 * rows


def test_the_disk_is_that_of_the_run(tmp_path: Path):
    tree = tree_of(tmp_path, posterior={"rank": 400}, trainer={"max_epochs": 1})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    found = check_run(parse_recipe(tree)).cost
    assert found is not None
    assert cli.main(["fit", str(tmp_path / "recipe.yaml")]) == 0
    files = [p for p in (tmp_path / "runs" / "run").rglob("*") if p.is_file()]
    assert found.disk == pytest.approx(sum(p.stat().st_size for p in files), rel=0.3)


def test_a_step_leaves_the_weights_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept: list[Any] = []
    start = module._Meter._step

    def watched(self: Any, *, plain: bool) -> float:
        before = [p.detach().clone() for p in self.potential.parameters()]
        seconds = start(self, plain=plain)
        for p, value in zip(self.potential.parameters(), before, strict=True):
            torch.testing.assert_close(p, value, rtol=0, atol=0)
            assert p.grad is None
        kept.append(plain)
        return seconds

    monkeypatch.setattr(module._Meter, "_step", watched)
    cost_of(tmp_path)
    assert sorted(kept) == [False, False, True]


def test_the_command_shows_it_and_can_leave_it_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree_of(tmp_path)), encoding="utf-8")
    assert cli.main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "what fit would take on cpu" in out
    assert "memory at most" in out
    assert cli.main(["check", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cost"]
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()), abs=1)
    assert found["memory_bytes"] > 1e8
    assert cli.main(["check", str(path), "--no-cost"]) == 0
    assert "what fit would take" not in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_data_that_stop_the_run_have_no_cost(tmp_path: Path):
    tree = tree_of(tmp_path)
    tree["data"]["train"] = str(tmp_path / "none.extxyz")
    checked = check_run(parse_recipe(tree))
    assert checked.cost is None
    assert checked.report.findings[0].severity == "error"


def test_a_stream_has_none(tmp_path: Path):
    tree = tree_of(tmp_path)
    source = tree["data"]["train"]
    tree["data"] |= {"train": f"{source}@12:", "stream": {"frames": 12, "sample": 12}}
    tree["data"] |= {"validation": f"{source}@0:4", "calibration": f"{source}@4:8", "test": f"{source}@8:12"}
    assert check_run(parse_recipe(tree)).cost is None
