"""Bad input stops a run before training with one message, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.io import write

from blip_ft.cli import main
from blip_ft.config import DataConfig
from blip_ft.data.split.splits import load_splits

from .labelled import frames

Frames = list[Atoms]


def call(
    folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **sections: object
) -> tuple[int, str]:
    """Exit code and message of a fit; asserts that a failed one left nothing."""
    recipe = recipe_file(folder, **sections)
    before = sorted(p.name for p in folder.iterdir())
    code = main(["fit", str(recipe), *overrides])
    if code:
        assert sorted(p.name for p in folder.iterdir()) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return code, " ".join(message.split())


def recipe_file(folder: Path, **sections: object) -> Path:
    """A recipe of the fake backend for ``train.extxyz``."""
    tree: dict[str, object] = {
        "name": "bad",
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "train.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"rank": 4, "projections": 1},
        "uncertainty": {"n_draws": 2},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | sections))
    return path


def no_labels(f: Frames) -> None:
    del f[5].info["REF_energy"]
    del f[5].arrays["REF_forces"]


def nan_label(f: Frames) -> None:
    f[5].arrays["REF_forces"][1, 2] = np.nan


def kcal(f: Frames) -> None:
    for a in f:
        a.arrays["REF_forces"] *= 23.0605


def unknown_element(f: Frames) -> None:
    f[5].numbers[0] = 79


CASES: dict[str, tuple[Callable[[Frames], None], list[str]]] = {
    "frame without energy and forces": (no_labels, ["train.extxyz", "frame 5"]),
    "NaN label": (nan_label, ["train.extxyz", "frame 5", "forces"]),
    "wrong units": (kcal, ["train.extxyz", "kcal/mol", "forces"]),
    "unknown element": (unknown_element, ["frame 5", "Au"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_frames(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = CASES[case]
    data = frames()
    spoil(data)
    write(tmp_path / "train.extxyz", data)
    code, message = call(tmp_path, capsys)
    assert code == 2
    for part in [*expected, "What to do"]:
        assert part in message, message


def test_good_frames_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same frames unspoilt: what the other tests see is the fault, not the set-up."""
    write(tmp_path / "train.extxyz", frames(24))
    code, message = call(tmp_path, capsys)
    assert code == 0, message
    assert (tmp_path / "runs/bad/metrics.json").is_file()


def test_missing_and_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = call(tmp_path, capsys)
    assert code == 2
    assert "train.extxyz" in message
    (tmp_path / "train.extxyz").write_text("")
    code, message = call(tmp_path, capsys)
    assert code == 2
    assert "train.extxyz" in message


def test_validation_frames_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = frames(16)
    write(tmp_path / "train.extxyz", data[:12])
    write(tmp_path / "validation.extxyz", data[10:])
    code, message = call(tmp_path, capsys, f"data.validation={tmp_path / 'validation.extxyz'}")
    assert code == 2
    assert "validation.extxyz" in message
    assert "train.extxyz" in message


def test_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = call(tmp_path, capsys, "posterior.prior_scal=1")
    assert code == 2
    assert "prior_scale" in message


@pytest.mark.parametrize("key", ["n_draws", "calibration_draws", "linearity_draws"])
def test_half_a_pair_of_draws(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = call(tmp_path, capsys, f"uncertainty.{key}=5", "posterior.family=pathwise")
    assert code == 2
    assert f"uncertainty.{key}" in message
    assert "4 or 6" in message


def test_no_disk_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train.extxyz", frames())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    code, message = call(tmp_path, capsys)
    assert code == 2
    assert "free" in message


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.extxyz", frames())
    (tmp_path / "runs").write_text("a file where the folder should be")
    code, message = call(tmp_path, capsys)
    assert code == 2
    assert "runs" in message


@pytest.mark.backend("chgnet")
def test_checkpoint_cut_in_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import chgnet.model

    whole = next((Path(chgnet.__file__).parent / "pretrained/0.3.0").glob("*.pth.tar")).read_bytes()
    (tmp_path / "half.pth.tar").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "train.extxyz", frames())
    model = {"adapter": "chgnet", "checkpoint": str(tmp_path / "half.pth.tar")}
    code, message = call(tmp_path, capsys, model=model)
    assert code == 2
    assert "half.pth.tar" in message


# ---- what would stop a run only after its training -------------------------------------------


@pytest.mark.parametrize("n", [4, 5])
def test_few_frames_stop_before_training(n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One group of training frames cannot be left out to choose the prior's scale; a scale that is given needs none."""
    write(tmp_path / "train.extxyz", frames(n))
    code, message = call(tmp_path, capsys, "plain.enabled=true", "name=few")
    if n == 4:
        assert code == 2
        assert "1 frame make one group" in message
        assert "posterior.prior_scale=0.1" in message
        code, _ = call(tmp_path, capsys, "name=given", "posterior.prior_scale=0.1")
    assert code == 0


@pytest.mark.parametrize("family", ["pathwise", "subspace", "posthoc_laplace"])
def test_no_noise_stops_before_training(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.extxyz", frames())
    for noise in ("none", "[]"):
        code, message = call(tmp_path, capsys, f"model.noise={noise}", posterior={"family": family})
        assert code == 2
        assert "field 'model.noise'" in message


def test_no_noise_works_without_a_closed_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.extxyz", frames())
    family = {"family": "channel", "prior_scale": 0.1}
    code, message = call(tmp_path, capsys, "model.noise=none", "objective.temperature=1", posterior=family)
    assert code == 0, message


@pytest.mark.parametrize(
    ("label", "value"), [("REF_energy", 1e200), ("REF_forces", -1e200), ("REF_energy", 1e13)]
)
def test_labels_no_structure_has(
    label: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = frames()
    if label in data[5].info:
        data[5].info[label] = value
    else:
        data[5].arrays[label][1, 2] = value
    write(tmp_path / "train.extxyz", data)
    code, message = call(tmp_path, capsys)
    assert code == 2
    assert "frame 5" in message
    assert "which no structure has" in message or "is no label in any unit" in message


def test_one_wrong_label_in_each_role_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A force of 50 eV/Å in a calibration frame and an energy of 300 eV in a training frame are left out, and
    listed.
    """
    clean = frames(24)
    write(tmp_path / "train.extxyz", clean)
    options = ("data.split.by=block", "plain.enabled=true")
    assert call(tmp_path, capsys, "name=clean", *options)[0] == 0
    spoilt = frames(24)
    divided = load_splits(DataConfig(train=str(tmp_path / "train.extxyz"), split={"by": "block"})).roles()
    place = {role: int(divided[role]["frame"][0]) for role in ("train", "calibration")}
    spoilt[place["train"]].info["REF_energy"] += 300.0
    spoilt[place["calibration"]].arrays["REF_forces"][1, 1] += 50.0
    write(tmp_path / "train.extxyz", spoilt)
    code, message = call(tmp_path, capsys, "name=spoilt", *options)
    assert code == 0
    assert "wrong beyond doubt" in message
    runs = tmp_path / "runs"
    dropped = json.loads((runs / "spoilt/receipt.json").read_text())["data"]["dropped"]
    assert sorted(int(re.findall(r"frame (\d+): wrong label", text)[0]) for text in dropped) == sorted(
        place.values()
    )
    bars = [
        json.loads((runs / name / "calibration.json").read_text())["forces"] for name in ("clean", "spoilt")
    ]
    assert bars[1]["aleatoric"] < 3 * bars[0]["aleatoric"] + 0.1
    # all are used where the user wants it: the scale and the references still do not follow them
    code, message = call(tmp_path, capsys, "name=used", "data.bad_labels=warn", *options)
    assert code == 0
    assert "take no part in the references" in message
    assert "took no part in the calibration" in message
    used = json.loads((runs / "used/calibration.json").read_text())["forces"]
    assert len(used["left_out"]) == 1
    assert used["aleatoric"] < 3 * bars[0]["aleatoric"] + 0.5
    shift = [
        json.loads((runs / name / "receipt.json").read_text())["references"]["shift"]
        for name in ("clean", "used")
    ]
    assert shift[1] == pytest.approx(shift[0], abs=0.05)


@pytest.mark.parametrize("name", ["a/b", "..", "50 % hot"])
def test_any_name_of_a_test_set(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.extxyz", frames())
    write(tmp_path / "hot.extxyz", frames(3, seed=1))
    data = {"train": str(tmp_path / "train.extxyz"), "test": {name: str(tmp_path / "hot.extxyz")}}
    code, message = call(tmp_path, capsys, data=data)
    assert code == 0, message
    run = tmp_path / "runs" / "bad"
    assert len(list((run / "predictions").iterdir())) == 6
    before = (run / "report.html").read_text()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text().count("svg") == before.count("svg")
    assert name in json.loads((run / "metrics.json").read_text())["blip"]


@pytest.mark.parametrize("name", [" ", "x" * 300])
def test_names_that_cannot_be_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.extxyz", frames())
    write(tmp_path / "hot.extxyz", frames(3, seed=1))
    data = {"train": str(tmp_path / "train.extxyz"), "test": {name: str(tmp_path / "hot.extxyz")}}
    code, message = call(tmp_path, capsys, data=data)
    assert code == 2
    assert "data.test" in message


@pytest.mark.parametrize("output", ["$PLACE/runs", "~/runs"])
def test_all_of_a_run_is_in_one_place(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning replaces variables by itself: logs and model were in two folders."""
    for name in ("PLACE", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "place"))
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.extxyz", frames())
    code, message = call(tmp_path, capsys, output=output, data={"train": "$PLACE/../train.extxyz"})
    assert code == 0, message
    run = tmp_path / "place/runs/bad"
    assert {"metrics.csv", "model", "report.html"} <= {p.name for p in run.iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["place", "recipe.yaml", "train.extxyz"]
