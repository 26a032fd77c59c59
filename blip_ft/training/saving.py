"""Lightning's checkpoints of a training that is under way, as pieces of the run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from blip_ft.system.signals import Interrupts
from blip_ft.training.pieces import Pieces

#: steps between two looks at the time where several ranks have to agree on it
TOGETHER = 50


class SaveTraining(Checkpoint):
    """Keep the training now and then, and before a signal ends it.

    A checkpoint is taken at the end of an epoch, or between two steps of one, where that takes its share of the time so
    far at most (``pieces.SHARE``). One in mid-epoch needs the step to be one of the optimiser, and no
    validation to follow
    it: Lightning would leave that out when it goes on.

    Args:
        pieces: where.
        name: of the piece.
        interrupts: signals that have come.
        about: what belongs to a checkpoint beside its place in the training.
    """

    def __init__(
        self, pieces: Pieces, name: str, interrupts: Interrupts, about: Callable[[], dict[str, Any]] = dict
    ) -> None:
        self._pieces, self._name, self._interrupts, self._about = pieces, name, interrupts, about
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """From here on a signal waits for the end of the step; ranks may be in different ones, and do not wait."""
        del pl_module
        self._interrupts.install()  # Lightning has put its own handlers in their place
        self._interrupts.waits = trainer.world_size == 1
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """Between two steps."""
        batch_idx: int = args[3] if len(args) > 3 else kwargs["batch_idx"]
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        last = batch_idx + 1 >= trainer.num_training_batches
        whole = trainer.val_check_batch == trainer.num_training_batches or not sum(trainer.num_val_batches)
        ended = self._interrupts.received is not None
        if stepped and whole and not last and (ended or self._due(trainer, batch_idx)):
            self._save(trainer, trainer.current_epoch, batch_idx + 1, "train/")
        if not last:  # else the validation is finished first, and the epoch kept
            self._interrupts.check()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """After the validation."""
        del pl_module
        if self._interrupts.received is not None or self._agreed(trainer):
            self._save(trainer, trainer.current_epoch + 1, 0, "posterior/clamped")
        self._interrupts.check()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """What follows can be ended at any time."""
        del trainer, pl_module
        self._interrupts.waits = False

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """As at the end."""
        del trainer, pl_module, exception
        self._interrupts.waits = False

    def _due(self, trainer: lightning.Trainer, batch_idx: int) -> bool:
        if trainer.world_size > 1 and (batch_idx + 1) % TOGETHER:
            return False
        return self._agreed(trainer)

    def _agreed(self, trainer: lightning.Trainer) -> bool:
        """Whether the first rank has the time for a checkpoint."""
        return bool(trainer.strategy.broadcast(self._pieces.affordable()))

    def _save(self, trainer: lightning.Trainer, epoch: int, batch: int, logged: str) -> None:
        """Keep a checkpoint, and what Lightning will write to the logs once this hook is over (names that begin so)."""
        if not self._pieces.writes:
            trainer.save_checkpoint(
                "", weights_only=False
            )  # writes nothing here, and waits for the first rank
            return
        waited = False

        def write(path: Path) -> None:
            nonlocal waited
            trainer.save_checkpoint(path, weights_only=False)
            waited = True

        row = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(logged)}
        if row:
            row |= {"epoch": trainer.current_epoch, "step": trainer.global_step - 1}
        place = {"epoch": epoch, "batch": batch, "step": trainer.global_step, "row": row}
        self._pieces.keep(self._name, ".ckpt", write, place | self._about(), latest=2)
        if not waited:  # it could not be written
            trainer.strategy.barrier("Trainer.save_checkpoint")


class RandomState(Callback):
    """States of the generators that vendors may draw from; our own noise has keys."""

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put them back once everything that draws at the start of a process has done so."""
        del trainer, pl_module
        if self._state is None:
            return
        torch.set_rng_state(self._state["torch"])
        if self._state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._state["cuda"])
        kind, numbers, place, has_gauss, gauss = self._state["numpy"]
        np.random.set_state((kind, np.array(numbers, dtype=np.uint32), place, has_gauss, gauss))
        version, words, cached = self._state["python"]
        random.setstate((version, tuple(words), cached))
        self._state = None

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        state: Any = np.random.get_state(legacy=True)
        kind, numbers, place, has_gauss, gauss = state
        version, words, cached = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "numpy": [str(kind), numbers.tolist(), int(place), int(has_gauss), float(gauss)],
            "python": [version, list(words), cached],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints."""
        self._state = state_dict
