"""Loaders whose batches depend on (seed, epoch) alone, for one rank or many."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import lightning
import torch
from torch.utils.data import DataLoader

from blip_ft.backbones.protocol import Backbone, Batch
from blip_ft.data.batch.dataset import FrameDataset, Item, collate
from blip_ft.data.batch.sampler import EpochBatchSampler, PackedBatchSampler
from blip_ft.data.batch.stream import FrameStream
from blip_ft.system.side_by_side import width


class FrameDataModule(lightning.LightningDataModule):
    """Training and validation frames.

    Args:
        backbone: makes the batches.
        train: training frames.
        validation: held-out frames, split evenly over ranks.
        batch_size: structures per rank and step.
        seed: of the order of the frames.
        num_workers: processes that build batches.
        batch_by: ``structures``, or ``atoms`` or ``edges``: what ``batch_size`` counts.
        stream: makes the batches of one rank, ``stream(world, rank)``; ``train`` is then a sample only.

    The sampler divides by ranks itself: give the Trainer ``use_distributed_sampler=False``.
    """

    def __init__(
        self,
        backbone: Backbone,
        train: FrameDataset,
        validation: FrameDataset,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        batch_by: str = "structures",
        stream: Callable[[int, int], FrameStream] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.train, self.validation = backbone, train, validation
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.batch_by, self.stream = batch_by, stream
        self._start = (0, 0)

    def start_at(self, epoch: int, batch: int) -> None:
        """Go on with an epoch of a training, of which so many batches have been taken."""
        self._start = epoch, batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Batches move themselves; the vendor's graph inside is opaque to Lightning."""
        del dataloader_idx
        return batch.to(device)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _parts(self) -> int:
        """Parts of a batch that are worked on at the same time."""
        return width(self.trainer.strategy.root_device if self.trainer else self.backbone.device)

    def sampler(self, world: int = 1, rank: int = 0) -> EpochBatchSampler | PackedBatchSampler:
        """Batch sampler of one rank."""
        if self.batch_by == "structures":
            return EpochBatchSampler(len(self.train), self.batch_size, self.seed, world=world, rank=rank)
        sizes = self.train.sizes(self.batch_by)
        return PackedBatchSampler(
            sizes, self.batch_size, self.seed, world=world, rank=rank, name=self.batch_by
        )

    def steps(self, world: int = 1) -> int:
        """Steps of an epoch."""
        return len(self.sampler(world) if self.stream is None else self.stream(world, 0))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank; the epoch is set by ``SetEpoch``."""
        if self.stream is not None:
            # new workers in every epoch: each holds a copy of the stream with its epoch
            stream = self.stream(*self._ranks())
            stream.parts = self._parts()
            stream.start_at(*self._start)
            return DataLoader(
                stream, batch_size=None, num_workers=self.num_workers, generator=torch.Generator()
            )
        sampler = self.sampler(*self._ranks())
        sampler.start_at(*self._start)
        return self._loader(self.train, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every ``world``-th batch of the validation frames."""
        world, rank = self._ranks()
        frames = list(range(len(self.validation)))[rank::world] or [0]
        if self.batch_by == "structures":
            size = max(self.batch_size, 8)
            batches = [frames[i : i + size] for i in range(0, len(frames), size)]
        else:
            batches = in_order(frames, self.validation.sizes(self.batch_by), self.batch_size)
        return self._loader(self.validation, batch_sampler=batches)

    def _loader(self, dataset: FrameDataset, batch_sampler: object) -> DataLoader[Batch]:
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=batch_sampler,  # type: ignore[arg-type]
            collate_fn=partial(_collate, self.backbone, self._parts()),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),  # a loader that is begun anew takes nothing from torch's own
        )


def in_order(frames: list[int], sizes: list[int], limit: int) -> list[list[int]]:
    """Consecutive batches of at most ``limit`` atoms or edges; a larger structure comes alone."""
    batches: list[list[int]] = [[]]
    filled = 0
    for index in frames:
        if batches[-1] and filled + sizes[index] > limit:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += sizes[index]
    return batches


def _collate(backbone: Backbone, parts: int, items: list[Item]) -> Batch:
    return collate(backbone, items, parts=parts)
