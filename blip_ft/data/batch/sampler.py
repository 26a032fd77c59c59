"""Batches of an epoch, the same for any number of processes.

Every process computes the same permutation from (seed, epoch), divides it into the same global
batches, and takes its own share of each: what the ranks do together in one step is what a single
process with the global batch size would do.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from blip_ft.errors import DataError


class Epochs:
    """Which epoch is next, and whether it begins in its midst, as that of a resumed run does.

    Attributes:
        steps: batches of a whole epoch.
        epoch: its number, which order and content of the batches depend on.
        begun: epoch, and how many of its batches are not wanted.
    """

    steps: int
    epoch: int = 0
    begun: tuple[int, int] = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls it before each."""
        self.epoch = epoch

    def start_at(self, epoch: int, batch: int) -> None:
        """Begin with an epoch, without so many of its batches; those after it are whole."""
        self.epoch, self.begun = epoch, (epoch, batch)

    @property
    def done(self) -> int:
        """Batches of the epoch that are not wanted."""
        return self.begun[1] if self.begun[0] == self.epoch else 0

    def __len__(self) -> int:
        return self.steps


class EpochBatchSampler(Epochs, Sampler[list[int]]):
    """Shuffled, nearly equal batches; a ``batch_sampler`` for ``torch.utils.data.DataLoader``.

    An epoch has ``steps = max(1, min(ceil(n / (batch_size * world)), n // world))`` steps. Its
    permutation is cut into that many global batches, whose sizes differ by one at most, and each
    of these into ``world`` shares, likewise: no structure is dropped or repeated, and every rank
    has at least one in every step, which collective operations need.

    Args:
        n: number of structures.
        batch_size: structures per rank and step, at most one fewer or (where ``n`` leaves no
            other way) a few more.
        seed: of the permutation.
        world: number of processes.
        rank: of this process.

    Raises:
        DataError: fewer structures than processes, or none.
        ValueError: a size, world or rank that makes no sense.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0, world: int = 1, rank: int = 0) -> None:
        if batch_size < 1 or world < 1 or not 0 <= rank < world:
            raise ValueError(f"bad batch_size {batch_size}, world {world} or rank {rank}")
        if n < world:
            raise DataError(
                f"{n} training structures cannot be shared by {world} processes",
                field="data.train",
                remedy="use fewer devices (trainer.devices) or more structures",
            )
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.world, self.rank = world, rank
        self.steps = max(1, min(-(-n // (batch_size * world)), n // world))

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self.whole_epoch(), self.done, None)

    def whole_epoch(self) -> Iterator[list[int]]:
        """All batches of the epoch, also those that :meth:`start_at` leaves out."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for batch in np.array_split(order, self.steps):
            yield np.array_split(batch, self.world)[self.rank].tolist()


class PackedBatchSampler(Epochs, Sampler[list[int]]):
    """Batches whose structures have at most ``limit`` atoms or edges together.

    Every epoch packs all structures into the same number of batches, so that the length of an epoch
    and the divisor of the loss are fixed: sizes are rounded up to a few classes, structures are
    taken from the largest class to the smallest, at random within a class, and each goes to the
    batch that holds least (Graham's rule, which is within 4/3 of the best packing). What the batches
    hold then depends on (seed, epoch), how full they are does not.

    Args:
        sizes: atoms or edges of each structure.
        limit: most that a batch of one rank may hold.
        seed: of the order.
        world: number of processes.
        rank: of this process.
        name: what is counted, for errors.

    Raises:
        DataError: a structure that is larger than ``limit``, or fewer structures than processes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        limit: int,
        seed: int = 0,
        world: int = 1,
        rank: int = 0,
        *,
        name: str = "atoms",
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        n = len(self.sizes)
        if n < world:
            raise DataError(
                f"{n} training structures cannot be shared by {world} processes",
                field="data.train",
                remedy="use fewer devices (trainer.devices) or more structures",
            )
        largest = int(self.sizes.argmax())
        if self.sizes[largest] > limit:
            raise DataError(
                f"training structure {largest} has {self.sizes[largest]} {name}, a batch may have {limit}",
                field="data.batch_size",
                remedy="raise it, or leave the structure out",
            )
        self.limit, self.seed, self.world, self.rank = limit, seed, world, rank
        self.begun = (0, 0)
        self._classes = np.minimum(_rounded_up(self.sizes), limit)
        order = np.argsort(-self._classes, kind="stable")
        steps = max(1, -(-int(self._classes.sum()) // (limit * world)))
        while steps * world < n and self._fill(order, steps)[1] > limit:
            steps += 1
        self.steps = min(steps, n // world)
        if self._fill(order, self.steps)[1] > limit:  # fewer structures than ranks in the last step
            raise DataError(
                f"{n} structures of up to {self.sizes[largest]} {name} cannot be shared by {world} processes",
                field="data.batch_size",
                remedy="raise it, or use fewer devices",
            )

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self.whole_epoch(), self.done, None)

    def whole_epoch(self) -> Iterator[list[int]]:
        """All batches of the epoch, also those that :meth:`start_at` leaves out."""
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.permutation(len(self.sizes))
        order = shuffled[np.argsort(-self._classes[shuffled], kind="stable")]
        batches, _ = self._fill(order, self.steps)
        for step in rng.permutation(self.steps):
            yield batches[int(step) * self.world + self.rank]

    def _fill(self, order: NDArray[np.int64], steps: int) -> tuple[list[list[int]], int]:
        """Structures of each batch, each put where least is; the fullest batch's content."""
        batches: list[list[int]] = [[] for _ in range(steps * self.world)]
        heap = [(0, k) for k in range(len(batches))]
        for index in order.tolist():
            load, k = heapq.heappop(heap)
            batches[k].append(index)
            heapq.heappush(heap, (load + int(self._classes[index]), k))
        return batches, max(load for load, _ in heap)


def _rounded_up(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sizes up to the next of eight steps per factor of two: at most 9 % larger."""
    power = np.ceil(8 * np.log2(np.maximum(sizes, 1)) - 1e-9) / 8
    return np.maximum(np.ceil(2**power - 1e-9).astype(np.int64), sizes)
