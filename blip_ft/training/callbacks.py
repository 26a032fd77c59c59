"""Callbacks of a fine-tune: epoch-keyed batches, the best state, the history."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from blip_ft.errors import readable
from blip_ft.families.base.posterior import Posterior
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.training.module import FineTuneModule
from blip_ft.uncertainty.results import SetPrediction

#: share above the best held-out score from which an epoch counts as one of a rising score
RISEN = 0.02
#: times the held-out score at the start: a training that is there will not come back
EXPLODED = 30.0


class SetEpoch(Callback):
    """Tell the batch sampler which epoch it is."""

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Before the first batch of an epoch."""
        del pl_module
        loader: Any = trainer.train_dataloader
        # a stream makes its batches itself
        (loader.batch_sampler or loader.dataset).set_epoch(trainer.current_epoch)


class KeepBest(Callback):
    """Remember the trained state of the epoch with the lowest held-out score; the state at the start is one of them.

    Args:
        monitor: logged value to minimise.

    The state is kept in memory (mean, posterior, noise; not the frozen pretrained weights), goes into Lightning's
    checkpoints, and is put back by :meth:`restore`.

    Attributes:
        best: the lowest score.
        epoch: whose it is; -1 for the state at the start.
        start: score of that.
        last: score of the last validation, ``None`` before the first.
    """

    def __init__(self, monitor: str = "val/crps") -> None:
        self.monitor = monitor
        self.best = self.start = float("inf")
        self.epoch = -1
        self.last: float | None = None
        self.state: dict[str, Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: FineTuneModule) -> None:  # type: ignore[override]
        """Score what training starts from, unless it goes on from a checkpoint."""
        batches = sum(int(n) for n in trainer.num_val_batches)
        if self.state or not batches:
            return
        with torch.no_grad():
            for batch in islice(trainer.val_dataloaders, batches):  # type: ignore[arg-type]
                pl_module.validation_step(batch.to(pl_module.device), 0)
        self.start = float(pl_module.held_out_scores()[self.monitor])
        self.best = self.start if math.isfinite(self.start) else float("inf")
        self._take(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """After each validation pass."""
        if trainer.sanity_checking:
            return
        self.last = float(trainer.callback_metrics[self.monitor])
        if self.last < self.best:
            self.best, self.epoch = self.last, trainer.current_epoch
            self._take(pl_module)

    def _take(self, module: lightning.LightningModule) -> None:
        trained = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
        self.state = copy.deepcopy(trained)

    def restore(self, module: FineTuneModule) -> None:
        """Load the best state back into the module; where nothing has been validated, it stays as it is."""
        parameters = dict(module.named_parameters())
        for name, value in self.state.items() if self.last is not None else ():
            parameters[name].data.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {k: getattr(self, k) for k in ("best", "start", "epoch", "last", "state")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints."""
        for key, value in state_dict.items():
            setattr(self, key, value)


class StopWhenRising(Callback):
    """End a training that has left its best state behind.

    Args:
        best: knows the held-out scores; stands before this in the list of callbacks.
        patience: epochs in a row with a score above the best one by more than :data:`RISEN`; ``None``: any number.

    A score that is no number, or :data:`EXPLODED` times that at the start, ends it at once.

    Attributes:
        reason: why it was ended, in words; empty if it was not.
    """

    def __init__(self, best: KeepBest, patience: int | None) -> None:
        self.best, self.patience = best, patience
        self.risen = 0
        self.reason = ""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A training that was ended stays so when its run is resumed."""
        del pl_module
        trainer.should_stop = bool(self.reason)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The score is the same on every rank, and so is what follows."""
        del pl_module
        if trainer.sanity_checking or self.best.last is None:
            return
        score, best = self.best.last, self.best.best
        self.risen = self.risen + 1 if score > (1 + RISEN) * best else 0
        start = self.best.start
        if not math.isfinite(score) or (math.isfinite(start) and score > EXPLODED * max(start, 1e-9)):
            self.reason = (
                f"the held-out score has gone from {readable(start)} to {readable(score)}: "
                f"lower optimizer.learning_rate"
            )
        elif self.patience is not None and self.risen >= self.patience:
            self.reason = (
                f"the held-out score has been above its best for {self.risen} epochs (optimizer.patience)"
            )
        trainer.should_stop = bool(self.reason)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {"risen": self.risen, "reason": self.reason}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints."""
        self.risen, self.reason = state_dict["risen"], state_dict["reason"]


class FitPosterior(Callback):
    """Fit a posterior that has a closed form, at the start of one epoch.

    Args:
        fit: does it.
        epoch: when.
        recall: puts back what an earlier start of this run has fitted, where there is that.
        keep: called after a fit.
    """

    def __init__(
        self,
        fit: Callable[[], object],
        epoch: int,
        recall: Callable[[], bool] = lambda: False,
        keep: Callable[[], object] = lambda: None,
    ) -> None:
        self._fit, self._epoch, self._recall, self._keep = fit, epoch, recall, keep

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Before the first batch of the epoch; on every rank alike."""
        del pl_module
        if trainer.current_epoch == self._epoch and not self._recall():
            self._fit()
            self._keep()


class AverageMean(Callback):
    """Exponential moving average of the mean: m_1 = w_1, m_t = d m_(t-1) + (1 - d) w_t after step t.

    The average, of the trained mean and ``rest`` alone, stands in for the mean in every validation. It has
    to come after :class:`KeepBest`, which then keeps the average; training goes on with the weights
    themselves. A checkpoint of Lightning's holds weights and average, so that a resumed run takes
    the same steps.

    Args:
        parameters: the trained mean.
        decay: d.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._live = nn.ParameterList(parameters)
        self._average = AveragedModel(self._live, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._step = 0
        self._swapped = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The average is made before the model is on its device."""
        del trainer
        self._average.to(pl_module.device)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """After every step of the optimiser; with accumulated gradients not after every batch."""
        del args, kwargs
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._average.update_parameters(self._live)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average in."""
        del trainer, pl_module
        if int(self._average.n_averaged) and not self._swapped:
            self._swap()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """And the weights back."""
        del trainer, pl_module
        if self._swapped:
            self._swap()

    def around(self, fit: Callable[[], object]) -> None:
        """Fit something to the averaged mean; training and average then go on from where it leaves the mean."""
        if int(self._average.n_averaged):
            with torch.no_grad():
                for live, average in self._pairs():
                    live.copy_(average)
        fit()
        self.forget()

    def forget(self) -> None:
        """The next step starts a new average."""
        self._average.n_averaged.zero_()

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        return zip(self._live.parameters(), self._average.module.parameters(), strict=True)

    def _swap(self) -> None:
        with torch.no_grad():
            for live, average in self._pairs():
                kept = live.clone()
                live.copy_(average)
                average.copy_(kept)
        self._swapped = not self._swapped

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {"average": self._average.state_dict(), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints."""
        self._average.load_state_dict(state_dict["average"])
        self._step = state_dict["step"]


class UpdatePrior(Callback):
    """Empirical Bayes: the prior's scales at their best for the posterior, after every epoch."""

    def __init__(self, potential: BayesianPotential) -> None:
        self.potential = potential

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A function of the parameters alone, hence the same on every rank."""
        del trainer, pl_module
        self.update()

    def update(self) -> dict[str, list[float]]:
        """The new scales, as ``PretrainedPrior.update`` returns them."""
        deltas = self.potential.converted.deltas
        return self.potential.prior.update(deltas, self.potential.posterior.std())


class WatchPosterior(Callback):
    """Keep what the posterior reports of the last epoch; ``None`` for families that report nothing."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior
        self.report: dict[str, float] | None = None

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log it as ``posterior/...``."""
        self.report = self.posterior.epoch_report()
        if trainer.is_global_zero:
            for name, value in (self.report or {}).items():
                pl_module.log(f"posterior/{name}", value, rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints, also of an epoch that is not at its end."""
        return {"report": self.report, "counts": self.posterior.epoch_counts()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoints."""
        self.report = state_dict["report"]
        self.posterior.set_epoch_counts(state_dict["counts"])


class History(Callback):
    """One row per epoch, for the report: means of the training losses, held-out scores.

    Keys: ``epoch``, ``seconds`` (since the start), ``train_loss``, ``train_nll``, ``train_kl``,
    ``val_crps`` and ``val_force_mae`` (meV/Å), ``val_energy_mae`` (meV/atom),
    ``posterior_std_mean`` (geometric mean of posterior over prior std).
    """

    _VALIDATION = {
        "val/crps": "val_crps",
        "val/force_mae": "val_force_mae",
        "val/energy_mae": "val_energy_mae",
        "posterior/relative_std": "posterior_std_mean",
    }

    def __init__(self, echo: Callable[[str], object] | None = None) -> None:
        self.rows: list[dict[str, float]] = []
        self._echo = echo
        self._steps: list[dict[str, float]] = []
        self._start = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints, and for what is kept after the epochs."""
        return {"rows": self.rows, "steps": self._steps, "seconds": time.monotonic() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From these."""
        self.rows[:] = state_dict["rows"]
        self._steps[:] = state_dict["steps"]
        self._start = time.monotonic() - state_dict["seconds"]

    def after(self, validation: SetPrediction) -> None:
        """A further row, without training losses, for a step of the mean after the epochs.

        Args:
            validation: predictions of the mean it led to.
        """
        row = {
            "epoch": self.rows[-1]["epoch"] + 1 if self.rows else 0.0,
            "seconds": time.monotonic() - self._start,
        }
        errors = {"val_force_mae": validation.forces_error, "val_energy_mae": validation.energy_error}
        for key, error in errors.items():
            if np.isfinite(error).any():
                row[key] = 1e3 * float(np.nanmean(np.abs(error)))
        self.rows.append(row)

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """Collect what the step logged."""
        del args, kwargs
        logged = trainer.callback_metrics
        self._steps.append({k: float(logged[f"train/{k}"]) for k in ("loss", "nll", "kl")})

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the epoch's row; say how long the rest will take."""
        del pl_module
        if trainer.sanity_checking:
            return
        row = {"epoch": float(trainer.current_epoch), "seconds": time.monotonic() - self._start}
        for key in ("loss", "nll", "kl"):
            values = [s[key] for s in self._steps]
            if values:
                row[f"train_{key}"] = sum(values) / len(values)
        self._steps.clear()
        logged = trainer.callback_metrics
        row |= {new: float(logged[old]) for old, new in self._VALIDATION.items() if old in logged}
        if (
            "val_force_mae" not in row
        ):  # the epoch is chosen by energies: what was logged is no CRPS of forces
            row.pop("val_crps", None)
        self.rows.append(row)
        if self._echo is not None and trainer.is_global_zero:
            done, total = trainer.current_epoch + 1, trainer.max_epochs or 0
            left = row["seconds"] / done * max(0, total - done)
            if "val_force_mae" in row:
                held_out = f"force MAE {readable(row['val_force_mae'], '.1f')}, "
                held_out += f"CRPS {readable(row.get('val_crps'), '.1f')} meV/Å"
            else:
                held_out = f"energy MAE {readable(row.get('val_energy_mae'), '.2f')} meV/atom"
            self._echo(
                f"epoch {done}/{total}  loss {readable(row.get('train_loss'), '.4g')}  held out: {held_out}  "
                f"{left:.0f} s left"
            )
