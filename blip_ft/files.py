"""Writing files so that a reader sees the whole file or none."""

from __future__ import annotations

import errno
import gzip
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from blip_ft.errors import BlipError


def check_target(target: str | Path, *, overwrite: bool) -> Path:
    """The path of a file that is about to be written.

    Raises:
        BlipError: it exists and may not be replaced, or its folder does not exist.
    """
    path = Path(target)
    if path.exists() and not overwrite:
        raise BlipError("this file exists", file=path, remedy="choose another name or add --overwrite")
    if not path.parent.is_dir():
        raise BlipError("its folder does not exist", file=path, remedy=f"mkdir -p '{path.parent}'")
    return path


#: how torch says that a file could not be written to its end; why, it does not say
_TORCH = re.compile(r"PytorchStreamWriter|inline_container|iostream|file write failed|unexpected pos")


def is_failed_write(error: Exception) -> bool:
    """Whether an error is one of writing: torch raises a ``RuntimeError`` on a full disk."""
    return isinstance(error, OSError) or _TORCH.search(str(error)) is not None


def write_remedy(error: Exception, *, choose: str = "another folder") -> str:
    """What to do where writing failed, by the system's own reason.

    Args:
        error: an ``OSError``, or what a library made of one (``... (os error 28)``).
        choose: what the user chooses the place by.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code is None and (found := re.search(r"os error (\d+)", str(error))):
        code = int(found[1])
    if code in (errno.ENOSPC, errno.EDQUOT) or (code is None and _TORCH.search(str(error))):
        return f"free some space there, or choose {choose}"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"it may not be written to: change its permissions, or choose {choose}"
    if code == errno.ENOENT:
        return (
            "the folder is not there: was it moved or removed while this ran, or has a name in the path a / in "
            f"it? else choose {choose}"
        )
    if code in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
        return f"something of this name is in the way: remove it, or choose {choose}"
    if code == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if code in (errno.EMFILE, errno.ENFILE):
        return "too many files are open: raise the limit (ulimit -n)"
    return f"look at the disk or network that it lies on, or choose {choose}"


@contextmanager
def whole_file(target: Path) -> Iterator[IO[str]]:
    """A text file (packed where the name ends in ``.gz``) that gets its name when it is complete.

    An exception inside leaves nothing behind, and an existing ``target`` as it was.

    Raises:
        BlipError: no space, no permission.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    with _named_when_complete(temporary, target), _open(temporary, packed=target.suffix == ".gz") as file:
        yield file


@contextmanager
def whole_path(target: Path) -> Iterator[Path]:
    """A path of the same ending, for a file or a folder that gets its name when it is complete.

    An exception inside leaves nothing behind, and an existing ``target`` as it was.

    Raises:
        BlipError: no space, no permission.
    """
    temporary = target.with_name(f".{os.getpid()}.part.{target.name}")
    with _named_when_complete(temporary, target):
        yield temporary
        if target.is_dir():  # a folder cannot be renamed onto one that has files
            shutil.rmtree(target)


@contextmanager
def _named_when_complete(temporary: Path, target: Path) -> Iterator[None]:
    """Rename ``temporary`` to ``target`` after the block; whatever fails, it is gone afterwards.

    Raises:
        BlipError: an OSError in the block or in renaming.
    """
    try:
        yield
        temporary.replace(target)
    except OSError as error:
        raise BlipError(
            f"cannot write: {error.strerror or error}",
            file=target,
            remedy=write_remedy(error),
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def _open(path: Path, *, packed: bool) -> IO[str]:
    if packed:
        return cast("IO[str]", gzip.open(path, "xt", encoding="utf-8"))
    return path.open("x", encoding="utf-8")
