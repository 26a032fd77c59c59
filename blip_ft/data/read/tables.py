"""Tables: parquet, arrow, json, hub sets and ``.npz`` archives, row by row.

Each reader yields :class:`~blip_ft.data.read.schema.RawFrame` in the order of the rows. Layouts of
well-known sets are in :mod:`blip_ft.data.read.layouts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import datasets
import numpy as np
from ase.io.formats import open_with_compression

from blip_ft.data.read.convergence import says_no
from blip_ft.data.read.hub import load_hub, quiet
from blip_ft.data.read.layouts import (
    STRUCTURE,
    Layout,
    flatten,
    from_pymatgen,
    parsed,
    pymatgen_charge,
    recognise,
)
from blip_ft.data.read.problems import guard, symbol_remedy, unreadable
from blip_ft.data.read.raw import UnknownSymbolError
from blip_ft.data.read.schema import RawFrame, to_numbers
from blip_ft.errors import DataError

#: file name endings of tables, and the Hugging Face builder for each; json is read here
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
_PACKED = (".gz", ".bz2", ".xz")

Fields = Mapping[str, str]


def kind_of(path: Path) -> str | None:
    """``parquet``, ``arrow`` or ``json`` by the file's name (``.json.gz`` too), or ``None``."""
    name = path.name.lower()
    for ending in _PACKED:
        if name.endswith((f".json{ending}", f".jsonl{ending}")):
            return "json"
    return TABLES.get(path.suffix.lower())


def table_file(path: Path, name: str, kind: str, fields: Fields) -> Iterator[RawFrame]:
    """Rows of one file of :func:`kind_of`.

    Raises:
        DataError: unreadable, or a row that is no structure.
    """
    if kind == "json":
        return rows_of(_json_rows(path), name, "", fields)
    if kind == "parquet" and _without_rows(path):  # which `datasets` refuses
        return iter(())
    load = lambda: datasets.load_dataset(kind, data_files=str(path), streaming=True)
    return table(guard(load, name, kind), name, fields)


def _without_rows(path: Path) -> bool:
    """True for a whole parquet file of no rows; damaged ones are left to the reader."""
    import pyarrow.parquet

    try:
        return bool(pyarrow.parquet.read_metadata(path).num_rows == 0)
    except (OSError, ValueError):
        return False


def table_folder(path: Path, name: str, fields: Fields) -> Iterator[RawFrame]:
    """Rows of a folder of tables, or of one written by ``Dataset.save_to_disk``.

    Raises:
        DataError: it holds no table, or one that cannot be read.
    """
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return table(guard(lambda: datasets.load_from_disk(str(path)), name, "arrow"), name, fields)
    if not any(kind_of(p) for p in path.rglob("*") if p.is_file()):
        raise DataError(
            "the folder holds no parquet, arrow or json table",
            file=name,
            remedy=f"for structure files write a pattern such as '{name.rstrip('/')}/*.xyz'",
        )
    load = lambda: datasets.load_dataset(str(path), streaming=True)
    return table(guard(load, name, "a folder of tables"), name, fields)


def hub_frames(
    name: str, fields: Fields, *, config: str | None = None, revision: str | None = None, stream: bool = False
) -> Iterator[RawFrame]:
    """All frames of a data set on the Hugging Face hub.

    Args:
        name: ``organisation/name``.
        fields: explicit names of columns.
        config: configuration (subset) of the set.
        revision: branch, tag or commit.
        stream: read over the network as rows are asked for, instead of downloading first.

    Raises:
        DataError: no network, no such set, or no access.
    """
    return table(load_hub(name, config=config, revision=revision, stream=stream), name, fields)


def table(loaded: Any, name: str, fields: Fields) -> Iterator[RawFrame]:
    """Rows of a (streamed or memory-mapped) table, or of a dict of them, one per split.

    A format that the table was saved with (``with_format("torch")``) would give numbers of 32 bits and
    hide columns: it is taken off.
    """
    loaded = loaded.with_format(None)
    parts = dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}
    # One lone split is called "train" by default, which says nothing about its use.
    named = len(parts) > 1
    for split, rows in parts.items():
        yield from rows_of(_every_row(rows), name, str(split) if named else "", fields)


def _every_row(rows: Any) -> Iterable[dict[str, Any]]:
    """All rows, in a worker of a ``DataLoader`` too.

    A streamed set that is iterated there gives each worker the rows of its own files, and none where it
    has fewer files than there are workers; ``iter`` does not look for workers.
    """
    if not isinstance(rows, datasets.IterableDataset):
        return cast("Iterable[dict[str, Any]]", rows)
    return ({name: column[0] for name, column in one.items()} for one in rows.iter(batch_size=1))


def rows_of(rows: Iterable[dict[str, Any]], name: str, split: str, fields: Fields) -> Iterator[RawFrame]:
    """Raw frames of plain rows; what a vendor's reader raises becomes a DataError with the row."""
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
            raise unreadable(label, error, "table", frame) from error
        if not isinstance(row, Mapping):
            raise DataError(
                f"a row is a record with names, this is '{str(row)[:40]}'",
                file=label,
                frame=frame,
                remedy="see the schema of tables in docs/data.md",
            )
        yield from_row(dict(row), label, split, frame, fields)
        frame += 1


# ---- json --------------------------------------------------------------------------------------


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Records of JSON lines, of a list, of a dict of columns, or of records nested by id."""
    with open_with_compression(str(path), "rt") as file:
        first, rest = _first_line(file)
        record = _try(first)
        if isinstance(record, dict) and (_is_record(record) or rest.strip()):
            yield record
            for line in chain([rest], file):
                if line.strip():
                    yield json.loads(line)
            return
        tree = json.loads(first + rest + file.read())
    if isinstance(tree, list):
        yield from tree
    elif isinstance(tree, dict):
        yield from _records(tree, ())
    else:
        raise TypeError("neither records nor a list of records")


def _first_line(file: IO[str]) -> tuple[str, str]:
    """The first line that is not blank, and the one after it."""
    first = next((line for line in file if line.strip()), "")
    return first, next((line for line in file if line.strip()), "")


def _try(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _is_record(tree: Mapping[str, Any]) -> bool:
    """A single structure: a pymatgen one, or numbers that are not a table of columns."""
    if isinstance(tree.get("structure"), dict):
        return True
    flat = flatten(tree)
    numbers = next((flat[n] for n in STRUCTURE["numbers"] if n in flat), None)
    return isinstance(numbers, list) and bool(numbers) and not isinstance(numbers[0], list)


def _records(tree: Mapping[str, Any], ids: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Records of ``{id: {id: record}}``, the outermost id as group; or rows of a dict of columns."""
    if _is_record(tree):
        yield dict(tree) | ({"group": ids[0]} if len(ids) > 1 and "group" not in tree else {})
    elif tree and all(isinstance(v, Mapping) for v in tree.values()):
        for key, value in tree.items():
            yield from _records(value, (*ids, key))
    elif tree and all(isinstance(v, list) for v in tree.values()):
        sizes = {key: len(value) for key, value in tree.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"columns of different length: {sizes}")
        for values in zip(*tree.values(), strict=True):
            yield dict(zip(tree, values, strict=True))
    else:
        raise ValueError("neither records nor columns of equal length")


# ---- rows --------------------------------------------------------------------------------------


def from_row(
    row: dict[str, Any], name: str, split: str, frame: int, fields: Fields, layout: Layout | None = None
) -> RawFrame:
    """A raw frame of one row; its structure's columns are taken out of the values.

    Args:
        row: names and values; nested records become dotted names.
        name: of the source.
        split: that the row belongs to, or ``""``.
        frame: number of the row.
        fields: explicit names (``data.fields``).
        layout: if it is known already.

    Raises:
        DataError: no structure in it.
    """
    values = {k: v for k, v in flatten(row).items() if not (isinstance(v, str) and not v.strip())}
    layout = layout or recognise(set(values))
    for own in ("source", "frame", "mapping"):
        values.pop(own, None)
    if layout.name == "blip_ft":  # elsewhere a column of this name may be anything, a mass for instance
        values["config_weight"] = values.pop("weight")
    if split and not values.get("split"):
        values["split"] = split
    used: set[str] = set()
    try:
        if values.get("structure") is not None and "numbers" not in fields:
            structure = values.pop("structure")
            species, positions, cell, pbc = from_pymatgen(structure)
            if values.get("charge") is None and (charge := pymatgen_charge(structure)) is not None:
                values["charge"] = charge
        else:
            species = _take(values, "numbers", fields, used, name, frame)
            positions = _take(values, "positions", fields, used, name, frame)
            cell = _take(values, "cell", fields, used, name, frame, required=False)
            pbc = _take(values, "pbc", fields, used, name, frame, required=False)
        lattice = np.zeros((3, 3)) if cell is None else np.asarray(cell, dtype=np.float64)
        lattice = lattice.reshape(3, 3) if lattice.size == 9 else lattice
        periodic = np.asarray(bool(lattice.any()) if pbc is None else pbc, dtype=bool)
        return RawFrame(
            numbers=to_numbers(species),
            positions=_squeezed(positions),
            cell=lattice,
            pbc=np.broadcast_to(periodic[0] if periodic.shape == (1, 3) else periodic, (3,)),
            values=values,
            source=name,
            frame=frame,
            layout=layout,
            used=frozenset(used),
            converged=not says_no(values),
        )
    except (TypeError, ValueError) as error:
        raise DataError(
            f"not a structure: {error}",
            file=name,
            frame=frame,
            field="numbers, positions, cell or pbc",
            remedy=symbol_remedy(error.symbol)
            if isinstance(error, UnknownSymbolError)
            else "numbers (n,), positions (n, 3) Å, cell (3, 3) Å and pbc (3,) make a structure; other names "
            "of these columns go into data.fields (docs/data.md)",
        ) from error


def _squeezed(positions: Any) -> Any:
    """(n, 3) float64; a flat list of 3n numbers is cut into rows."""
    array = np.asarray(positions, dtype=np.float64)
    return array.reshape(-1, 3) if array.ndim == 1 and array.size % 3 == 0 else array


def _take(
    values: dict[str, Any],
    key: str,
    fields: Fields,
    used: set[str],
    file: str,
    frame: int,
    *,
    required: bool = True,
) -> Any:
    """Take one column of the structure out of a row."""
    names = (fields[key],) if key in fields else STRUCTURE[key]
    for name in names:
        if values.get(name) is not None:
            used.add(name)
            return parsed(values.pop(name))
    if required:
        others = f" (nor {', '.join(names[1:])})" if len(names) > 1 else ""
        raise DataError(
            f"no column '{names[0]}'{others}; there are: {', '.join(sorted(values))}",
            file=file,
            frame=frame,
            field=key,
            remedy=f"say which column it is, data.fields: {{{key}: NAME}}; see docs/data.md",
        )
    return None
