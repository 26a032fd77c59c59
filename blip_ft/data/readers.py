"""Readers: any file or table to :class:`~blip_ft.data.schema.RawFrame`, one by one.

Each reader yields frames in file order and turns whatever its library raises into a
:class:`~blip_ft.errors.DataError` that names the file and, where it can, the frame.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import datasets
import numpy as np
from ase import Atoms
from ase.io.extxyz import read_xyz
from ase.io.formats import UnknownFileTypeError, filetype, open_with_compression

from blip_ft.data.hub import quiet
from blip_ft.data.schema import RawFrame, to_numbers
from blip_ft.errors import DataError

#: file name endings of tables that Hugging Face ``datasets`` reads, and its builder for each
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}

_NUMBERS = ("numbers", "atomic_numbers", "species", "symbols", "elements")
_POSITIONS = ("positions", "pos", "coordinates", "coords")
_CELL = ("cell", "lattice", "lattice_vectors")
_VOIGT = re.compile(r'\b(stress|virial)\s*=\s*["{]([^"{}]*)["}]')
_PLAIN = ("numbers", "positions")  # arrays that every ase.Atoms has


def read_frames(path: Path, name: str) -> Iterator[RawFrame]:
    """All frames of a local file or folder.

    Args:
        path: the file or folder.
        name: how the user wrote it, for messages and the ``source`` column.

    Raises:
        DataError: empty, truncated, unreadable or not a structure file.
    """
    if path.is_dir():
        return _folder(path, name)
    if not path.stat().st_size:
        raise DataError("the file is empty", file=name, remedy="give a file with structures")
    builder = TABLES.get(path.suffix.lower())
    if builder is not None and not _is_ase_database(path):
        return _table(_load(name, builder, data_files=str(path), streaming=True), name)
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
    return raw


def _ase(path: Path, name: str) -> Iterator[RawFrame]:
    try:
        kind = filetype(str(path), read=True)
    except UnknownFileTypeError as error:
        raise _unknown(name) from error
    except Exception as error:  # damaged compression, undecodable text: any library's exception
        raise _unreadable(name, error) from error
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
            raise _unreadable(name, error, kind, frame) from error
        yield from_atoms(atoms, name, frame)
        frame += 1


def _database(path: Path) -> Iterator[Atoms]:
    """Rows of an ASE database with their key-value pairs, which ``ase.io`` leaves out."""
    for row in ase.db.connect(str(path)).select():
        yield row.toatoms(add_additional_information=True)


def _extxyz(path: Path, name: str) -> Iterator[RawFrame]:
    """Extended XYZ frame by frame.

    ASE reads a whole file by seeking, which takes quadratic time in a compressed one, stops
    without a word at a blank line, and does not say which frame is damaged. Hence the text is
    divided here and ASE parses one frame at a time.
    """
    try:
        with open_with_compression(str(path), "rb") as file:
            lines = file.read().decode("utf-8").splitlines(keepends=True)
    except Exception as error:
        raise _unreadable(name, error, "extxyz") from error
    start, frame = 0, 0
    while start < len(lines):
        if not lines[start].strip():
            start += 1
            continue
        if not lines[start].strip().isdecimal():
            raise DataError(
                f"line {start + 1} should be a number of atoms and is '{lines[start].strip()[:40]}'",
                file=name,
                frame=frame,
                remedy="the frame before has more lines than it announces, or this is no XYZ file",
            )
        n = int(lines[start])
        end = start + 2 + n
        if end > len(lines):
            raise DataError(
                f"the frame announces {n} atoms and the file ends after {max(len(lines) - start - 2, 0)}",
                file=name,
                frame=frame,
                remedy="the file is cut short: copy it again, or remove the last frame",
            )
        if end == len(lines) and _cut_inside_line(lines[start + 2 : end]):
            raise DataError(
                "the last line is shorter than the others and has no end: the file is cut short",
                file=name,
                frame=frame,
                remedy="copy the file again, or remove the last frame",
            )
        while end < len(lines) and lines[end].startswith("VEC"):  # lattice of the older dialect
            end += 1
        try:
            text = "".join([lines[start], _VOIGT.sub(_full, lines[start + 1]), *lines[start + 2 : end]])
            atoms = next(read_xyz(io.StringIO(text), index=0))
        except Exception as error:
            raise _unreadable(name, error, "extxyz", frame) from error
        yield from_atoms(atoms, name, frame)
        start, frame = end, frame + 1


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
            tree = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and {"ids", "nextid"} <= set(tree)


# ---- tables ------------------------------------------------------------------------------------


def _folder(path: Path, name: str) -> Iterator[RawFrame]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _table(_guard(lambda: datasets.load_from_disk(str(path)), name, "arrow"), name)
    if not any(p.suffix.lower() in TABLES for p in path.rglob("*")):
        raise DataError(
            "the folder holds no parquet, arrow or json table",
            file=name,
            remedy=f"for structure files write a pattern such as '{name.rstrip('/')}/*.xyz'",
        )
    return _table(_load(name, str(path), streaming=True), name)


def hub_frames(name: str) -> Iterator[RawFrame]:
    """All frames of a data set on the Hugging Face hub (downloaded once, then cached).

    Raises:
        DataError: no network, no such set, or no access.
    """
    return _table(load_hub(name), name)


def load_hub(name: str) -> Any:
    """The hub's data set as it is.

    Raises:
        DataError: no network, no such set, or no access.
    """
    try:
        with quiet():
            return datasets.load_dataset(name)
    except Exception as error:
        raise DataError(
            f"neither a file or folder here nor a data set that the hub gives: {_first_line(error)}",
            file=name,
            remedy="check the name; for a hub id connect to the network once (later runs use the "
            "cache), or download the set and give its folder",
        ) from error


def _load(name: str, builder: str, **options: Any) -> Any:
    return _guard(lambda: datasets.load_dataset(builder, **options), name, builder)


def _table(table: Any, name: str) -> Iterator[RawFrame]:
    """Rows of a (streamed or memory-mapped) table, or of a dict of them, one per split."""
    parts = dict(table) if isinstance(table, Mapping) else {"": table}
    # One lone split is called "train" by default, which says nothing about its use.
    named = len(parts) > 1
    for split, rows in parts.items():
        yield from _rows(rows, name, str(split) if named else "")


def _rows(rows: Iterable[dict[str, Any]], name: str, split: str) -> Iterator[RawFrame]:
    label = f"{name} ({split})" if split else name
    iterator = iter(rows)
    frame = 0
    while True:
        try:
            with quiet():
                row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(label, error, "table", frame) from error
        yield _from_row(row, label, split, frame)
        frame += 1


def _from_row(row: dict[str, Any], name: str, split: str, frame: int) -> RawFrame:
    values = dict(row)
    numbers = _take(values, _NUMBERS, name, frame)
    positions = _take(values, _POSITIONS, name, frame)
    cell = _take(values, _CELL, name, frame, required=False)
    pbc = values.pop("pbc", None)
    values.pop("source", None)
    values.pop("frame", None)
    if split and not values.get("split"):
        values["split"] = split
    try:
        zs = to_numbers(numbers)
        lattice = np.zeros((3, 3)) if cell is None else np.asarray(cell, dtype=np.float64)
        return RawFrame(
            numbers=zs,
            positions=np.asarray(positions, dtype=np.float64),
            cell=lattice.reshape(3, 3) if lattice.size == 9 else lattice,
            pbc=np.broadcast_to(np.asarray(bool(lattice.any()) if pbc is None else pbc, dtype=bool), (3,)),
            values=values,
            source=name,
            frame=frame,
        )
    except (TypeError, ValueError) as error:
        raise DataError(
            f"not a structure: {error}",
            file=name,
            frame=frame,
            field="numbers, positions, cell or pbc",
            remedy="see the schema of tables in docs/data.md",
        ) from error


def _take(
    values: dict[str, Any], names: tuple[str, ...], file: str, frame: int, *, required: bool = True
) -> Any:
    for name in names:
        if values.get(name) is not None:
            return values.pop(name)
    if required:
        raise DataError(
            f"no column '{names[0]}' (nor {', '.join(names[1:])}); there are: {', '.join(sorted(values))}",
            file=file,
            frame=frame,
            field=names[0],
            remedy="see the schema of tables in docs/data.md",
        )
    return None


# ---- errors ------------------------------------------------------------------------------------


def _unknown(name: str) -> DataError:
    return DataError(
        "neither a structure file that ASE knows nor a table (parquet, arrow, json)",
        file=name,
        remedy="give extended XYZ or another format of `ase info --formats`",
    )


def _guard(read: Any, name: str, kind: str) -> Any:
    """``read()`` without noise; whatever a vendor's reader raises becomes a DataError."""
    try:
        with quiet():
            return read()
    except Exception as error:
        raise _unreadable(name, error, kind) from error


def _unreadable(name: str, error: Exception, kind: str = "", frame: int | None = None) -> DataError:
    cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    what = f"cannot be read as {kind}" if kind else "cannot be read"
    return DataError(
        f"{what}: {_first_line(cause or error)}",
        file=name,
        frame=frame,
        remedy="check that the file is whole and of the format its name says",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
