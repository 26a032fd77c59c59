"""What has to be read for a source: its files, selector, contents and options.

:mod:`blip_ft.data.read.sources` says what a source is, and reads it.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from blip_ft.config import DataConfig, Source, SourceConfig
from blip_ft.data.read import embedded, tables, units
from blip_ft.data.read import files as readers
from blip_ft.data.read.hub import load_hub
from blip_ft.data.read.schema import SCHEMA_VERSION
from blip_ft.errors import DataError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: endings of a name that is certainly meant as a file, not as a hub id
_FILE_ENDINGS = frozenset(
    {".xyz", ".extxyz", ".gz", ".bz2", ".xz", ".traj", ".db", ".cif", ".vasp", ".xml", ".out", ".zip", ".npz"}
    | set(tables.TABLES)
    | readers.LMDB
)


class LabelOptions(TypedDict, total=False):
    """How the labels of a source are read; keyword arguments of what reads one.

    Attributes:
        fields: names of labels where they are not found by themselves (``data.fields``).
        units: units of the source (``data.units``).
        stress_order: ``ase``, the default, or ``vasp`` (``data.stress_order``).
        energy_offset: taken off every total energy, in its own unit (``data.energy_offset``).
    """

    fields: Mapping[str, str] | None
    units: Mapping[str, str] | None
    stress_order: str
    energy_offset: float


@dataclass(frozen=True)
class ReadPlan:
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


def plan(
    spec: Source, *, labels: bool = True, digest: bool = True, **options: Unpack[LabelOptions]
) -> list[ReadPlan]:
    """What has to be read for a source; opens no more than it needs to identify the files.

    Args:
        spec: see :mod:`blip_ft.data.read.sources`.
        labels: refuse frames that have neither energy nor forces.
        digest: hash the contents of the files (for the cache).
        options: of the labels; those of a :class:`blip_ft.config.SourceConfig` come first.

    Raises:
        DataError: no source, no such file, bad unit.
    """
    specs = list(spec) if isinstance(spec, list) else [spec]
    if not specs:
        raise DataError("no source is given", field="data", remedy="name at least one file or set")
    return [
        _plan(one if isinstance(one, SourceConfig) else SourceConfig(path=one), labels, digest, options)
        for one in specs
    ]


def label_options(config: DataConfig) -> LabelOptions:
    """The recipe's own options of labels."""
    return {
        "fields": config.fields,
        "units": {str(k): v for k, v in config.units.items()},
        "stress_order": config.stress_order,
        "energy_offset": config.energy_offset,
    }


def as_text(spec: Source) -> str:
    """A source as the user wrote it, for messages."""
    if isinstance(spec, list):
        return ", ".join(as_text(one) for one in spec)
    return spec if isinstance(spec, str) else spec.path


def _plan(spec: SourceConfig, labels: bool, digest: bool, options: LabelOptions) -> ReadPlan:
    own_fields = (options.get("fields") or {}) if spec.fields is None else spec.fields
    own_units = (
        (options.get("units") or {}) if spec.units is None else {str(k): v for k, v in spec.units.items()}
    )
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
    hub = {k: v for k in ("config", "revision", "stream") if (v := getattr(spec, k))}
    if hub and paths:
        raise DataError(
            f"{', '.join(hub)}: only a set on the hub has that",
            file=source,
            remedy="remove the option, or give a hub id organisation/name",
        )
    if not digest:
        content = ""
    elif paths:
        content = _digest([p for p, _ in paths])
    else:
        content = str(_hub_fingerprint(source, hub))
    return ReadPlan(
        source=source,
        paths=tuple((str(p), name) for p, name in paths),
        digest=content,
        selector=selector,
        fields=tuple(sorted(own_fields.items())),
        units=tuple(sorted(own_units.items())),
        labels=labels,
        stress_order=spec.stress_order or options.get("stress_order", "ase"),
        energy_offset=options.get("energy_offset", 0.0) if spec.energy_offset is None else spec.energy_offset,
        hub=tuple(sorted(hub.items())),
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
