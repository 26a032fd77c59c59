"""Sources: what a recipe names, read into one Hugging Face data set with the written schema.

A source is, optionally followed by ``@selector``,

- a file that ASE reads (extended XYZ, trajectories, OUTCAR, ...), compressed or not;
- fairchem's LMDB database (``.aselmdb``), or a folder of these;
- a parquet, arrow or json file, or a folder of these or saved by ``Dataset.save_to_disk``;
- an ``.npz`` archive of many frames;
- a pattern such as ``runs/*.xyz``;
- the name of an embedded set (:data:`blip_ft.data.read.embedded.SETS`);
- a hub id ``organisation/name``;
- a :class:`blip_ft.config.SourceConfig`: one of these with options of its own;

or a list of these. A selector is the name of a split (``@validation``) or a slice in ASE's way
(``@0:50``, ``@::2``, ``@-1``), which applies to each file. Frames that are not selected need no
labels. What was read is cached by the hash of the file's content and of all options.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import datasets
import numpy as np

from blip_ft.config import Source
from blip_ft.data.read import files as readers
from blip_ft.data.read import tables, units
from blip_ft.data.read.hub import cached_dataset
from blip_ft.data.read.plan import LabelOptions, ReadPlan, plan
from blip_ft.data.read.raw import check_geometry
from blip_ft.data.read.schema import FEATURES, Mapper, RawFrame, canonical_split
from blip_ft.data.read.set_aside import is_example
from blip_ft.data.read.unused import without_marks
from blip_ft.errors import DataError, nearest

_SLICE = re.compile(r"-?\d+|(?:-?\d+)?:(?:-?\d+)?(?::(?:-?\d+)?)?")


def load_source(spec: Source, *, labels: bool = True, **options: Unpack[LabelOptions]) -> datasets.Dataset:
    """Read one source, or several one after the other.

    Args:
        spec: see the module's description.
        labels: refuse frames that have neither energy nor forces.
        options: of the labels: :class:`blip_ft.data.read.plan.LabelOptions`.

    Returns:
        A data set with the columns of :data:`blip_ft.data.read.schema.FEATURES`, memory-mapped where
        it was read from files.

    Raises:
        DataError: missing, empty, truncated or unreadable file, bad selector, bad labels.
    """
    parts = [
        cached_dataset(_rows, FEATURES, reading=reading) for reading in plan(spec, labels=labels, **options)
    ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def iterate_source(
    spec: Source, *, labels: bool = True, **options: Unpack[LabelOptions]
) -> Iterator[dict[str, Any]]:
    """The same rows one by one, without a cache: for sources larger than the disk.

    Args:
        spec: as for :func:`load_source`.
        labels: refuse frames that have neither energy nor forces.
        options: of the labels.

    Raises:
        DataError: as for :func:`load_source`, when the row is reached.
    """
    for reading in plan(spec, labels=labels, digest=False, **options):
        yield from _rows(reading)


def iterate_frames(spec: Source) -> Iterator[RawFrame]:
    """Structures of a source as they are, one by one; labels are not looked at.

    Args:
        spec: as for :func:`load_source`.

    Raises:
        DataError: as for :func:`load_source`, and a structure that is none; when it is reached.
    """
    for reading in plan(spec, labels=False, digest=False):
        for raw in unchecked_frames(reading, broken=False):
            check_geometry(raw)
            yield raw


def unchecked_frames(reading: ReadPlan, *, broken: bool) -> Iterator[RawFrame]:
    """Frames of a reading as they are, whether there is a structure in them or not (``check_geometry`` tells).

    Args:
        reading: what to read; its labels are not looked at.
        broken: also frames that cannot be parsed, where the reader knows where the next one begins.

    Raises:
        DataError: as for :func:`load_source`.
    """
    yield from _frames(reading, Mapper({}, units.factors({}), require_labels=False), broken=broken)


def file_rows(reading: ReadPlan) -> Iterator[dict[str, Any]]:
    """The examples of one file of a reading, lists in place of arrays; other files may have further labels."""
    for row in _rows(reading, whole=False):
        if is_example(row):
            yield plain_row(row)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with lists in place of arrays."""
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}


def mappings(dataset: datasets.Dataset, *, paths: bool = True) -> list[str]:
    """How labels were found, one sentence for each source: ``a.xyz: MACE: energy <- REF_energy, ...``.

    Args:
        dataset: rows of the schema.
        paths: name files with their folders.
    """
    found: dict[tuple[str, str], None] = {}
    for source, mapping in zip(dataset["source"], dataset["mapping"], strict=True):
        found.setdefault((source, without_marks(mapping)))
    many = 4  # the files of a pattern mostly agree: one line then
    by_text: dict[str, list[str]] = {}
    for source, mapping in found:
        by_text.setdefault(mapping, []).append(source if paths else Path(source).name)
    return [
        f"{', '.join(sources[:many])}{f' and {len(sources) - many} more' if len(sources) > many else ''}: {text}"
        for text, sources in by_text.items()
    ]


def _rows(reading: ReadPlan, *, whole: bool = True) -> Iterator[dict[str, Any]]:
    """Rows of the schema; the generator behind :func:`load_source`.

    Args:
        reading: what to read.
        whole: complain of a label that the recipe names and no frame has.
    """
    fields, given = dict(reading.fields), dict(reading.units)
    mapper = Mapper(
        fields,
        units.factors(given),
        require_labels=reading.labels,
        given=frozenset(given),
        stress_order=reading.stress_order,
        energy_offset=reading.energy_offset,
    )
    names: set[str] = set()
    for raw in _frames(reading, mapper):
        names |= set(raw.values)
        yield mapper.row(raw)
    if whole:
        mapper.finish(reading.source, names)


def _frames(reading: ReadPlan, mapper: Mapper, *, broken: bool = False) -> Iterator[RawFrame]:
    """The frames of a reading that its selector names.

    Raises:
        DataError: there are none.
    """
    fields = dict(reading.fields)
    files: Iterable[Iterator[RawFrame]] = (
        (readers.read_frames(Path(path), name, fields, broken=broken) for path, name in reading.paths)
        if reading.paths
        else (tables.hub_frames(reading.source, fields, **dict(reading.hub)) for _ in range(1))
    )
    count = 0
    splits: set[str] = set()
    for file in files:
        for raw in _selected(file, reading.selector, mapper, splits):
            yield raw
            count += 1
    if not count:
        raise _nothing(reading, splits)


def _selected(
    frames: Iterator[RawFrame], selector: str, mapper: Mapper, splits: set[str]
) -> Iterator[RawFrame]:
    """The frames of one file that the selector names; collects the names of all splits seen."""
    if not selector:
        yield from frames
    elif _SLICE.fullmatch(selector):
        yield from _sliced(frames, selector)
    else:
        wanted = canonical_split(selector)
        for raw in frames:
            split = mapper.split(raw)
            splits.add(split)
            if split == wanted:
                yield raw


def _sliced(frames: Iterator[RawFrame], selector: str) -> Iterator[RawFrame]:
    parts = [int(p) if p else None for p in selector.split(":")]
    if len(parts) == 1:
        index = parts[0] or 0
        parts = [index, index + 1 if index != -1 else None]
    start, stop, step = (*parts, None, None)[:3]
    if step == 0:
        raise DataError(f"'{selector}' has step 0", field="data", remedy="write start:stop:step")
    if any(p is not None and p < 0 for p in (start, stop, step)):
        return iter(list(frames)[start:stop:step])  # counted from the end: the length is needed
    return islice(frames, start, stop, step)


def _nothing(reading: ReadPlan, splits: set[str]) -> DataError:
    if not reading.selector:
        return DataError("there are no frames in it", file=reading.source, remedy="give a file with frames")
    if _SLICE.fullmatch(reading.selector):
        return DataError(
            f"'{reading.selector}' selects no frame", file=reading.source, remedy="check the slice"
        )
    known = sorted(splits - {""})
    return DataError(
        f"no frame is of the split '{reading.selector}'",
        file=reading.source,
        field="split",
        remedy=nearest(reading.selector, known) if known else "the source names no splits: use a slice",
    )
