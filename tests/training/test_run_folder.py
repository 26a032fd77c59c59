"""The folder of a run: exclusive, replaced by a whole run only, and gone after an error before training."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from blip_ft.cli import main
from blip_ft.config import load_recipe
from blip_ft.errors import BlipError
from blip_ft.files import WRITING, check_unused, sole_writer
from blip_ft.training import fit as module
from blip_ft.training.run_folder import NEW, OLD, RECORD, VARIABLE, followed, new_run, read_record

from .test_resume import PATHWISE, prepare

Capture = pytest.CaptureFixture[str]


class Ended(BaseException):
    """Ends a run at some place; no ``Exception``, as a signal is none."""


def ending(*args: Any, **kwargs: Any) -> Any:
    raise Ended


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its frames and one whole run, ``first``."""
    folder: Path = tmp_path_factory.mktemp("folders")
    recipe = prepare(folder, {**PATHWISE, "plain": {}, "trainer": {"max_epochs": 1, "accelerator": "cpu"}})
    assert main(["fit", str(recipe), "name=first"]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, whose runs go into the copy."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def fit(folder: Path, *overrides: str) -> int:
    return main(["fit", str(folder / "recipe.yaml"), f"output={folder / 'runs'}", *overrides])


def test_the_folder_is_there_at_once_and_says_who(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def look(*args: Any) -> Any:
        run = folder / "runs/second"
        seen.update(record=read_record(run), who=json.loads((run / WRITING).read_text()))
        raise Ended

    monkeypatch.setattr(module, "prepare", look)
    with pytest.raises(Ended):
        fit(folder, "name=second")
    assert seen["record"]["state"] == "unfinished"
    assert seen["who"]["process"] == os.getpid()
    assert not (folder / "runs/second" / WRITING).exists()


def test_two_fits_of_one_name(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    prepare_ = module.prepare

    def while_another_begins(*args: Any) -> Any:
        monkeypatch.setattr(module, "prepare", prepare_)
        codes.append(fit(folder, "name=second"))
        codes.append(fit(folder, "name=second", "overwrite=true"))
        codes.append(main(["resume", str(folder / "runs/second")]))
        return prepare_(*args)

    monkeypatch.setattr(module, "prepare", while_another_begins)
    assert fit(folder, "name=second") == 0
    assert codes == [2, 2, 2]
    message = " ".join(capsys.readouterr().err.split())
    assert "a run of this name exists already" in message
    assert f"another program is writing this output (process {os.getpid()} on " in message


def test_what_a_second_fit_says(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(folder, "name=first") == 2
    assert "resume" not in capsys.readouterr().err  # it is whole
    monkeypatch.setattr(module, "prepare", ending)
    with pytest.raises(Ended):
        fit(folder, "name=second")
    assert fit(folder, "name=second") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert all(way in message for way in ("blip-finetune resume", "overwrite=true", "another name"))


def test_the_old_run_stays_until_the_new_one_is_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder / "runs/first"
    (run / "note").write_text("of the first")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    original = module.save_model
    monkeypatch.setattr(module, "save_model", ending)
    with pytest.raises(Ended):
        fit(folder, "name=first", "overwrite=true", "seed=1")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert read_record(Path(f"{run}{NEW}"))["replaces"] == "first"  # type: ignore[index]
    monkeypatch.setattr(module, "save_model", original)
    assert main(["resume", str(run)]) == 0
    assert not (run / "note").exists()
    assert read_record(run)["recipe"]["seed"] == 1  # type: ignore[index]
    assert sorted(p.name for p in run.parent.iterdir()) == ["first"]
    assert not (run / WRITING).exists()


@pytest.mark.parametrize("after", ["first", "second"])
def test_killed_while_the_runs_change_places(
    after: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two renames, and before the old run is removed."""
    run = folder / "runs/first"
    rename, calls = Path.rename, []

    def once(self: Path, target: Any) -> Any:
        if self.name.startswith("first") and self.is_dir():
            calls.append(self)
            if len(calls) == (2 if after == "first" else 3):
                raise Ended
        return rename(self, target)

    if after == "first":
        monkeypatch.setattr(Path, "rename", once)
    else:
        rmtree = shutil.rmtree
        monkeypatch.setattr(
            shutil, "rmtree", lambda path, **k: ending() if str(path).endswith(OLD) else rmtree(path, **k)
        )
    with pytest.raises(Ended):
        fit(folder, "name=first", "overwrite=true", "seed=1")
    monkeypatch.undo()
    assert {p.name for p in run.parent.iterdir()} == (
        {"first.old", "first.new"} if after == "first" else {"first.old", "first"}
    )
    assert main(["resume", str(run)]) == 0
    assert read_record(run)["recipe"]["seed"] == 1  # type: ignore[index]
    assert main(["predict", str(run), str(folder / "train.extxyz"), "-o", str(folder / "out.extxyz")]) == 0
    assert fit(folder, "name=first", "overwrite=true") == 0
    assert sorted(p.name for p in run.parent.iterdir()) == ["first"]


@pytest.mark.parametrize("content", ["a file", "a folder", "an empty folder", "a link"])
def test_what_is_no_run_is_never_removed(content: str, folder: Path, capsys: Capture) -> None:
    path = folder / "runs/mine"
    if content == "a file":
        path.write_text("precious")
    elif content == "a link":
        path.symlink_to(folder / "runs/first", target_is_directory=True)
    else:
        path.mkdir()
        if content == "a folder":
            (path / "thesis.tex").write_text("precious")
    before = sorted((folder / "runs").rglob("*"))
    assert fit(folder, "name=mine", "overwrite=true") == 2
    assert "this is no run" in capsys.readouterr().err
    assert sorted((folder / "runs").rglob("*")) == before
    # nor what has the name that the new run would have meanwhile
    for ending_ in (NEW, OLD):
        other = folder / f"runs/first{ending_}"
        other.mkdir()
        (other / "thesis.tex").write_text("precious")
        assert fit(folder, "name=first", "overwrite=true") == 2
        assert (other / "thesis.tex").read_text() == "precious"
        shutil.rmtree(other)
        shutil.rmtree(folder / f"runs/first{NEW}", ignore_errors=True)


@pytest.mark.parametrize("nested", ["runs", "new/deep/runs"])
def test_an_error_before_training_leaves_nothing(nested: str, folder: Path, capsys: Capture) -> None:
    before = sorted(p for p in folder.rglob("*"))
    wrong = ("name=second", f"output={folder / nested}", "model.noise=nothing_like_it")
    assert fit(folder, *wrong) == 2
    assert sorted(p for p in folder.rglob("*")) == before
    assert fit(folder, "name=first", "overwrite=true", *wrong[1:]) == 2
    assert sorted(p for p in folder.rglob("*")) == before


def test_an_error_before_the_first_epoch_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that only shows once Lightning has begun."""

    def refuse(self: Any, *args: Any) -> None:
        del self, args
        raise ValueError("no such optimiser")

    before = sorted(p for p in folder.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("blip_ft.training.module.FineTuneModule.configure_optimizers", refuse)
        with pytest.raises(ValueError, match="no such optimiser"):
            fit(folder, "name=second")
    assert sorted(p for p in folder.rglob("*")) == before
    monkeypatch.setattr("blip_ft.training.module.FineTuneModule.training_step", refuse)
    with pytest.raises(ValueError, match="no such optimiser"):
        fit(folder, "name=second")
    assert (folder / "runs/second/run.json").exists(), "training has begun"


def test_locks_of_programs_that_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system has no locks, what the holder wrote decides."""
    from blip_ft import files

    def none(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", none)
    here = files._this_process()
    alive = here | {"process": os.getppid()}
    for who, held in (
        (alive, True),
        (here | {"process": 2**22 + 1}, False),
        (alive | {"host": "another"}, True),
        (alive | {"host": "another", "job": "7"}, False),
    ):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        (tmp_path / WRITING).write_text(json.dumps(who))
        if held:
            with pytest.raises(files.BlipError, match="another program is writing"):
                check_unused(tmp_path)
            with pytest.raises(files.BlipError, match="another program is writing"), sole_writer(tmp_path):
                pass
            assert json.loads((tmp_path / WRITING).read_text()) == who
        else:
            check_unused(tmp_path)
            with sole_writer(tmp_path):
                assert json.loads((tmp_path / WRITING).read_text())["process"] == os.getpid()
            assert not (tmp_path / WRITING).exists()


def test_a_run_goes_on_from_any_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = module.save_model
    monkeypatch.setattr(module, "save_model", ending)
    monkeypatch.chdir(folder)
    options = ["name=second", "output=runs", "data.train=train.extxyz"]
    with pytest.raises(Ended):
        main(["fit", "recipe.yaml", *options])
    monkeypatch.setattr(module, "save_model", original)
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(folder / "runs/second")]) == 0
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("damage", ["edited", "cut", "none"])
def test_a_record_that_is_not_whole(damage: str, folder: Path, capsys: Capture) -> None:
    path = folder / "runs/first" / RECORD
    text = path.read_text()
    if damage == "edited":
        path.write_text(text.replace('"unfinished"', '"whole"').replace('"seed": 0', '"seed": 2'))
    elif damage == "cut":
        path.write_text(text[: len(text) // 2])
    else:
        path.unlink()
    assert main(["resume", str(path.parent)]) == 2
    assert path.parent.name in capsys.readouterr().err


def test_trust_is_asked_for_again(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.save_model
    monkeypatch.setattr(module, "save_model", ending)
    with pytest.raises(Ended):
        fit(folder, "name=second", "--trust")
    monkeypatch.setattr(module, "save_model", original)
    assert main(["resume", str(folder / "runs/second")]) == 2
    assert "--trust" in capsys.readouterr().err
    assert main(["resume", str(folder / "runs/second"), "--trust"]) == 0
    assert main(["resume", str(folder / "runs/second"), "--trust", "seed=1"]) == 2
    assert "'seed' is what the run was begun with" in capsys.readouterr().err


def test_other_ranks_find_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what all processes of one start have in common, whatever lies there from earlier ones."""
    recipe = load_recipe(
        str(folder / "recipe.yaml"), [f"output={folder / 'runs'}", "name=first", "overwrite=true"]
    )
    new = recipe.model_copy(update={"name": "second"})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_PORT", "1")
    with new_run(recipe) as replacing, new_run(new) as other:
        assert followed(recipe, None, 1) == replacing.folder == folder / f"runs/first{NEW}"
        assert followed(new, None, 1) == other.folder == folder / "runs/second"
        assert followed(None, folder / "runs/first") == replacing.folder, "what is to go on"
        monkeypatch.setenv("MASTER_PORT", "2")
        with pytest.raises(BlipError, match="first rank has not made the folder"):
            followed(recipe, None, 0.5)
        monkeypatch.setenv(VARIABLE, str(other.folder))
        assert followed(recipe, None) == other.folder
