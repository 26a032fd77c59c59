"""Writing that fails: nothing is left, and the remedy is that of the cause."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch

from blip_ft.errors import BlipError
from blip_ft.files import is_failed_write, whole_file, whole_path, write_remedy


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "may not be written to"),
        (errno.EROFS, "may not be written to"),
        (errno.ENOENT, "the folder is not there"),
        (errno.ENOTDIR, "is in the way"),
        (errno.ENOTEMPTY, "is in the way"),
        (errno.ENAMETOOLONG, "a shorter name"),
        (errno.EIO, "disk or network"),
    ],
)
def test_remedies(code: int, words: str, tmp_path: Path) -> None:
    for writer in (whole_file, whole_path):
        with pytest.raises(BlipError) as caught, writer(tmp_path / "a.txt"):
            raise OSError(code, "as the system says")
        assert words in caught.value.remedy
        assert ("free some space" in caught.value.remedy) == (code in (errno.ENOSPC, errno.EDQUOT))
        assert list(tmp_path.iterdir()) == []


def test_what_libraries_make_of_an_error_of_the_system() -> None:
    assert "free some space" in write_remedy(ValueError("I/O error: No space left on device (os error 28)"))
    assert "may not be written" in write_remedy(ValueError("Permission denied (os error 13)"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_torch_on_a_full_disk_is_a_failed_write() -> None:
    with pytest.raises((RuntimeError, OSError)) as caught:
        torch.save({"a": torch.zeros(1000)}, "/dev/full")
    assert is_failed_write(caught.value)
    assert "free some space" in write_remedy(caught.value)
    assert not is_failed_write(RuntimeError("shapes do not match"))


def remove_while_writing(folder: Path) -> None:
    with whole_file(folder / "a.txt") as file:
        file.write("x")
        shutil.rmtree(folder)


def test_a_removed_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BlipError, match="moved or removed"):
        remove_while_writing(tmp_path / "out")
