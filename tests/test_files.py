"""Files get their names when they are complete, never at another program's cost, and errors say what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blip_ft.errors import BlipError
from blip_ft.files import (
    check_unused,
    file_name,
    move_into_place,
    remedy_of,
    set_name,
    sole_writer,
    whole_file,
    whole_path,
)


@pytest.mark.parametrize(
    "name", ["a/b", "..", "../x", "a\\b", "50 %", "ä ö", "a%2Fb", "hot", ".hidden", "a:b*?"]
)
def test_names_of_sets_are_names_of_files(name: str, tmp_path: Path) -> None:
    file = f"blip-{file_name(name)}.npz"
    assert Path(file).name == file
    (tmp_path / file).touch()
    assert [p.name for p in tmp_path.iterdir()] == [file]
    assert set_name(file_name(name)) == name


def test_usual_names_stay_as_they_are() -> None:
    for name in ("seen", "hot_quartz", "T=300 K", "mp-123", "a.b+c"):
        assert file_name(name) == name


@pytest.mark.parametrize("folder", [False, True])
def test_what_has_appeared_in_the_meantime_stays(tmp_path: Path, folder: bool) -> None:
    """Two programs write one output: the one that finishes last refuses."""
    target = tmp_path / "out"

    def second() -> None:
        if folder:
            with whole_path(target, overwrite=False) as new:
                new.mkdir()
                target.mkdir()  # an empty folder would be replaced by a rename
        else:
            with whole_file(target, overwrite=False) as file:
                file.write("second")
                target.write_text("first")

    with pytest.raises(BlipError, match="has appeared since the program started"):
        second()
    assert folder or target.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing half-written is left"
    if not folder:
        with whole_file(target, overwrite=True) as file:
            file.write("third")
        assert target.read_text() == "third"


def test_file_systems_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", none)
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    move_into_place(tmp_path / "one", tmp_path / "out", overwrite=False)
    with pytest.raises(FileExistsError):
        move_into_place(tmp_path / "two", tmp_path / "out", overwrite=False)
    assert (tmp_path / "out").read_text() == "one"


def test_one_program_writes_a_folder(tmp_path: Path) -> None:
    with sole_writer(tmp_path):
        with pytest.raises(BlipError, match="another program is writing"):
            check_unused(tmp_path)
        with pytest.raises(BlipError, match="another program is writing"), sole_writer(tmp_path):
            pass
        assert (tmp_path / ".writing").exists(), "the second has not taken the first one's lock away"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".writing").touch()  # of a program that was killed
    check_unused(tmp_path)


def test_remedies_name_the_cause(tmp_path: Path) -> None:
    remedies = {
        code: remedy_of(OSError(code, os.strerror(code)))
        for code in (errno.ENOSPC, errno.ENOENT, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG)
    }
    assert ["free disk space" in text for text in remedies.values()] == [True] + [False] * 5
    assert len(set(remedies.values())) == 6
    gone = tmp_path / "gone"
    gone.mkdir()

    def removed() -> None:
        with whole_path(gone / "out") as new:
            gone.rmdir()
            new.write_text("x")

    with pytest.raises(BlipError, match="removed") as error:
        removed()
    assert "space" not in str(error.value)
    with pytest.raises(BlipError, match="shorter name"), whole_file(tmp_path / ("x" * 250)) as file:
        file.write("x")
