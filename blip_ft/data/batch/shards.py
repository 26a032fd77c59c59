"""Files of a stream divided into lanes, so that a worker or a rank reads its own files only.

Lanes form a grid of groups and parts. A step takes its batch from one group (the step's number modulo the
number of groups), a piece from each of its parts. Workers take turns with the steps, so each reads the
groups of its own steps; ranks share the parts of a step. The grid depends on the files, their numbers of
frames and the size of the batch of all ranks, never on how many workers and ranks there are, and so the
batches do not either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from blip_ft.data.frame import FrameRow
from blip_ft.data.read.files import LMDB, open_lmdb
from blip_ft.data.read.plan import ReadPlan
from blip_ft.data.read.problems import unreadable
from blip_ft.data.read.sources import file_rows
from blip_ft.errors import DataError

#: (groups, parts) that are tried, the largest first: 12 is divisible by 2, 3, 4 and 6 workers
GRIDS = ((12, 4), (12, 2), (6, 2), (4, 2), (2, 2), (2, 1))
#: largest lane over smallest: beyond it, batches would differ too much in size
UNEVEN = 1.5


@dataclass(frozen=True)
class Shard:
    """Rows that are read one after the other.

    Attributes:
        files: opens each file; the order of the files is drawn anew in every epoch.
        frames: number of rows in all files.
    """

    files: tuple[Callable[[], Iterator[FrameRow]], ...]
    frames: int


Grid = list[list[Shard]]


def make_grid(readings: Sequence[ReadPlan], frames: int, batch: int) -> Grid | None:
    """Lanes for files whose lengths are known without reading them (parquet and ASE's databases).

    Args:
        readings: the plan of the source.
        frames: number of frames that the recipe says.
        batch: structures per step, of all ranks.

    Returns:
        ``grid[group][part]``; ``None`` where files are too few or too unequal, a length is unknown, or the
        lengths do not add up to ``frames`` (reading will tell where).
    """
    files = [replace(reading, paths=(path,)) for reading in readings for path in reading.paths]
    if len(files) < 2 or not all(reading.paths for reading in readings):
        return None
    sizes = [length(file) for file in files]
    known = [n for n in sizes if n is not None]
    if len(known) < len(sizes) or sum(known) != frames:
        return None
    for groups, parts in GRIDS:
        if groups * parts > len(files) or parts > batch:
            continue
        lanes = _balanced(files, known, groups * parts)
        longest, shortest = max(n.frames for n in lanes), min(n.frames for n in lanes)
        grid = [lanes[i * parts : (i + 1) * parts] for i in range(groups)]
        if shortest and longest <= UNEVEN * shortest and turns(grid, batch) <= shortest:
            return grid
    return None


def turns(grid: Grid, batch: int) -> int:
    """Steps of each group in an epoch, so that no batch is larger than ``batch``."""
    count = math.ceil(max(sum(lane.frames for lane in group) for group in grid) / batch)
    while max(sum(math.ceil(lane.frames / count) for lane in group) for group in grid) > batch:
        count += 1
    return count


def smallest(grid: Grid, batch: int) -> int:
    """Size of the smallest step, at least."""
    count = turns(grid, batch)
    return min(sum(lane.frames // count for lane in group) for group in grid)


def length(file: ReadPlan) -> int | None:
    """Number of frames of one file, or ``None`` if only reading it would tell.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(file.paths[0][0])
    if file.selector or not path.is_file():
        return None
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(path).num_rows)
        if ending in LMDB:
            return len(open_lmdb(path, file.paths[0][1]).ids)
        if ending == ".db":
            import ase.db

            return int(ase.db.connect(str(path), use_lock_file=False).count())
    except DataError:
        raise
    except Exception as error:  # whatever the library raises for a damaged file
        raise unreadable(file.paths[0][1], error) from error
    return None


def _balanced(files: Sequence[ReadPlan], sizes: Sequence[int], count: int) -> list[Shard]:
    """Files dealt out from the largest on, each to the lane with the fewest frames."""
    chosen: list[list[int]] = [[] for _ in range(count)]
    totals = np.zeros(count, dtype=np.int64)
    for index in sorted(range(len(files)), key=lambda i: (-sizes[i], i)):
        if sizes[index]:
            lane = int(totals.argmin())
            chosen[lane].append(index)
            totals[lane] += sizes[index]
    return [
        Shard(tuple(partial(file_rows, files[i]) for i in lane), int(total))
        for lane, total in zip(chosen, totals, strict=True)
    ]
