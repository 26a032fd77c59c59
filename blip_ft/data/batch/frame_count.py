"""How many frames a source has, where that can be told faster than by reading them: for the time that work has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ase.io
from ase.io.formats import filetype, open_with_compression

from blip_ft.data.batch.shards import length
from blip_ft.data.read.plan import ReadPlan


def count_frames(readings: Sequence[ReadPlan]) -> int | None:
    """Frames of all readings, or ``None`` if only reading them would tell.

    Args:
        readings: files of extended XYZ, ASE trajectories, parquet, ASE's databases; a slice as the selector.
    """
    total = 0
    for reading in readings:
        if not reading.paths:
            return None
        for path in reading.paths:
            n = _of_file(replace(reading, paths=(path,), selector=""))
            if n is None:
                return None
            if reading.selector:
                chosen = _chosen(n, reading.selector)
                if chosen is None:
                    return None
                n = chosen
            total += n
    return total


def _of_file(reading: ReadPlan) -> int | None:
    path = Path(reading.paths[0][0])
    try:
        known = length(reading)
        if known is not None or not path.is_file():
            return known
        kind = filetype(str(path), read=True)
        if kind == "extxyz":
            return _of_extxyz(path)
        if kind == "traj":
            with ase.io.Trajectory(str(path)) as trajectory:  # type: ignore[no-untyped-call]
                return len(trajectory)
    except Exception:  # noqa: BLE001 what is wrong with a file is told by its reader, when it comes to the frame
        return None
    return None


def _of_extxyz(path: Path) -> int:
    """By the numbers of atoms that frames begin with; their lines are not parsed."""
    frames = 0
    with open_with_compression(str(path), "rb") as file:
        while line := file.readline():
            if line.strip().isdigit():
                frames += 1
                for _ in range(int(line) + 1):
                    file.readline()
    return frames


def _chosen(n: int, selector: str) -> int | None:
    """Frames of ``n`` that a slice selects; ``None`` for the name of a split."""
    try:
        parts = [int(p) if p else None for p in selector.split(":")]
    except ValueError:
        return None
    if len(parts) == 1:
        first = parts[0] or 0
        return len(range(n)[first : first + 1 or None])
    return len(range(n)[slice(*parts)])
