"""Training frames as a stream: rows read one by one, in every epoch anew, with bounded memory.

Every process and worker reads the whole stream and shuffles it alike; a worker builds the graphs of
its own batches only, which is what takes the time. Hence the batches are the same for any number of
workers, and what all ranks do together is what one process with the whole batch would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch.utils.data

from blip_ft.backbone import Backbone, Batch
from blip_ft.config import DataConfig, Recipe
from blip_ft.data.dataset import collate, content_key, make_item
from blip_ft.data.schema import FEATURES
from blip_ft.data.sources import iterate_source
from blip_ft.errors import DataError

if TYPE_CHECKING:
    from blip_ft.data.splits import Splits

Row = dict[str, Any]


class FrameStream(torch.utils.data.IterableDataset[Batch]):
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
        held_out: keys (:func:`content_key`) that must not occur.
        weight: sum of the weights, by default ``frames``.
    """

    def __init__(
        self,
        rows: Callable[[], Iterator[Row]],
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
    ) -> None:
        super().__init__()
        self.rows, self.backbone = rows, backbone
        self.frames, self.batch_size, self.buffer, self.seed = frames, batch_size, buffer, seed
        self.world, self.rank, self.held_out = world, rank, held_out
        self.total_weight = float(frames if weight is None else weight)
        self.epoch = 0
        if frames < world:
            raise DataError(
                f"{frames} training structures cannot be shared by {world} processes",
                field="data.stream.frames",
                remedy="use fewer devices (trainer.devices)",
            )
        #: as in :class:`blip_ft.data.sampler.EpochBatchSampler`
        self.steps = max(1, min(-(-frames // (batch_size * world)), frames // world))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rows = self._shuffled()
        sizes = [len(part) for part in np.array_split(np.empty(self.frames, dtype=np.int8), self.steps)]
        for step, size in enumerate(sizes):
            chosen = [next(rows, None) for _ in range(size)]
            known = [row for row in chosen if row is not None]
            if len(known) < size:
                raise self._another(f"only {sum(sizes[:step]) + len(known)}")
            if step == self.steps - 1 and next(rows, None) is not None:  # before the epoch counts as done
                raise self._another(f"more than {self.frames}")
            if step % workers == worker:
                share = np.array_split(np.arange(size), self.world)[self.rank]
                yield collate(self.backbone, [self._item(known[i]) for i in share])

    def _item(self, row: Row) -> Any:
        self.backbone.check(_atoms(row), file=row["source"], frame=row["frame"])
        return make_item(row, self.backbone)

    def _shuffled(self) -> Iterator[Row]:
        """Rows drawn from a buffer that the stream refills; a function of (seed, epoch)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        buffer: list[Row] = []
        count, total = 0, 0.0
        for row in self.rows():
            count += 1
            total += 1.0 if row["weight"] is None else row["weight"]
            self._check_held_out(row)
            if len(buffer) < self.buffer:
                buffer.append(row)
                continue
            place = int(rng.integers(len(buffer)))
            yield buffer[place]
            buffer[place] = row
        for place in rng.permutation(len(buffer)):
            yield buffer[place]
        if count == self.frames and not math.isclose(total, self.total_weight, rel_tol=1e-6):
            raise self._another(f"a weight of {total:g} in all")

    def _check_held_out(self, row: Row) -> None:
        if not self.held_out:
            return
        if content_key(row["numbers"], row["positions"], row["cell"]) in self.held_out:
            raise DataError(
                "the frame stands in a held-out set too",
                file=row["source"],
                frame=row["frame"],
                remedy="give every structure to one role only",
            )

    def _another(self, found: str) -> DataError:
        return DataError(
            f"the stream has {found} where the recipe says {self.frames} frames of weight {self.total_weight:g}",
            field="data.stream",
            remedy="set data.stream.frames (and data.stream.weight) to what it has: the likelihood is scaled by it",
        )


def _atoms(row: Row) -> Any:
    from blip_ft.data.dataset import to_atoms

    return to_atoms(row, labels=False)


def rows_of(config: DataConfig) -> Callable[[], Iterator[Row]]:
    """What opens the stream of ``data.train``."""

    def rows() -> Iterator[Row]:
        for row in iterate_source(
            config.train,
            fields=config.fields,
            units={str(k): v for k, v in config.units.items()},
            stress_order=config.stress_order,
        ):
            yield {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()}

    return rows


def make_stream(
    recipe: Recipe, splits: Splits, backbone: Backbone
) -> Callable[[int, int], FrameStream] | None:
    """What makes the stream of one rank, ``(world, rank)``; ``None`` if the recipe reads no stream."""
    config, options = recipe.data, recipe.data.stream
    if options is None:
        return None
    held = frozenset(
        content_key(*row)
        for name, part in splits.roles().items()
        if name != "train"
        for row in zip(part["numbers"], part["positions"], part["cell"], strict=True)
    )
    return lambda world, rank: FrameStream(
        rows_of(config),
        backbone,
        frames=options.frames,
        batch_size=config.batch_size,
        buffer=options.buffer,
        seed=recipe.seed,
        world=world,
        rank=rank,
        held_out=held,
        weight=options.weight,
    )


def sample_of(config: DataConfig) -> datasets.Dataset:
    """Frames from the start of the stream, each with the weight of those it stands for.

    The sum of their weights is that of the whole stream, so that sums over them (the Gauss-Newton
    matrix, N) have the size of the whole.

    Raises:
        DataError: the stream cannot be read or is empty.
    """
    options = config.stream
    assert options is not None
    rows = []
    for row in rows_of(config)():
        rows.append(row)
        if len(rows) == min(options.sample, options.frames):
            break
    total = sum(row["weight"] for row in rows)
    scale = (options.frames if options.weight is None else options.weight) / total
    for row in rows:
        row["weight"] *= scale
    return datasets.Dataset.from_list(rows, features=FEATURES)
