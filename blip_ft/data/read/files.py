"""Readers: any file or table to :class:`~blip_ft.data.read.schema.RawFrame`, one by one.

Each reader yields frames in file order and turns whatever its library raises into a
:class:`~blip_ft.errors.DataError` that names the file and, where it can, the frame.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, filetype, ioformats, open_with_compression
from ase.io.vasp import iread_vasp_out

from blip_ft.data.read import convergence, tables
from blip_ft.data.read.archives import npz_frames
from blip_ft.data.read.extxyz import frames_or_errors
from blip_ft.data.read.layouts import recognise
from blip_ft.data.read.problems import unreadable
from blip_ft.data.read.schema import RawFrame
from blip_ft.errors import DataError

#: file name endings of ASE's LMDB databases
LMDB = frozenset({".aselmdb", ".lmdb"})

#: formats of many structures whose readers give each one as it is read; other readers make a list
_STEP_BY_STEP = frozenset({"bundletrajectory", "cp2k-dcd", "espresso-out", "onetep-out", "traj", "vasp-xml"})
_PLAIN = ("numbers", "positions")  # arrays that every ase.Atoms has


def read_frames(
    path: Path, name: str, fields: Mapping[str, str] | None = None, *, broken: bool = False
) -> Iterator[RawFrame]:
    """All frames of a local file or folder.

    Args:
        path: the file or folder.
        name: how the user wrote it, for messages and the ``source`` column.
        fields: explicit names (``data.fields``): where tables keep the structure.
        broken: give a frame of extended XYZ that cannot be parsed too (``RawFrame.broken``), instead of raising.

    Raises:
        DataError: empty, truncated, unreadable or not a structure file.
    """
    if path.is_dir():
        shards = sorted(p for p in path.rglob("*") if p.suffix.lower() in LMDB)
        if shards:
            return chain.from_iterable(_lmdb(p, f"{name.rstrip('/')}/{p.relative_to(path)}") for p in shards)
        return tables.table_folder(path, name, fields or {})
    if not path.stat().st_size:
        raise DataError("the file is empty", file=name, remedy="give a file with structures")
    if path.suffix.lower() in LMDB:
        return _lmdb(path, name)
    if path.suffix.lower() == ".npz":
        return npz_frames(path, name, fields or {})
    kind = tables.kind_of(path)
    if kind is not None and not _is_ase_database(path):
        return tables.table_file(path, name, kind, fields or {})
    return _ase(path, name, broken=broken)


# ---- ASE ---------------------------------------------------------------------------------------


def from_atoms(atoms: Atoms, source: str, frame: int, *, kind: str = "", converged: bool = True) -> RawFrame:
    """A raw frame of an ``ase.Atoms``: info, arrays and calculator results become its values.

    Empty texts are no values. A name that holds different values in info, arrays and calculator is the
    frame's ``clash``.

    Args:
        atoms: the structure.
        source: file or set.
        frame: number in it.
        kind: ASE's name of the format.
        converged: what the file says about the calculation.
    """
    info = dict(atoms.info)
    nested = (info.pop("key_value_pairs", None), info.pop("data", None))  # of an ASE database
    values: dict[str, Any] = {k: v for part in nested if isinstance(part, Mapping) for k, v in part.items()}
    raw = RawFrame(
        numbers=atoms.numbers.astype(np.int64),
        positions=np.asarray(atoms.positions, dtype=np.float64),
        cell=np.asarray(atoms.cell.array, dtype=np.float64),
        pbc=np.asarray(atoms.pbc, dtype=bool),
        values=values,
        source=source,
        frame=frame,
        atoms=atoms,
    )
    arrays = {k: v for k, v in atoms.arrays.items() if k not in _PLAIN}
    # Results as stored: get_forces() would set the forces on constrained atoms to zero.
    results = {k: v for k, v in (atoms.calc.results if atoms.calc else {}).items() if v is not None}
    for part in (info, arrays, results):
        for key, value in part.items():
            if isinstance(value, str) and not value.strip():
                continue
            if key in values and not np.array_equal(values[key], value):
                raw.clash = key
            values[key] = value
    raw.converged = converged and not convergence.says_no(values, kind)
    if not raw.converged and isinstance(values.get("energy"), float) and np.isnan(values["energy"]):
        del values["energy"]  # how ASE says so for ORCA
    raw.layout = recognise(set(values))
    return raw


def _ase(path: Path, name: str, *, broken: bool = False) -> Iterator[RawFrame]:
    try:
        kind = filetype(str(path), read=True)
    except UnknownFileTypeError as error:
        raise _unknown(name) from error
    except Exception as error:  # damaged compression, undecodable text: any library's exception
        raise unreadable(name, error) from error
    if kind == "extxyz":
        for frame, atoms in enumerate(frames_or_errors(path, name)):
            if not isinstance(atoms, DataError):
                yield from_atoms(atoms, name, frame)
            elif broken:
                nothing = from_atoms(Atoms(), name, frame)
                nothing.broken = atoms
                yield nothing
            else:
                raise atoms from atoms.__cause__
        return
    images, eager = _images(path, kind)
    flags = convergence.steps(path, kind)
    frame = 0
    while True:
        try:
            atoms, converged = next(images), next(flags)
        except StopIteration:
            return
        except UnknownFileTypeError as error:
            raise _unknown(name) from error
        except Exception as error:
            raise unreadable(name, error, kind, None if eager else frame) from error
        yield from_atoms(atoms, name, frame, kind=kind, converged=converged)
        frame += 1


def _images(path: Path, kind: str) -> tuple[Iterator[Atoms], bool]:
    """The structures of a file, and whether the reader makes all of them before it gives the first."""
    if kind in ("db", "json"):
        return _database(path), False
    if kind == "vasp-out":  # by itself ASE makes a list of all steps: which one is damaged would be lost
        return _outcar(path), False
    if kind == "orca-output":
        return ase.io.iread(StringIO(convergence.orca_text(path)), index=":", format=kind), True
    eager = kind in ioformats and not ioformats[kind].single and kind not in _STEP_BY_STEP
    return ase.io.iread(str(path), index=":", format=kind), eager


def _outcar(path: Path) -> Iterator[Atoms]:
    with open_with_compression(str(path), "r") as file:
        yield from iread_vasp_out(file, index=slice(None))


def _database(path: Path) -> Iterator[Atoms]:
    """Rows of an ASE database with their key-value pairs, which ``ase.io`` leaves out."""
    for row in ase.db.connect(str(path), use_lock_file=False).select():
        yield _structure(row)


def _structure(row: Any) -> Atoms:
    """One row with its key-value pairs as they were stored.

    ASE's row answers ``charge``, ``mass`` or ``volume`` by what it works out itself, ``charge`` by the sum of
    initial charges, mostly 0.
    """
    atoms: Atoms = row.toatoms(add_additional_information=True)
    pairs = atoms.info.get("key_value_pairs", {})
    pairs.update({key: vars(row)[key] for key in pairs if key in vars(row)})
    return atoms


def lmdb_backend(name: str) -> Any:
    """ASE's database class for LMDB files.

    Args:
        name: the file, for the error.

    Raises:
        DataError: the package that has it is not installed.
    """
    try:
        from ase_db_backends.aselmdb import LMDBDatabase
    except ImportError as error:
        raise DataError(
            "ASE reads LMDB files through the package ase-db-backends, which is not installed",
            file=name,
            remedy="pip install 'blip-ft[lmdb]' (fairchem-core brings it too)",
        ) from error
    return LMDBDatabase


def open_lmdb(path: Path, name: str) -> Any:
    """An LMDB file of ASE for reading only: no lock file, and its folder may be read-only.

    Args:
        path: the file.
        name: how the user wrote it.

    Raises:
        DataError: the backend is not installed, or the file is no ASE database.
    """
    backend = lmdb_backend(name)
    try:
        return backend(path, readonly=True, use_lock_file=False)
    except Exception as error:  # lmdb and zlib raise their own
        raise unreadable(name, error, "aselmdb") from error


def _lmdb(path: Path, name: str) -> Iterator[RawFrame]:
    """Rows of fairchem's LMDB files, through ASE's own backend for them.

    Raises:
        DataError: the backend is not installed, or the file is no ASE database.
    """
    database = open_lmdb(path, name)
    for frame, key in enumerate(list(database.ids)):
        try:
            atoms = _structure(database._get_row(key))
        except Exception as error:
            raise unreadable(name, error, "aselmdb", frame) from error
        yield from_atoms(atoms, name, frame)


def _is_ase_database(path: Path) -> bool:
    """ASE's own database in JSON, which looks like a table by its name."""
    if path.suffix.lower() != ".json":
        return False
    try:
        with path.open(encoding="utf-8") as file:
            if file.read(64).lstrip()[:1] != "{":
                return False  # a list of records: not parsed twice
            file.seek(0)
            tree = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and {"ids", "nextid"} <= set(tree)


def _unknown(name: str) -> DataError:
    return DataError(
        "neither a structure file that ASE knows nor a table (parquet, arrow, json, npz)",
        file=name,
        remedy="ASE goes by names and first lines: call it as its program does (OUTCAR, vasprun.xml, ...), or give "
        "extended XYZ or another format of `ase info --formats`",
    )
