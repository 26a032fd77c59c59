"""Writing files so that a reader sees the whole file or none."""

from __future__ import annotations

import gzip
import os
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
            remedy="free some space, or choose a folder that you may write to",
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def _open(path: Path, *, packed: bool) -> IO[str]:
    if packed:
        return cast("IO[str]", gzip.open(path, "xt", encoding="utf-8"))
    return path.open("x", encoding="utf-8")
