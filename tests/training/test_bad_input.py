"""Bad input stops a run before training with one message, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.io import write

from blip_ft.cli import main

from .labelled import frames

Frames = list[Atoms]


def call(
    folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str, **sections: object
) -> tuple[int, str]:
    """Exit code and message of a fit; asserts that a failed one left nothing."""
    tree: dict[str, object] = {
        "name": "bad",
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "train.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"rank": 4, "projections": 1},
        "uncertainty": {"n_draws": 2},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | sections))
    before = sorted(p.name for p in folder.iterdir())
    code = main(["fit", str(folder / "recipe.yaml"), *overrides])
    if code:
        assert sorted(p.name for p in folder.iterdir()) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return code, " ".join(message.split())


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
