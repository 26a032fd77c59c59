"""Batches of an epoch, the same for any number of processes.

Every process computes the same permutation from (seed, epoch), divides it into the same global
batches, and takes its own share of each: what the ranks do together in one step is what a single
process with the global batch size would do.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from blip_ft.errors import DataError


class EpochBatchSampler(Sampler[list[int]]):
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
        self.epoch = 0
        self.steps = max(1, min(-(-n // (batch_size * world)), n // world))

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        for batch in np.array_split(order, self.steps):
            yield np.array_split(batch, self.world)[self.rank].tolist()
