"""Writing files so that a reader sees the whole file or none."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast
from urllib.parse import quote, unquote

from blip_ft.errors import BlipError

try:
    import fcntl
except ImportError:  # no such locks on Windows: there two programs are told apart by the folder alone
    fcntl = None  # type: ignore[assignment]

#: what stays as it is in names of files
_SAFE = " !#$&'()+,;=@[]^{}~"
#: bytes free below which a disk is full for a program that does not say why it could not write
FULL = 1_000_000

_REMEDIES = {
    errno.ENOENT: "a folder on the way has been removed or never was there: make it, or choose another",
    errno.ENOTDIR: "something on the way is a file and no folder: choose another place",
    errno.EISDIR: "a folder has this name: choose another name",
    errno.EEXIST: "choose another name, or allow to replace what is there (overwrite)",
    errno.ENOTEMPTY: "another program has written there: choose another name",
    errno.EACCES: "change the permissions, or choose a folder that you may write to",
    errno.EPERM: "change the permissions, or choose a folder that you may write to",
    errno.EROFS: "this file system is read-only: choose another folder",
    errno.ENOSPC: "free disk space, or choose a folder on another disk",
    errno.EDQUOT: "your quota is used up: remove files, or choose a folder on another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or the network failed: try again, or choose another folder",
}


def remedy_of(error: OSError) -> str:
    """What to do about a failed write, by its cause."""
    return _REMEDIES.get(error.errno or 0, "choose another folder")


def is_full(folder: Path) -> bool:
    """Whether the disk of a folder has no space left: some libraries raise errors of their own then."""
    try:
        return shutil.disk_usage(folder).free < FULL
    except OSError:
        return False


def file_name(name: str) -> str:
    """A name of a set as part of a file's name: what a path would take for a separator is written ``%2F``."""
    return quote(name, safe=_SAFE)


def set_name(file: str) -> str:
    """The inverse of :func:`file_name`."""
    return unquote(file)


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
def whole_file(target: Path, *, overwrite: bool = True) -> Iterator[IO[str]]:
    """A text file (packed where the name ends in ``.gz``) that gets its name when it is complete.

    An exception inside leaves nothing behind, and an existing ``target`` as it was.

    Args:
        target: the file.
        overwrite: replace what has this name when the file is complete. It need not have been there at the start:
            another program may write the same output.

    Raises:
        BlipError: no space, no permission, or ``target`` exists and is not to be replaced.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    with (
        _named_when_complete(temporary, target, overwrite=overwrite),
        _open(temporary, packed=target.suffix == ".gz") as file,
    ):
        yield file


@contextmanager
def whole_path(target: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A path of the same ending, for a file or a folder that gets its name when it is complete.

    An exception inside leaves nothing behind, and an existing ``target`` as it was.

    Args:
        target: the file or folder.
        overwrite: see :func:`whole_file`.

    Raises:
        BlipError: no space, no permission, or ``target`` exists and is not to be replaced.
    """
    temporary = target.with_name(f".{os.getpid()}.part.{target.name}")
    with _named_when_complete(temporary, target, overwrite=overwrite):
        yield temporary
        if overwrite and target.is_dir():  # a folder cannot be renamed onto one that has files
            shutil.rmtree(target)


#: file of a folder that is being written: who does
WRITING = ".writing"
#: locks of this process
_HELD: set[IO[str]] = set()


def _let_go() -> None:
    """A forked process (a loader's worker) holds no lock: it may live longer than this one."""
    while _HELD:
        with suppress(OSError):
            os.close(_HELD.pop().fileno())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def sole_writer(folder: Path) -> Iterator[Path]:
    """Hold a folder for this program while a run is written there; the file that does says host and process.

    Where the file system has no locks, a process of this host that has ended, or an earlier start of the same SLURM
    job, holds nothing.

    Yields:
        The file; it may be renamed with the folder.

    Raises:
        BlipError: another program holds it.
    """
    path = folder / WRITING
    while True:
        file = path.open("a+")
        if _locked(file, folder) and _is_at(file, path):
            break
        file.close()  # whoever held it has taken the file away
    _HELD.add(file)
    with file:
        file.truncate(0)
        file.write(json.dumps(_this_process()))
        file.flush()
        try:
            yield path
        finally:
            _HELD.discard(file)
            if _is_at(file, path):
                path.unlink(missing_ok=True)


def check_unused(folder: Path) -> None:
    """Raise if another program is writing to a folder.

    Raises:
        BlipError: it is.
    """
    try:
        with (folder / WRITING).open() as file:
            _locked(file, folder, shared=True)
    except OSError:
        return


def _locked(file: IO[str], folder: Path, *, shared: bool = False) -> bool:
    """Whether the lock was taken; where there are no locks, whether nobody else seems to hold it.

    Raises:
        BlipError: another program holds it.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no locks on this system")
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise in_use(folder, _who(file)) from error
    except OSError as error:  # a file system without locks
        who = _who(file)
        if who and not _has_ended(who):
            raise in_use(folder, who) from error
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether a path still is that of an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _this_process() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID", "")}


def _who(file: IO[str]) -> dict[str, str | int]:
    """What the holder has written; nothing for one that has only begun, or of an earlier version."""
    try:
        file.seek(0)
        who = json.load(file)
        return who if isinstance(who, dict) else {}
    except (OSError, ValueError):
        return {}


def _has_ended(who: Mapping[str, str | int]) -> bool:
    """Whether a holder is known to be gone."""
    mine = _this_process()
    if who.get("job") and who.get("job") == mine["job"]:
        return True  # this job has been started again
    if who.get("host") != mine["host"]:
        return False
    try:
        os.kill(int(who["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError, OverflowError):
        return False
    return int(who["process"]) == os.getpid()


def in_use(folder: Path, who: Mapping[str, str | int] | None = None) -> BlipError:
    """The error for an output that another program writes."""
    by = f" (process {who.get('process')} on {who.get('host')})" if who else ""
    return BlipError(
        f"another program is writing this output{by}",
        file=folder,
        remedy=f"wait until it has finished, or choose another name; if it has ended, remove {WRITING} there",
    )


def hold(file: IO[bytes], path: Path) -> None:
    """Keep an open file for this program, where there are locks, until it is closed.

    Raises:
        BlipError: another one, on this machine, holds it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise in_use(path) from error
    except OSError:  # a file system without locks
        return


def cannot_write(path: Path, error: OSError, *, kept: bool = True) -> BlipError:
    """The error for an output that ``--resume`` goes on with, or, where nothing is kept, for any."""
    remedy = remedy_of(error)
    return BlipError(
        f"cannot write: {error.strerror or error}",
        file=path,
        remedy=f"{remedy}; what is done is kept, --resume goes on with it" if kept else remedy,
    )


def move_into_place(new: Path, target: Path, *, overwrite: bool) -> None:
    """Give a complete file or folder its name, at once.

    Args:
        new: on the same file system.
        target: its name.
        overwrite: replace a file of this name.

    Raises:
        FileExistsError: the name is taken and may not be replaced.
        OSError: what else renaming raises.
    """
    if overwrite:
        new.replace(target)
    elif new.is_dir():
        if target.exists():  # renaming would take an empty folder's place
            raise FileExistsError(errno.EEXIST, "this has appeared since the program started", str(target))
        new.rename(target)
    else:
        try:
            target.hardlink_to(new)  # fails where the name is taken; renaming would not
        except FileExistsError as error:
            raise FileExistsError(
                errno.EEXIST, "this has appeared since the program started", str(target)
            ) from error
        except OSError as error:  # a file system without links
            if target.exists():
                raise FileExistsError(
                    errno.EEXIST, "this has appeared since the program started", str(target)
                ) from error
            new.rename(target)
        else:
            new.unlink()


@contextmanager
def _named_when_complete(temporary: Path, target: Path, *, overwrite: bool) -> Iterator[None]:
    """Rename ``temporary`` to ``target`` after the block; whatever fails, it is gone afterwards.

    Raises:
        BlipError: an OSError in the block or in renaming.
    """
    try:
        yield
        move_into_place(temporary, target, overwrite=overwrite)
    except OSError as error:
        raise BlipError(
            f"cannot write: {error.strerror or error}", file=target, remedy=remedy_of(error)
        ) from error
    finally:
        with suppress(OSError):  # whatever kept it from being written may keep it from being removed
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            temporary.unlink(missing_ok=True)


def _open(path: Path, *, packed: bool) -> IO[str]:
    if packed:
        return cast("IO[str]", gzip.open(path, "xt", encoding="utf-8"))
    return path.open("x", encoding="utf-8")
