"""Sources: what a recipe names, read into one Hugging Face data set with the written schema.

A source is, optionally followed by ``@selector``,

- a file that ASE reads (extended XYZ, trajectories, OUTCAR, ...), compressed or not;
- fairchem's LMDB database (``.aselmdb``), or a folder of these;
- a parquet, arrow or json file, or a folder of these or saved by ``Dataset.save_to_disk``;
- an ``.npz`` archive of many frames;
- a pattern such as ``runs/*.xyz``;
- the name of an embedded set (:data:`blip_ft.data.embedded.SETS`);
- a hub id ``organisation/name``;
- a :class:`blip_ft.config.SourceConfig`: one of these with options of its own;

or a list of these. A selector is the name of a split (``@validation``) or a slice in ASE's way
(``@0:50``, ``@::2``, ``@-1``), which applies to each file. Frames that are not selected need no
labels. What was read is cached by the hash of the file's content and of all options.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from blip_ft.config import Source, SourceConfig
from blip_ft.data import embedded, readers, tables, units
from blip_ft.data.hub import cached_dataset, load_hub
from blip_ft.data.schema import FEATURES, SCHEMA_VERSION, Mapper, RawFrame, canonical_split
from blip_ft.errors import DataError, nearest

_SLICE = re.compile(r"-?\d+|(?:-?\d+)?:(?:-?\d+)?(?::(?:-?\d+)?)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: endings of a name that is certainly meant as a file, not as a hub id
_FILE_ENDINGS = frozenset(
    {".xyz", ".extxyz", ".gz", ".bz2", ".xz", ".traj", ".db", ".cif", ".vasp", ".xml", ".out", ".zip", ".npz"}
    | set(tables.TABLES)
    | readers.LMDB
)


@dataclass(frozen=True)
class Reading:
    """Everything that the rows of one source depend on; its hash is the key of the cache.

    Attributes:
        source: as the user wrote it, without the selector.
        paths: (path, name for messages) of each file; empty for a hub id.
        digest: SHA-256 of the contents.
        selector: split name or slice, or ``""``.
        fields: explicit names of labels.
        units: units of the source.
        labels: frames must have labels.
        stress_order: of six stress components.
        energy_offset: taken off every total energy.
        hub: options of a hub set (``config``, ``revision``, ``stream``).
        version: of the schema.
    """

    source: str
    paths: tuple[tuple[str, str], ...]
    digest: str
    selector: str
    fields: tuple[tuple[str, str], ...]
    units: tuple[tuple[str, str], ...]
    labels: bool
    stress_order: str = "ase"
    energy_offset: float = 0.0
    hub: tuple[tuple[str, Any], ...] = ()
    version: int = SCHEMA_VERSION


def load_source(
    spec: Source,
    *,
    fields: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    labels: bool = True,
    stress_order: str = "ase",
    energy_offset: float = 0.0,
) -> datasets.Dataset:
    """Read one source, or several one after the other.

    Args:
        spec: see the module's description.
        fields: names of labels where they are not found by themselves (``data.fields``).
        units: units of the source (``data.units``).
        labels: refuse frames that have neither energy nor forces.
        stress_order: ``ase`` or ``vasp`` (``data.stress_order``).
        energy_offset: taken off every total energy, in its own unit (``data.energy_offset``).

    Returns:
        A data set with the columns of :data:`blip_ft.data.schema.FEATURES`, memory-mapped where
        it was read from files.

    Raises:
        DataError: missing, empty, truncated or unreadable file, bad selector, bad labels.
    """
    readings = plan(
        spec,
        fields=fields,
        units=units,
        labels=labels,
        stress_order=stress_order,
        energy_offset=energy_offset,
    )
    parts = [cached_dataset(_rows, FEATURES, reading=reading) for reading in readings]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def iterate_source(
    spec: Source,
    *,
    fields: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    labels: bool = True,
    stress_order: str = "ase",
    energy_offset: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """The same rows one by one, without a cache: for sources larger than the disk.

    Args:
        spec: as for :func:`load_source`, like all that follow.
        fields: names of labels.
        units: units of the source.
        labels: refuse frames that have neither energy nor forces.
        stress_order: ``ase`` or ``vasp``.
        energy_offset: taken off every total energy.

    Raises:
        DataError: as for :func:`load_source`, when the row is reached.
    """
    for reading in plan(
        spec,
        fields=fields,
        units=units,
        labels=labels,
        stress_order=stress_order,
        energy_offset=energy_offset,
        digest=False,
    ):
        yield from _rows(reading)


def file_rows(reading: Reading) -> Iterator[dict[str, Any]]:
    """The rows of one file of a reading, lists in place of arrays; other files may have further labels."""
    for row in _rows(reading, whole=False):
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
        found.setdefault((source, mapping))
    many = 4  # the files of a pattern mostly agree: one line then
    by_text: dict[str, list[str]] = {}
    for source, mapping in found:
        by_text.setdefault(mapping, []).append(source if paths else Path(source).name)
    return [
        f"{', '.join(sources[:many])}{f' and {len(sources) - many} more' if len(sources) > many else ''}: {text}"
        for text, sources in by_text.items()
    ]


def plan(
    spec: Source,
    *,
    fields: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    labels: bool = True,
    stress_order: str = "ase",
    energy_offset: float = 0.0,
    digest: bool = True,
) -> list[Reading]:
    """What has to be read for a source; opens no more than it needs to identify the files.

    Args:
        spec: as for :func:`load_source`, like all that follow.
        fields: names of labels.
        units: units of the source.
        labels: refuse frames that have neither energy nor forces.
        stress_order: ``ase`` or ``vasp``.
        energy_offset: taken off every total energy.
        digest: hash the contents of the files (for the cache).

    Raises:
        DataError: no source, no such file, bad unit.
    """
    specs = list(spec) if isinstance(spec, list) else [spec]
    if not specs:
        raise DataError("no source is given", field="data", remedy="name at least one file or set")
    return [
        _plan(
            one if isinstance(one, SourceConfig) else SourceConfig(path=one),
            fields or {},
            units or {},
            labels,
            stress_order,
            energy_offset,
            digest,
        )
        for one in specs
    ]


def as_text(spec: Source) -> str:
    """A source as the user wrote it, for messages."""
    if isinstance(spec, list):
        return ", ".join(as_text(one) for one in spec)
    return spec if isinstance(spec, str) else spec.path


def fingerprint(dataset: datasets.Dataset) -> str:
    """SHA-256 of structures and labels in their order, whatever file they came from.

    Numbers count to 1e-6 (Å, eV, eV/Å, eV/Å^3), so that a set has one fingerprint in text and
    binary formats.
    """
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(np.asarray(row["numbers"], dtype="<i8").tobytes())
        for column in ("positions", "cell", "energy", "forces", "stress"):
            digest.update(b"-" if row[column] is None else grid(row[column], 1e-6).tobytes())
        digest.update(bytes(row["pbc"]))
    return digest.hexdigest()


def grid(values: Any, step: float) -> Any:
    """Integers ``values/step``, shifted so that decimal numbers stay away from the rounding edge.

    Without the shift 1.0000005 is rounded up or down by its last bit, and two readers disagree.
    """
    shifted = np.asarray(values, dtype=np.float64) / step + 0.3183098861837907
    return np.floor(shifted).astype("<i8")


def _plan(
    spec: SourceConfig,
    fields: Mapping[str, str],
    unit_names: Mapping[str, str],
    labels: bool,
    stress_order: str,
    energy_offset: float,
    digest: bool,
) -> Reading:
    own_fields = fields if spec.fields is None else spec.fields
    own_units = unit_names if spec.units is None else {str(k): v for k, v in spec.units.items()}
    units.factors(own_units)  # a bad unit is reported before a file is opened
    source, selector = split_selector(spec.path)
    if spec.split:
        if selector:
            raise DataError(
                f"'{spec.path}' has a selector and the option split={spec.split}",
                field="data",
                remedy="give one of them",
            )
        selector = spec.split
    paths = _paths(source)
    options = {k: v for k in ("config", "revision", "stream") if (v := getattr(spec, k))}
    if options and paths:
        raise DataError(
            f"{', '.join(options)}: only a set on the hub has that",
            file=source,
            remedy="remove the option, or give a hub id organisation/name",
        )
    if not digest:
        content = ""
    elif paths:
        content = _digest([p for p, _ in paths])
    else:
        content = str(_hub_fingerprint(source, options))
    return Reading(
        source=source,
        paths=tuple((str(p), name) for p, name in paths),
        digest=content,
        selector=selector,
        fields=tuple(sorted(own_fields.items())),
        units=tuple(sorted(own_units.items())),
        labels=labels,
        stress_order=spec.stress_order or stress_order,
        energy_offset=energy_offset if spec.energy_offset is None else spec.energy_offset,
        hub=tuple(sorted(options.items())),
    )


def split_selector(spec: str) -> tuple[str, str]:
    """``("runs/a.xyz", "0:50")`` of ``runs/a.xyz@0:50``; a path that exists is not divided.

    Raises:
        DataError: nothing before or after the ``@``.
    """
    if "@" not in spec or Path(spec).exists():
        source, selector, at = spec, "", ""
    else:
        source, at, selector = spec.rpartition("@")
    if not source.strip() or (at and not selector):
        raise DataError(
            f"cannot read the source '{spec}'",
            remedy="write path, path@split or path@start:stop:step",
            field="data",
        )
    return source, selector


def _paths(source: str) -> list[tuple[Path, str]]:
    """Files of a source with their names for messages; none for a hub id."""
    if source in embedded.SETS:
        return [(embedded.path(source), source)]
    path = Path(source).expanduser()
    if path.exists():
        return [(path, os.fsencode(source).decode("utf-8", "replace"))]
    if glob.has_magic(source):
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (Path has no absolute patterns)
        if not found:
            raise DataError("no file matches this pattern", file=source, remedy="check the pattern")
        # Arrow holds UTF-8 only; a name in another encoding is shown with replacement characters.
        return [(Path(p), os.fsencode(p).decode("utf-8", "replace")) for p in found]
    hub = _HUB_ID.fullmatch(source) is not None
    if hub and path.suffix.lower() not in _FILE_ENDINGS and not path.parent.exists():
        return []
    raise DataError(
        "there is no such file or folder",
        file=source,
        remedy=f"check the path; embedded sets: {', '.join(embedded.SETS)}",
    )


def _hub_fingerprint(source: str, options: Mapping[str, Any]) -> str:
    table = load_hub(source, **options)
    parts = table if isinstance(table, Mapping) else {"": table}
    return ",".join(f"{split}={part._fingerprint}" for split, part in parts.items())


def _digest(paths: list[Path]) -> str:
    """SHA-256 over the contents of files and of everything in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            try:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(
                    f"cannot be opened: {error.strerror or error}",
                    file=str(file),
                    remedy="check that you may read it",
                ) from error
            digest.update(str(file.relative_to(path)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _rows(reading: Reading, *, whole: bool = True) -> Iterator[dict[str, Any]]:
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
    files: Iterable[Iterator[RawFrame]] = (
        (readers.read_frames(Path(path), name, fields) for path, name in reading.paths)
        if reading.paths
        else (tables.hub_frames(reading.source, fields, **dict(reading.hub)) for _ in range(1))
    )
    count = 0
    splits: set[str] = set()
    names: set[str] = set()
    for file in files:
        for raw in _selected(file, reading.selector, mapper, splits):
            names |= set(raw.values)
            yield mapper.row(raw)
            count += 1
    if not count:
        raise _nothing(reading, splits)
    if whole:
        mapper.finish(reading.source, names)


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


def _nothing(reading: Reading, splits: set[str]) -> DataError:
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
