"""Pieces of a run: whole or none, and a run that does without those that are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from blip_ft.cli import main
from blip_ft.training import fit as module
from blip_ft.training import pieces as pieces_module
from blip_ft.training.pieces import Pieces

from .test_resume import PATHWISE, differences, prepare
from .test_run_folder import Ended, ending


@pytest.fixture
def pieces(tmp_path: Path) -> Pieces:
    return Pieces(tmp_path, Console(stderr=True, width=200))


def test_what_is_kept_comes_back(pieces: Pieces) -> None:
    tensors = {"a": torch.rand(3, dtype=torch.float64), "b": torch.arange(4)}
    tensors["view"] = tensors["a"][1:]  # shares memory
    pieces.keep_tensors("one", tensors, {"x": 0.1, "list": [1, "two"]})
    found = pieces.tensors("one")
    assert found is not None
    assert found[1] == {"x": 0.1, "list": [1, "two"]}
    assert all(torch.equal(found[0][k], v) for k, v in tensors.items())
    assert pieces.tensors("other") is None


@pytest.mark.parametrize("damage", ["cut", "edited", "gone", "manifest cut", "manifest edited"])
def test_damage_is_seen_and_told(damage: str, pieces: Pieces, capsys: pytest.CaptureFixture[str]) -> None:
    pieces.keep_tensors("one", {"a": torch.zeros(1000)}, {"epoch": 3})
    (file,) = pieces.folder.glob("one-*.safetensors")
    manifest = pieces.folder / "one.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "edited":
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:50])
    else:
        manifest.write_text(manifest.read_text().replace('"epoch": 3', '"epoch": 4'))
    assert pieces.tensors("one") is None
    assert "done again" in capsys.readouterr().err
    pieces.keep_tensors("one", {"a": torch.ones(2)}, {})
    found = pieces.tensors("one")
    assert found is not None
    assert torch.equal(found[0]["a"], torch.ones(2))


def test_the_latest_two_are_kept(pieces: Pieces) -> None:
    for k in range(4):
        pieces.keep("c", ".txt", lambda path, k=k: path.write_text(str(k)), {"k": k}, latest=2)  # type: ignore[misc]
    files = sorted(p.name for p in pieces.folder.glob("c-*"))
    assert files == ["c-3.txt", "c-4.txt"]
    (pieces.folder / "c-4.txt").write_text("cut")
    found = pieces.file("c")
    assert found is not None
    assert (found[0].read_text(), found[1]) == ("2", {"k": 2})


def test_a_kill_between_file_and_manifest(pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces.keep_tensors("one", {"a": torch.zeros(2)}, {"k": 0})
    monkeypatch.setattr(pieces_module, "whole_file", ending)
    with pytest.raises(Ended):
        pieces.keep_tensors("one", {"a": torch.ones(2)}, {"k": 1})
    found = pieces.tensors("one")
    assert found is not None
    assert found[1] == {"k": 0}


def test_a_full_disk_is_told_once(
    pieces: Pieces, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        path.write_text("a part")
        raise OSError(28, "No space left on device")

    for _ in range(2):
        pieces.keep("one", ".txt", full, {})
    message = capsys.readouterr().err
    assert message.count("cannot be kept") == 1
    assert "free disk space" in message
    assert [p.name for p in pieces.folder.iterdir()] == []


def test_writing_takes_its_share_of_the_time(pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pieces_module.time, "monotonic", lambda: now[0])
    mine = Pieces(pieces.folder.parent, Console())

    def slowly(path: Path) -> None:
        path.write_text("")
        now[0] += 1.0

    assert mine.affordable()
    mine.keep("one", ".txt", slowly, {})
    taken = 1
    for _ in range(1000):
        now[0] += 1.0
        if mine.affordable():
            mine.keep("one", ".txt", slowly, {})
            taken += 1
    assert 0.8 * pieces_module.SHARE <= (taken - 1) / now[0] <= pieces_module.SHARE


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path, Console(), writes=False)
    pieces.keep_tensors("one", {"a": torch.zeros(1)}, {})
    pieces.forget("one")
    pieces.clear()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and one that was ended when it was to be written, with all its pieces."""
    folder: Path = tmp_path_factory.mktemp("ended")
    recipe = prepare(folder, PATHWISE | {"keep_pieces": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "SHARE", float("inf"))
        assert main(["fit", str(recipe), "name=whole"]) == 0
        patch.setattr(module, "save_model", ending)
        with pytest.raises(Ended):
            main(["fit", str(recipe), "name=run"])
    return folder


NAMES = [
    "pretrained",
    "plain-epochs",
    "plain",
    "epochs",
    "posterior-in-epochs",
    "trained",
    "mean-steps",
    "posterior",
    "predictions-BLIP-seen-0",
]


def test_a_run_leaves_these(ended: Path) -> None:
    names = {p.stem for p in (ended / "runs/run/pieces").glob("*.json")}
    assert set(NAMES) - {"mean-steps"} <= names
    assert {p.stem for p in (ended / "runs/whole/pieces").glob("*.json")} == names


@pytest.mark.parametrize("first", [*NAMES, "all"])
def test_a_run_does_without_damaged_pieces(
    first: str, ended: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """From one on, all pieces are cut in the middle."""
    run = shutil.copytree(ended / "runs/run", ended / f"runs/{tmp_path.name}")
    chosen = NAMES if first == "all" else NAMES[NAMES.index(first) :]
    cut = [p for name in chosen for p in (run / "pieces").glob(f"{name}-[0-9]*") if p.suffix != ".json"]
    assert cut or first == "mean-steps"
    for path in cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["resume", str(run)]) == 0
    assert ("done again" in capsys.readouterr().err) == bool(cut)
    assert differences(ended / "runs/whole", run) == []


def test_changed_data_are_refused(ended: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = shutil.copytree(ended / "runs/run", ended / f"runs/{tmp_path.name}")
    path = ended / "train.extxyz"
    text = path.read_text()
    try:
        lines = text.splitlines(keepends=True)
        path.write_text("".join(lines[5:]))  # without the first frame
        assert main(["resume", str(run)]) == 2
        assert "have changed since this run was begun" in capsys.readouterr().err
    finally:
        path.write_text(text)
    assert json.loads((run / "run.json").read_text())["state"] == "unfinished"
