"""Structures that a model is verified on: few of those that it was trained on, and how hot these were."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import ase.io
import datasets
import numpy as np
from ase import Atoms

from blip_ft.backbones import electrons
from blip_ft.data.frame import to_atoms
from blip_ft.data.neighbours import contact
from blip_ft.data.read.sources import iterate_frames
from blip_ft.errors import DataError
from blip_ft.files import whole_path
from blip_ft.verify.contacts import INSIDE

#: in a run's folder: the frames that its model was verified on
KEPT = "verify.extxyz"
#: key of ``Atoms.info``, K
TEMPERATURE = "temperature"
#: K, where nothing says how hot the data are
DEFAULT_TEMPERATURE = 500.0
#: frames that are kept
MOST = 3
_KELVIN = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?) ?K(?![A-Za-z0-9])")


def training_frames(rows: datasets.Dataset) -> list[Atoms]:
    """A few of the frames that a model was trained on, with the highest temperature that any group of all names.

    Args:
        rows: of the schema.
    """
    named = [t for group in set(rows["group"]) for t in temperatures_in(str(group or ""))]
    frames = [to_atoms(rows[i], labels=False) for i in _chosen(rows["numbers"])]
    return _heated(frames, named)


def frames_of(source: str) -> list[Atoms]:
    """A few of the frames of any source that recipes read, with the highest temperature that any of them has.

    That is ``temperature`` (K), names such as ``quartz-900K``, or velocities.

    Raises:
        DataError: it cannot be read, or atoms lie on each other.
    """
    frames: list[Atoms] = []
    named: list[float] = []
    for raw in iterate_frames(source):
        atoms = Atoms(raw.numbers, positions=raw.positions, cell=raw.cell, pbc=raw.pbc)
        atoms.info = dict(electrons.given(raw.values))
        if (closest := contact(atoms)) < INSIDE / 2:
            raise DataError(
                f"two atoms are at {100 * closest:.0f} % of their bond length",
                file=raw.source,
                frame=raw.frame,
                field="positions",
                remedy="give structures without overlapping atoms",
            )
        frames.append(atoms)
        named += _temperatures(raw.values)
        if raw.atoms is not None and raw.atoms.has("momenta"):
            named.append(float(raw.atoms.get_temperature()))
    return _heated([frames[i] for i in _chosen([a.numbers for a in frames])], named)


def _temperatures(values: dict[str, object]) -> Iterable[float]:
    """Those that a frame names, K."""
    for key, value in values.items():
        if key.lower() == TEMPERATURE and isinstance(value, int | float | np.number):
            yield float(value)
        elif isinstance(value, str):
            yield from temperatures_in(value)


def temperatures_in(text: str) -> list[float]:
    """Temperatures in a name such as ``quartz-900K-0``, K."""
    return [float(t) for t in _KELVIN.findall(text)]


def _heated(frames: list[Atoms], named: Sequence[float]) -> list[Atoms]:
    """Frames that say the highest of some temperatures."""
    found = [t for t in named if np.isfinite(t) and t > 0]
    for atoms in frames if found else ():
        atoms.info[TEMPERATURE] = max(found)
    return frames


def _chosen(numbers: Sequence[Sequence[int]]) -> list[int]:
    """The smallest of those with most elements, then the smallest that bring others: together they hold every element,
    as far as :data:`MOST` can.
    """
    order = sorted(range(len(numbers)), key=lambda i: (-len(set(numbers[i])), len(numbers[i])))
    out: list[int] = []
    seen: set[int] = set()
    for i in order:
        if len(out) < MOST and not set(numbers[i]) <= seen:
            out.append(i)
            seen |= set(numbers[i])
    return out


def temperature_of(frames: Sequence[Atoms]) -> float | None:
    """What the frames say, K."""
    return max((float(a.info[TEMPERATURE]) for a in frames if TEMPERATURE in a.info), default=None)


def keep_frames(frames: Sequence[Atoms], folder: Path) -> None:
    """Write :data:`KEPT` into a run's folder."""
    with whole_path(folder / KEPT) as path:
        ase.io.write(path, list(frames), format="extxyz")


def kept_frames(folder: Path) -> list[Atoms] | None:
    """What :func:`keep_frames` has written; ``None`` where it has not."""
    path = folder / KEPT
    return list(ase.io.read(path, index=":", format="extxyz")) if path.is_file() else None


def neutral(frames: Sequence[Atoms]) -> dict[str, object]:
    """Charge and spin of structures that are made up beside these: neutral singlets, where the frames have any."""
    values = {"charge": 0, "spin": 1}
    return {k: values[k] for k in electrons.KEYS if any(k in a.info for a in frames)}
