"""The Lightning module: one training step of the objective, one validation pass of the CRPS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor

from blip_ft.backbones.conservative import weights_only
from blip_ft.backbones.protocol import Batch
from blip_ft.objectives import gaussian_crps
from blip_ft.training.objective import Objective, StepLoss
from blip_ft.uncertainty.predict import predict_collated
from blip_ft.variational.prior import PretrainedPrior

#: draws per validation pass; few, as they only rank epochs against each other
VALIDATION_DRAWS = 4


@dataclass
class _Taken:
    """A step between its loss and its gradient."""

    loss: Tensor
    batch: Batch
    index: int


class FineTuneModule(lightning.LightningModule):
    """Fine-tunes a :class:`BayesianPotential` by an objective, or its mean alone.

    Args:
        objective: what is minimised, with the model, whose posterior and mean are changed. Plain fine-tuning
            has no noise and no KL; the same likelihood, optimiser and steps.

    Logged per step: ``train/loss``, ``train/nll``, ``train/kl``, and the parts of other terms by their names; per epoch: ``val/crps`` (force
    CRPS in meV/Å of the mean with the draws' spread and the label noise; where no forces are labelled
    the energy MAE in meV/atom), ``val/force_mae``
    (meV/Å), ``val/energy_mae`` (meV/atom), ``posterior/relative_std`` (1 is the prior).
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.potential, self.likelihood = objective.potential, objective.likelihood
        self.recipe, self.plain = objective.recipe, objective.plain
        self._validation: list[tuple[Tensor, Tensor, Tensor]] = []
        self._step: _Taken | None = None

    # ---- training ------------------------------------------------------------------------
    def on_train_epoch_start(self) -> None:
        """The order of an epoch is known: noise of structures that follow each other is made together."""
        loader: Any = self.trainer.train_dataloader
        if not self.plain and loader.batch_sampler is not None:  # a stream is not known
            items = loader.dataset
            self.potential.expect([items.key(i) for batch in loader.batch_sampler for i in batch])

    def on_train_epoch_end(self) -> None:
        """Frees the noise."""
        self.potential.expect(())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of this rank's share of a step (``ElboScale.loss``), whose graph :meth:`backward` has."""
        step = self._objective(batch, batch_idx)
        loss = step.loss
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss is not finite at step {self.global_step}: lower optimizer.learning_rate or "
                "posterior.init_std, and look at the data report for outliers"
            )
        self._log("train/loss", loss.detach(), prog_bar=True, batch=batch)
        for name, value in step.parts.items():
            self._log(f"train/{name}", value, batch=batch)
        self._step = _Taken(loss, batch, batch_idx)
        return loss.detach().requires_grad_(True)

    def _objective(self, batch: Batch, batch_idx: int) -> StepLoss:
        """Loss of a batch; in parts where it does not fit into memory (``halving``)."""
        while True:
            try:
                return self.objective(
                    batch,
                    epoch=self.current_epoch,
                    batch_index=batch_idx,
                    step=self.global_step,
                    world=self.trainer.world_size,
                )
            except Exception as error:  # noqa: BLE001 raised again unless memory has run out
                self.objective.limit.retry(error, batch, "a training step")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of the parameters alone: those of the geometry, which forces were made with, serve nothing.

        Lightning holds ``loss`` until the step is over, and with it would hold the graph: it is given another tensor, so
        that a graph that does not fit can be let go.
        """
        step, self._step = self._step, None
        assert step is not None
        # what Lightning has made of the loss: divided by accumulate_grad_batches, scaled for half precision
        factor = torch.where(step.loss.detach() == 0, 1.0, loss.detach() / step.loss.detach())
        wanted = [p for p in self.parameters() if p.requires_grad]
        before = [None if p.grad is None else p.grad.clone() for p in wanted]
        while True:
            try:
                with weights_only():
                    (step.loss * factor).backward(*args, inputs=wanted, **kwargs)  # type: ignore[misc]
            except Exception as error:
                if self.trainer.world_size > 1:  # the others are waiting for these gradients
                    raise
                step.loss = step.loss.detach()
                self.objective.limit.retry(error, step.batch, "the gradient of a training step")
            else:
                return
            for parameter, grad in zip(wanted, before, strict=True):
                parameter.grad = None if grad is None else grad.clone()
            step.loss = self._objective(step.batch, step.index).loss

    def _log(self, name: str, value: Any, *, batch: Batch, prog_bar: bool = False) -> None:
        self.log(name, value, prog_bar=prog_bar, batch_size=batch.n_structures, sync_dist=True, on_step=True)

    # ---- validation ----------------------------------------------------------------------
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect errors and spreads; autograd forces need gradients also here."""
        del batch_idx
        # a closed form is fitted anew at the end: the epochs before and after its first fit are compared by their means
        closed = self.potential.posterior_config.closed_form
        draws = 0 if self.plain or closed else VALIDATION_DRAWS
        moments = predict_collated(self.potential, batch, n_draws=draws)
        assert moments.mean.forces is not None
        error = moments.mean.forces - batch.labels["forces"]
        spread = torch.zeros_like(error) if moments.forces_std is None else moments.forces_std
        energy = (moments.mean.energy - batch.labels["energy"]) / batch.n_atoms
        self._validation.append((error.flatten().cpu(), spread.flatten().cpu(), energy.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log held-out scores, pooled over ranks."""
        error, spread, energy = (torch.cat(x) for x in zip(*self._validation, strict=True))
        self._validation.clear()
        known = ~torch.isnan(error)
        error, spread = error[known], spread[known]
        noise = self.likelihood.std["forces"]
        crps = gaussian_crps(error.numpy(), torch.hypot(spread, torch.tensor(noise).double()).numpy())
        # sums, not means: ranks may hold different numbers of components
        energy = energy[~torch.isnan(energy)]
        sums = torch.tensor(
            [
                float(crps.sum()),
                float(error.abs().sum()),
                error.numel(),
                float(energy.abs().sum()),
                energy.numel(),
            ],
            dtype=torch.float64,
            device=self.device,
        )
        gathered = self.all_gather(sums)
        assert isinstance(gathered, Tensor)
        total = gathered.reshape(-1, 5).sum(dim=0)
        # without any force label the energies choose the epoch
        by = 0 if total[2] > 0 else 3
        scores = {"val/crps": 1e3 * total[by] / total[2 if by == 0 else 4].clamp_min(1)}
        # an error without labels is not 0 but unknown
        if total[2] > 0:
            scores["val/force_mae"] = 1e3 * total[1] / total[2]
        if total[4] > 0:
            scores["val/energy_mae"] = 1e3 * total[3] / total[4]
        for name, value in scores.items():
            self.log(name, value, prog_bar=name == "val/crps", rank_zero_only=False)
        # a family with a closed form does not learn its spread step by step: nothing to watch
        if not self.plain and self.potential.posterior.factorised:
            self.log("posterior/relative_std", self.potential.posterior.relative_std().detach())

    # ---- optimiser -----------------------------------------------------------------------
    def configure_optimizers(self) -> Any:
        """AdamW, with decay towards the pretrained weights; cosine after a warm-up.

        Linear blocks are trained as differences, which decay to zero as AdamW has it. Parameters beside
        them are trained as they are: their decay, as decoupled, follows each step.
        """
        options = self.recipe.optimizer
        rate = options.learning_rate
        if self.plain and self.recipe.plain.learning_rate is not None:
            rate = self.recipe.plain.learning_rate
        decay = options.weight_decay
        rest = [parameter for parameter, _ in self.potential.prior.rest]
        groups: list[dict[str, Any]] = [
            {"params": self.potential.converted.mean_parameters, "lr": rate, "weight_decay": decay},
            {"params": rest, "lr": rate, "weight_decay": 0.0, "rest": True},
        ]
        spread = [p for p in self.potential.posterior.parameters() if p.requires_grad]
        if spread and not self.plain:
            groups.append({"params": spread, "lr": options.std_learning_rate, "weight_decay": 0.0})
        noise = [p for p in self.likelihood.parameters() if p.requires_grad]
        if noise:
            groups.append({"params": noise, "lr": options.std_learning_rate, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]])
        if rest and decay:
            optimizer.register_step_post_hook(partial(_decay_to_start, self.potential.prior, decay))
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        warm = options.warmup_fraction * steps

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def _decay_to_start(prior: PretrainedPrior, decay: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """After a step of AdamW: each parameter p goes by lr * decay of p - start towards its start."""
    (rate,) = (group["lr"] for group in optimizer.param_groups if group.get("rest"))
    for parameter, start in prior.rest:
        parameter.lerp_(start, rate * decay)
