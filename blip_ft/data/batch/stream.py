"""Training frames as a stream: rows read one by one, in every epoch anew, with bounded memory.

Where there are enough files of known length, each worker and rank reads its own ones
(:mod:`blip_ft.data.batch.shards`). Otherwise all of them read the whole stream and shuffle it alike, and a worker
builds the graphs of its own batches only, which is what takes the time. Either way the batches are the same
for any number of workers, and what all ranks do together is what one process with the whole batch would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch.utils.data

from blip_ft.backbones import electrons
from blip_ft.backbones.protocol import Backbone, Batch
from blip_ft.config import DataConfig, Recipe
from blip_ft.data.batch.dataset import collate, make_item
from blip_ft.data.batch.sampler import Epochs
from blip_ft.data.batch.shards import Grid, Shard, make_grid, smallest, turns
from blip_ft.data.frame import KEY_COLUMNS, FrameRow, row_key, to_atoms
from blip_ft.data.read.plan import label_options, plan
from blip_ft.data.split.reference_sets import ReferenceSets
from blip_ft.data.split.sample import Dropped, rows_of
from blip_ft.data.split.splits import Splits
from blip_ft.errors import DataError


class FrameStream(Epochs, torch.utils.data.IterableDataset[Batch]):
    """Batches of a stream; for a ``DataLoader`` with ``batch_size=None``.

    Args:
        rows: opens the stream; called once per epoch and worker, and must give the same rows.
        backbone: makes graphs and batches.
        frames: number of rows, N; another number is an error at the end of the epoch.
        batch_size: structures per rank and step.
        buffer: rows in memory among which the next one is drawn.
        seed: of the order.
        world: number of processes.
        rank: of this process.
        held_out: keys (:func:`blip_ft.data.frame.content_key`) that must not occur.
        weight: sum of the weights, by default ``frames``.
        grid: lanes of the stream, with ``frames`` rows in all, each of weight 1 on average; ``rows`` is then
            not used.
        sets: sets of energies with references of their own.
        left_out: rows of the stream that ``rows`` leaves out and ``frames`` does not count, for messages.
    """

    def __init__(
        self,
        rows: Callable[[], Iterator[FrameRow]],
        backbone: Backbone,
        *,
        frames: int,
        batch_size: int,
        buffer: int = 1000,
        seed: int = 0,
        world: int = 1,
        rank: int = 0,
        held_out: frozenset[int] = frozenset(),
        weight: float | None = None,
        grid: Grid | None = None,
        sets: ReferenceSets | None = None,
        left_out: int = 0,
    ) -> None:
        super().__init__()
        self.rows, self.backbone = rows, backbone
        self.frames, self.batch_size, self.buffer, self.seed = frames, batch_size, buffer, seed
        self.world, self.rank, self.held_out = world, rank, held_out
        self.total_weight = float(frames if weight is None else weight)
        self.sets, self.left_out = sets, left_out
        #: parts of a batch that are worked on at the same time
        self.parts = 1
        if frames < world:
            raise DataError(
                f"{frames} training structures cannot be shared by {world} processes",
                field="data.stream.frames",
                remedy="use fewer devices (trainer.devices)",
            )
        if grid is not None and len(grid[0]) % world and smallest(grid, batch_size * world) < world:
            grid = None  # some rank would have nothing in some step
        self.sharded = grid is not None
        self.grid = [[Shard((rows,), frames)]] if grid is None else grid
        whole = batch_size * world
        # one lane: as in :class:`blip_ft.data.batch.sampler.EpochBatchSampler`
        self._turns = turns(self.grid, whole) if grid else max(1, min(-(-frames // whole), frames // world))
        self.steps = len(self.grid) * self._turns

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        done = self.done
        # workers are asked in turn, the first of them for the first batch that is wanted
        mine = set(range(done + worker, self.steps, workers))
        needed = {step % len(self.grid) for step in mine}
        own = self._own_parts()
        opened = {(g, p): self._shuffled(g, p) for g in sorted(needed) for p in own}
        for step in range(self.steps):
            group, turn = step % len(self.grid), step // len(self.grid)
            if group not in needed:
                continue
            drawn = [row for p in own for row in self._piece(opened[group, p], self.grid[group][p], turn)]
            if step in mine:
                # all parts of the step were drawn unless they are divided among ranks already
                alone = len(own) < len(self.grid[group])
                share = (
                    range(len(drawn))
                    if alone
                    else np.array_split(np.arange(len(drawn)), self.world)[self.rank]
                )
                yield collate(self.backbone, [self._item(drawn[i]) for i in share], parts=self.parts)

    def _own_parts(self) -> range:
        """Parts of a group that this rank reads: its share where they can be divided evenly, or all."""
        parts = len(self.grid[0])
        if parts % self.world:
            return range(parts)
        share = parts // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def _piece(self, rows: Iterator[FrameRow], lane: Shard, turn: int) -> list[FrameRow]:
        """The rows of a lane in one step; at the last one the lane must be at its end."""
        first, last = (t * lane.frames // self._turns for t in (turn, turn + 1))
        chosen = list(islice(rows, last - first))
        if len(chosen) < last - first:
            raise self._another(f"only {first + len(chosen)}" + self._inside(lane))
        if turn == self._turns - 1 and next(rows, None) is not None:  # before the epoch counts as done
            raise self._another(f"more than {lane.frames}" + self._inside(lane))
        return chosen

    def _inside(self, lane: Shard) -> str:
        return f" of {lane.frames} frames in some of its files" if self.sharded else ""

    def _item(self, row: FrameRow) -> Any:
        self.backbone.check(to_atoms(row, labels=False), file=row["source"], frame=row["frame"])
        return make_item(row if self.sets is None else self.sets.align_row(row), self.backbone)

    def _shuffled(self, group: int = 0, part: int = 0) -> Iterator[FrameRow]:
        """Rows of a lane drawn from a buffer that it refills; a function of (seed, epoch, lane)."""
        lane = self.grid[group][part]
        place_of_lane = [group, part] if self.sharded else []
        rng = np.random.default_rng([self.seed, self.epoch, *place_of_lane])
        size = max(1, self.buffer // (len(self.grid) * len(self.grid[0])))
        order = rng.permutation(len(lane.files)) if self.sharded else range(len(lane.files))
        buffer: list[FrameRow] = []
        count, total = 0, 0.0
        for row in chain.from_iterable(lane.files[i]() for i in order):
            count += 1
            total += 1.0 if row["weight"] is None else row["weight"]
            self._check_held_out(row)
            if len(buffer) < size:
                buffer.append(row)
                continue
            place = int(rng.integers(len(buffer)))
            yield buffer[place]
            buffer[place] = row
        for place in rng.permutation(len(buffer)):
            yield buffer[place]
        weight = lane.frames if self.sharded else self.total_weight
        if count == lane.frames and not math.isclose(total, weight, rel_tol=1e-6):
            raise self._another(f"frames of weights other than 1, {total:g} for {count} of them")

    def _check_held_out(self, row: FrameRow) -> None:
        if not self.held_out:
            return
        if row_key(row) in self.held_out:
            raise DataError(
                "the frame stands in a held-out set too",
                file=row["source"],
                frame=row["frame"],
                remedy="give every structure to one role only",
            )

    def _another(self, found: str) -> DataError:
        said = f"the recipe says {self.frames + self.left_out} frames"
        if self.left_out:
            said += f", {self.left_out} of them left out for a wrong label, which leaves {self.frames}"
        return DataError(
            f"the stream has {found} where {said} of weight {self.total_weight:g}",
            field="data.stream",
            remedy="set data.stream.frames (and data.stream.weight) to what it has, isolated atoms and frames that "
            "did not converge not counted: the likelihood is scaled by it",
        )


def grid_of(config: DataConfig, batch: int) -> Grid | None:
    """Lanes of ``data.train`` for steps of ``batch`` structures, where its files allow it.

    Raises:
        DataError: a file is missing or damaged.
    """
    options = config.stream
    if options is None or options.weight is not None:  # weights are summed over the whole stream
        return None
    readings = plan(config.train, digest=False, **label_options(config))
    return make_grid(readings, options.frames, batch)


def make_stream(
    recipe: Recipe,
    splits: Splits,
    backbone: Backbone,
    sets: ReferenceSets | None = None,
    dropped: Dropped | None = None,
) -> Callable[[int, int], FrameStream] | None:
    """What makes the stream of one rank, ``(world, rank)``; ``None`` if the recipe reads no stream.

    Where frames are dropped, files are not dealt to workers: each of them knows how many frames to expect of
    its own only as long as none is missing.
    """
    config, options = recipe.data, recipe.data.stream
    if options is None:
        return None
    dropped = Dropped() if dropped is None else dropped
    n = len(dropped.places)
    held = frozenset(
        row_key(row)
        for name, part in splits.roles().items()
        if name != "train"
        for row in part.select_columns([*KEY_COLUMNS, *electrons.KEYS])
    )
    return lambda world, rank: FrameStream(
        rows_of(config, dropped),
        backbone,
        frames=options.frames - n,
        batch_size=config.batch_size,
        buffer=options.buffer,
        seed=recipe.seed,
        world=world,
        rank=rank,
        held_out=held,
        weight=None if options.weight is None else options.weight - dropped.weight,
        grid=None if n else grid_of(config, config.batch_size * world),
        sets=sets,
        left_out=n,
    )
