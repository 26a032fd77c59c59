"""A disk that is full, or that fails, loses neither the results nor the training."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.loggers.csv_logs import _ExperimentWriter

from blip_ft.cli import main
from blip_ft.potential.checkpoint import load_model
from blip_ft.training import fit as module
from blip_ft.training import pieces

from .test_resume import PATHWISE, differences, prepare

Capture = pytest.CaptureFixture[str]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a whole run, and a place of its own for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    recipe = prepare(tmp_path, PATHWISE | {"plain": {}})
    assert main(["fit", str(recipe), "name=whole"]) == 0
    return tmp_path


@pytest.mark.parametrize("what", ["save_model", "write_run"])
def test_the_last_write_is_tried_elsewhere(
    what: str, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, original = folder / "runs/run", getattr(module, what)

    def full(*args: Any, **kwargs: Any) -> Any:
        place = next(a for a in args if isinstance(a, Path))
        if place.is_relative_to(run):
            raise FULL
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, what, full)
        assert main(["fit", str(folder / "recipe.yaml"), "name=run"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "free disk space" in message
    assert f"blip-finetune resume {run} writes the run where it belongs" in message
    found = re.search(r"model, metrics and report are in (\S+)", message)
    assert found is not None
    other = Path(found[1])
    assert (other / "report.html").exists()
    assert (other / "metrics.json").read_bytes() == (folder / "runs/whole/metrics.json").read_bytes()
    load_model(other / "model")
    assert main(["resume", str(run)]) == 0
    assert differences(folder / "runs/whole", run) == []


def test_nothing_can_be_written_anywhere(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_model", full)
        assert main(["fit", str(folder / "recipe.yaml"), "name=run"]) == 2
    assert "nothing of the results could be written elsewhere" in " ".join(capsys.readouterr().err.split())
    assert main(["resume", str(folder / "runs/run")]) == 0


def test_a_full_disk_in_mid_run(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pieces nor logs can be written: both are told, the run goes on and is the same."""

    def full(*args: Any, **kwargs: Any) -> Any:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "save_file", full)
        patch.setattr("lightning.pytorch.trainer.Trainer.save_checkpoint", full)
        patch.setattr(_ExperimentWriter, "save", full)
        with pytest.warns(UserWarning, match="CsvLog cannot be written and is given up"):
            code = main(["fit", str(folder / "recipe.yaml"), "name=run"])
    assert code == 0
    assert capsys.readouterr().err.count("cannot be kept") == 1
    run = folder / "runs/run"
    assert not (run / "metrics.csv").exists()
    assert set(differences(folder / "runs/whole", run)) <= {"files"} | {"metrics.csv"}
