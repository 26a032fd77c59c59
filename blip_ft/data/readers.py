"""Readers: any file or table to :class:`~blip_ft.data.schema.RawFrame`, one by one.

Each reader yields frames in file order and turns whatever its library raises into a
:class:`~blip_ft.errors.DataError` that names the file and, where it can, the frame.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.io.extxyz import read_xyz
from ase.io.formats import UnknownFileTypeError, filetype, open_with_compression

from blip_ft.data import tables
from blip_ft.data.archives import npz_frames
from blip_ft.data.layouts import recognise
from blip_ft.data.problems import unreadable
from blip_ft.data.schema import RawFrame
from blip_ft.errors import DataError

#: file name endings of ASE's LMDB databases
LMDB = frozenset({".aselmdb", ".lmdb"})

_VOIGT = re.compile(r'\b(stress|virial)\s*=\s*["{]([^"{}]*)["}]')
_PLAIN = ("numbers", "positions")  # arrays that every ase.Atoms has


def read_frames(path: Path, name: str, fields: Mapping[str, str] | None = None) -> Iterator[RawFrame]:
    """All frames of a local file or folder.

    Args:
        path: the file or folder.
        name: how the user wrote it, for messages and the ``source`` column.
        fields: explicit names (``data.fields``): where tables keep the structure.

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
    return _ase(path, name)


# ---- ASE ---------------------------------------------------------------------------------------


def from_atoms(atoms: Atoms, source: str, frame: int) -> RawFrame:
    """A raw frame of an ``ase.Atoms``: info, arrays and calculator results become its values.

    Raises:
        DataError: info and calculator hold different values under one name.
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
    )
    arrays = {k: v for k, v in atoms.arrays.items() if k not in _PLAIN}
    # Results as stored: get_forces() would set the forces on constrained atoms to zero.
    results = {k: v for k, v in (atoms.calc.results if atoms.calc else {}).items() if v is not None}
    for part in (info, arrays, results):
        for key, value in part.items():
            if key in values and not np.array_equal(values[key], value):
                raise raw.error(
                    f"'{key}' occurs twice with different values (info, arrays or calculator)",
                    field=key,
                    remedy="remove one of them from the file",
                )
            values[key] = value
    raw.layout = recognise(set(values))
    return raw


def _ase(path: Path, name: str) -> Iterator[RawFrame]:
    try:
        kind = filetype(str(path), read=True)
    except UnknownFileTypeError as error:
        raise _unknown(name) from error
    except Exception as error:  # damaged compression, undecodable text: any library's exception
        raise unreadable(name, error) from error
    if kind == "extxyz":
        yield from _extxyz(path, name)
        return
    images = _database(path) if kind in ("db", "json") else ase.io.iread(str(path), index=":", format=kind)
    frame = 0
    while True:
        try:
            atoms = next(images)
        except StopIteration:
            return
        except UnknownFileTypeError as error:
            raise _unknown(name) from error
        except Exception as error:
            raise unreadable(name, error, kind, frame) from error
        yield from_atoms(atoms, name, frame)
        frame += 1


def _database(path: Path) -> Iterator[Atoms]:
    """Rows of an ASE database with their key-value pairs, which ``ase.io`` leaves out."""
    for row in ase.db.connect(str(path)).select():
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


def _lmdb(path: Path, name: str) -> Iterator[RawFrame]:
    """Rows of fairchem's LMDB files, through ASE's own backend for them.

    Raises:
        DataError: the backend is not installed, or the file is no ASE database.
    """
    backend = lmdb_backend(name)
    try:
        database = backend(path, readonly=True, use_lock_file=False)
        ids = list(database.ids)
    except Exception as error:  # lmdb and zlib raise their own
        raise unreadable(name, error, "aselmdb") from error
    for frame, key in enumerate(ids):
        try:
            atoms = _structure(database._get_row(key))
        except Exception as error:
            raise unreadable(name, error, "aselmdb", frame) from error
        yield from_atoms(atoms, name, frame)


def _extxyz(path: Path, name: str) -> Iterator[RawFrame]:
    """Extended XYZ frame by frame, in constant memory.

    ASE reads a whole file by seeking, which takes quadratic time in a compressed one, stops
    without a word at a blank line, and does not say which frame is damaged. Hence the text is
    divided here and ASE parses one frame at a time.
    """
    frame = 0
    with _Lines(path, name) as lines:
        for line in lines:
            if not line.strip():
                continue
            if not line.strip().isdecimal():
                raise DataError(
                    f"line {lines.number} should be a number of atoms and is '{line.strip()[:40]}'",
                    file=name,
                    frame=frame,
                    remedy="the frame before has more lines than it announces, or this is no XYZ file",
                )
            digits = line.strip()
            n = int(digits) if len(digits) < 19 else sys.maxsize  # more than any list can hold
            head = next(lines, "")
            rows = list(islice(lines, n))
            if len(rows) < n or not head:
                raise DataError(
                    f"the frame announces {digits[:40]} atoms and the file ends after {len(rows)}",
                    file=name,
                    frame=frame,
                    remedy="the file is cut short: copy it again, or remove the last frame",
                )
            following = next(lines, None)
            if following is None and _cut_inside_line(rows):
                raise DataError(
                    "the last line is shorter than the others and has no end: the file is cut short",
                    file=name,
                    frame=frame,
                    remedy="copy the file again, or remove the last frame",
                )
            while following is not None and following.startswith("VEC"):  # lattice of the older dialect
                rows.append(following)
                following = next(lines, None)
            lines.put_back(following)
            try:
                atoms = next(read_xyz(io.StringIO("".join([line, _VOIGT.sub(_full, head), *rows])), index=0))
            except Exception as error:
                raise unreadable(name, error, "extxyz", frame) from error
            yield from_atoms(atoms, name, frame)
            frame += 1


class _Lines(Iterator[str]):
    """Lines of a text file, packed or not, one of which can be put back.

    Attributes:
        number: of the line that was given last, from 1.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.number = 0
        self._name = name
        self._back: str | None = None
        try:
            self._file = io.TextIOWrapper(open_with_compression(str(path), "rb"), encoding="utf-8")
        except Exception as error:
            raise unreadable(name, error, "extxyz") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __next__(self) -> str:
        line, self._back = self._back, None
        if line is None:
            try:
                line = self._file.readline()
            except Exception as error:  # damaged compression, undecodable text
                raise unreadable(self._name, error, "extxyz") from error
        if not line:
            raise StopIteration
        self.number += 1
        return line

    def put_back(self, line: str | None) -> None:
        """Give ``line`` again next."""
        if line is not None:
            self._back = line
            self.number -= 1


def _full(match: re.Match[str]) -> str:
    """``stress="xx yy zz yz xz xy"`` as the nine numbers that ASE insists on; others as they are."""
    numbers = match[2].split()
    if len(numbers) != 6:
        return match[0]
    xx, yy, zz, yz, xz, xy = numbers
    return f'{match[1]}="{xx} {xy} {xz} {xy} {yy} {yz} {xz} {yz} {zz}"'


def _cut_inside_line(rows: list[str]) -> bool:
    """True if a fixed-width table stops within its last number, which would read as another one."""
    widths = {len(row.rstrip("\r\n")) for row in rows[:-1]}
    last = rows[-1] if rows else ""
    return len(rows) > 2 and len(widths) == 1 and not last.endswith("\n") and len(last) < widths.pop()


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
        remedy="give extended XYZ or another format of `ase info --formats`",
    )
