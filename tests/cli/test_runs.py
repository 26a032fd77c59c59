"""``runs`` and ``compare``: finished, broken and unfinished runs, and two of them side by side."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from ase.io import write

from blip_ft import cli
from blip_ft.report.run_folders import read_run, read_runs

from ..training.labelled import frames as labelled_frames
from .structures import leftovers


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``first`` and ``second``, which differ in a few keys."""
    folder: Path = tmp_path_factory.mktemp("runs")
    write(folder / "frames.extxyz", labelled_frames(16, scale=1.1))
    recipe = {
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "frames.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"family": "weight", "prior_scale": 0.1},
        "objective": {"temperature": 1e-3},
        "uncertainty": {"n_draws": 2, "linearity_frames": 0},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    (folder / "fake.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert cli.main(["fit", str(folder / "fake.yaml"), "name=first"]) == 0
    more = ["trainer.max_epochs=3", "optimizer.learning_rate=0.003", "plain.enabled=true"]
    assert cli.main(["fit", str(folder / "fake.yaml"), "name=second", *more]) == 0
    return folder / "runs"


@pytest.fixture
def copies(two: Path, tmp_path: Path) -> Path:
    """The two runs, to be damaged."""
    shutil.copytree(two, tmp_path / "runs")
    return tmp_path / "runs"


def test_runs_are_listed_with_what_they_are(call: Any, two: Path):
    code, out, err = call("runs", two)
    assert (code, err) == (0, "")
    (first,) = [line for line in out.splitlines() if "first" in line]
    metrics = json.loads((two / "first" / "metrics.json").read_text())["blip"]["all"]
    receipt = json.loads((two / "first" / "receipt.json").read_text())
    for text in ("fake:tiny", "finished", f"{receipt['data']['sets']['train']['n_frames']} train"):
        assert text in first
    code, out, _ = call("runs", two, "--json")
    assert code == 0
    one, other = json.loads(out)
    assert (one["name"], other["name"]) == ("first", "second")
    assert one["figures"]["force_mae_mev_per_ang"] == metrics["force_mae_mev_per_ang"]
    assert one["seconds"] == receipt["seconds"]
    assert one["frames"] == {n: s["n_frames"] for n, s in receipt["data"]["sets"].items()}


def killed(folder: Path) -> None:
    """As a run stands that was killed while it was trained."""
    for name in ("metrics.json", "receipt.json", "recipe.yaml", "report.html", "history.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "model")


def cut(folder: Path) -> None:
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text[: len(text) // 2])


def no_metrics(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"blip": {"seen": [1, 2]}}')


def no_text(folder: Path) -> None:
    (folder / "receipt.json").write_bytes(b"\xff\xfe\x00")


def no_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("a: [1\n")


def no_model(folder: Path) -> None:
    shutil.rmtree(folder / "model")


def strange(folder: Path) -> None:
    (folder / "receipt.json").write_text('{"data": 3, "base": [], "seconds": "long"}')
    (folder / "recipe.yaml").write_text("model: 5\n")


def folder_as_file(folder: Path) -> None:
    (folder / "receipt.json").unlink()
    (folder / "receipt.json").mkdir()


@pytest.mark.parametrize(
    ("damage", "state", "text"),
    [
        (killed, "unfinished", ""),
        (cut, "broken", "metrics.json cannot be read"),
        (no_metrics, "broken", "no sets with metrics"),
        (no_text, "broken", "receipt.json cannot be read"),
        (no_recipe, "broken", "recipe.yaml cannot be read"),
        (no_model, "broken", "model/model.json is missing"),
        (strange, "finished", ""),
        (folder_as_file, "broken", "receipt.json cannot be read"),
    ],
)
def test_every_state_is_listed_and_none_is_a_trace_back(
    call: Any, copies: Path, damage: Any, state: str, text: str
):
    damage(copies / "first")
    code, out, err = call("runs", copies)
    assert (code, err) == (0, "")
    assert state in out
    assert text in out
    found = {run.name: run for run in read_runs(copies)}
    assert found["first"].state == state
    assert found["second"].state == "finished"
    json.dumps(found["first"].to_json(), allow_nan=False)


def test_a_run_that_is_being_written(copies: Path):
    fcntl = pytest.importorskip("fcntl")
    killed(copies / "first")
    with (copies / "first" / ".writing").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_run(copies / "first").state == "running"
    assert read_run(copies / "first").state == "unfinished"


def test_what_is_no_run_is_not_listed(call: Any, copies: Path):
    (copies / "notes.txt").write_text("mine")
    (copies / "figures").mkdir()
    (copies / "figures" / "a.png").write_bytes(b"")
    (copies / "begun").mkdir()  # as a run that was killed at once
    assert {run.name: run.state for run in read_runs(copies)} == {
        "begun": "unfinished",
        "first": "finished",
        "second": "finished",
    }
    assert [run.name for run in read_runs(copies / "second")] == ["second"]
    assert call("runs", copies / "figures")[1] == f"no runs in {copies / 'figures'}\n"
    code, _, err = call("runs", copies / "none")
    assert code == 2
    assert "What to do" in err


def test_the_default_folder_is_runs(call: Any, copies: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(copies.parent)
    assert "first" in call("runs")[1]


# ---- compare -----------------------------------------------------------------------------------


def test_metrics_and_recipes_side_by_side(call: Any, two: Path):
    code, out, err = call("compare", two / "first", two / "second", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [r["name"] for r in found["runs"]] == ["first", "second"]
    assert {d["key"]: d["values"] for d in found["recipe"]} == {
        "optimizer.learning_rate": [0.001, 0.003],
        "plain.enabled": [False, True],
        "trainer.max_epochs": [1, 3],
    }
    metrics = [json.loads((two / n / "metrics.json").read_text()) for n in ("first", "second")]
    figures = {(f["model"], f["set_name"], f["metric"]): f for f in found["metrics"]}
    force = figures["blip", "all", "force_mae_mev_per_ang"]
    one, other = (m["blip"]["all"]["force_mae_mev_per_ang"] for m in metrics)
    assert (force["one"], force["other"]) == (one, other)
    assert force["change"] == pytest.approx((other - one) / one)
    plain = figures["plain", "all", "force_mae_mev_per_ang"]  # the first run has none
    assert (plain["one"], plain["change"]) == (None, None)
    assert plain["other"] == metrics[1]["plain"]["all"]["force_mae_mev_per_ang"]
    want = {(m, s, k) for side in metrics for m, sets in side.items() for s, v in sets.items() for k in v}
    assert set(figures) == want


def test_the_terminal_shows_both(call: Any, two: Path):
    code, out, _ = call("compare", two / "first", two / "second")
    assert code == 0
    for text in ("first", "second", "optimizer.learning_rate", "0.003", "force_mae_mev_per_ang", "%"):
        assert text in out
    assert "the recipes are the same" in call("compare", two / "first", two / "first")[1]


class Page(HTMLParser):
    """Tags that are open, and everything that would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(v) for k, v in attrs if k in ("src", "href") and not str(v).startswith("#")]
        if tag in ("script", "link", "img", "iframe"):
            self.loaded.append(tag)

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())


def test_the_page_loads_nothing_and_escapes_names(call: Any, copies: Path, tmp_path: Path):
    recipe = yaml.safe_load((copies / "second" / "recipe.yaml").read_text())
    recipe["model"]["checkpoint"] = "<script>alert(1)</script>"
    (copies / "second" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    html = tmp_path / "both.html"
    code, _, err = call("compare", copies / "first", copies / "second", "--html", html)
    assert code == 0
    assert str(html) in err
    page = Page(html.read_text(encoding="utf-8"))
    assert page.loaded == []
    for text in ("trainer.max_epochs", "force_mae_mev_per_ang", "<script>alert(1)</script>", "BLIP"):
        assert text in page.cells
    assert leftovers(tmp_path) == ["both.html", "runs"]


def test_other_frames_are_told(call: Any, copies: Path):
    receipt = json.loads((copies / "first" / "receipt.json").read_text())
    receipt["data"]["sets"]["seen"]["fingerprint"] = "another"
    (copies / "first" / "receipt.json").write_text(json.dumps(receipt))
    _, out, _ = call("compare", copies / "first", copies / "second")
    assert "the frames of 'seen' are others in the two runs" in out


@pytest.mark.parametrize(
    ("damage", "text"),
    [(killed, "this run is unfinished"), (cut, "this run is broken: metrics.json cannot be read")],
)
def test_what_has_not_finished_is_not_compared(call: Any, copies: Path, damage: Any, text: str):
    damage(copies / "second")
    code, out, err = call("compare", copies / "first", copies / "second")
    assert (code, out) == (2, "")
    assert text in err
    assert "What to do" in err
    assert call("compare", copies / "first", copies / "none")[0] == 2


def test_a_folder_that_cannot_be_read_is_listed(call: Any, copies: Path, monkeypatch: pytest.MonkeyPatch):
    inside, text = Path.iterdir, Path.read_text

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if "first" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return (text if args or options else inside)(path, *args, **options)

    monkeypatch.setattr(Path, "iterdir", refused)
    monkeypatch.setattr(Path, "read_text", refused)
    code, out, err = call("runs", copies)
    assert (code, err) == (0, "")
    assert "broken" in out
    assert "Permission denied" in out
