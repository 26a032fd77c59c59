"""The Lightning module: one training step of the objective, one validation pass of the CRPS."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor

from blip_ft.backbones.conservative import weights_only
from blip_ft.backbones.protocol import Batch
from blip_ft.data.batch.dataset import FrameDataset, collate
from blip_ft.objectives import gaussian_crps
from blip_ft.training.broken import Place, Usual, broken, culprits, is_finite
from blip_ft.training.objective import Objective, StepLoss
from blip_ft.training.state import changing, match_precision, numbers_of, set_numbers
from blip_ft.uncertainty.predict import frame_names, predict_collated
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
        left_out: {key: name} of training frames that are left out, as they broke a step; filled in place.

    Logged per step: ``train/loss``, ``train/nll``, ``train/kl``, and the parts of other terms by their names;
    per epoch: ``val/crps`` (force CRPS in meV/Å of the mean with the draws' spread and the label noise; where no
    forces are labelled the energy MAE in meV/atom), ``val/force_mae`` (meV/Å), ``val/energy_mae`` (meV/atom),
    ``posterior/relative_std`` (1 is the prior).
    """

    def __init__(self, objective: Objective, left_out: dict[int, str] | None = None) -> None:
        super().__init__()
        self.objective = objective
        self.potential, self.likelihood = objective.potential, objective.likelihood
        self.recipe, self.plain = objective.recipe, objective.plain
        self._validation: list[tuple[Tensor, Tensor, Tensor]] = []
        self._step: _Taken | None = None
        self.strict_loading = False  # checkpoints lack what training does not change
        self.usual = Usual()
        self.left_out: dict[int, str] = {} if left_out is None else left_out

    # ---- training ------------------------------------------------------------------------
    def on_train_start(self) -> None:
        """As an epoch that a resumed run begins in its midst is not begun."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """The order of an epoch is known: noise of structures that follow each other is made together."""
        loader: Any = self.trainer.train_dataloader
        if not self.plain and loader.batch_sampler is not None:  # a stream is not known
            items = loader.dataset
            # all of it, also where a resumed run begins in its midst: what is made together is the same then
            order = loader.batch_sampler.whole_epoch()
            self.potential.expect([items.key(i) for batch in order for i in batch])

    def on_train_epoch_end(self) -> None:
        """Frees the noise."""
        self.potential.expect(())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of this rank's share of a step (``ElboScale.loss``), whose graph :meth:`backward` has.

        Raises:
            BrokenStepError: it is not finite, or explodes, and ``optimizer.broken`` is ``stop``.
        """
        kept = self._without_left_out(batch)
        if kept is None:  # its only structures are left out; ranks need a gradient in every step
            self._step = None
            return torch.stack([0 * p.sum() for p in self._parameters_with_gradient()]).sum()
        step = self._objective(kept, batch_idx)
        loss = step.loss
        finite = bool(torch.isfinite(loss))
        if not finite or self.usual.exploded(float(step.data), self._place(batch_idx).epoch):
            self._answer("the loss is not finite" if not finite else "the loss explodes", kept, batch_idx)
            return self.training_step(batch, batch_idx)
        self._log("train/loss", loss.detach(), prog_bar=True, batch=batch)
        for name, value in step.parts.items():
            self._log(f"train/{name}", value, batch=batch)
        self._step = _Taken(loss, kept, batch_idx)
        return loss.detach().requires_grad_(True)

    def _objective(self, batch: Batch, batch_idx: int) -> StepLoss:
        """Loss of a batch; in parts where it does not fit into memory (``halving``)."""
        while True:
            try:
                return self.objective(batch, **asdict(self._place(batch_idx)))
            except Exception as error:  # noqa: BLE001 raised again unless memory has run out
                self.objective.limit.retry(error, batch, "a training step")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Gradients of the parameters alone: those of the geometry, which forces were made with, serve nothing.

        Lightning holds ``loss`` until the step is over, and with it would hold the graph: it is given another
        tensor, so that a graph that does not fit can be let go.

        Raises:
            BrokenStepError: one is not finite, and ``optimizer.broken`` is ``stop``.
        """
        step, self._step = self._step, None
        inputs = self._parameters_with_gradient()
        if step is None:  # all structures of the batch are left out
            loss.backward(*args, inputs=inputs, **kwargs)  # type: ignore[misc]
            return
        # what Lightning has made of the loss: divided by accumulate_grad_batches, scaled for half precision
        factor = torch.where(step.loss.detach() == 0, 1.0, loss.detach() / step.loss.detach())
        before = [None if p.grad is None else p.grad.clone() for p in inputs]
        self._differentiate(step, factor, before, *args, **kwargs)
        if is_finite([p.grad for p in inputs]):
            return
        self._answer("the gradient is not finite", step.batch, step.index)
        alone = self.trainer.world_size == 1
        for parameter, grad in zip(inputs, before, strict=True):
            parameter.grad = grad if alone else torch.zeros_like(parameter)
        if alone:  # several ranks skip the step together
            self.backward(self.training_step(step.batch, step.index) * factor, *args, **kwargs)

    def _differentiate(
        self, step: _Taken, factor: Tensor, before: Sequence[Tensor | None], *args: Any, **kwargs: Any
    ) -> None:
        """Add the gradients of a step to ``before``; in parts where they do not fit into memory (``halving``)."""
        inputs = self._parameters_with_gradient()
        while True:
            try:
                with weights_only():
                    (step.loss * factor).backward(*args, inputs=inputs, **kwargs)  # type: ignore[misc]
            except Exception as error:
                if self.trainer.world_size > 1:  # the others are waiting for these gradients
                    raise
                step.loss = step.loss.detach()
                self.objective.limit.retry(error, step.batch, "the gradient of a training step")
            else:
                return
            for parameter, grad in zip(inputs, before, strict=True):
                parameter.grad = None if grad is None else grad.clone()
            step.loss = self._objective(step.batch, step.index).loss

    def _parameters_with_gradient(self) -> list[torch.nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def _place(self, batch_idx: int) -> Place:
        return Place(self.current_epoch, batch_idx, self.global_step, self.trainer.world_size)

    def _answer(self, problem: str, batch: Batch, batch_idx: int) -> None:
        """Leave the frames out that break a step, where the recipe says so.

        Raises:
            BrokenStepError: it does not, or it is no single frame.
        """
        loader: Any = self.trainer.train_dataloader
        frames = loader.dataset if isinstance(loader.dataset, FrameDataset) else None
        bad: list[int] = []
        if frames is not None:
            bad = culprits(self.objective, frames, batch.keys, self._place(batch_idx))
        others = self.trainer.world_size > 1 and problem.startswith(
            "the gradient"
        )  # another rank may have the frame
        if self.recipe.optimizer.broken == "stop" or frames is None or not (bad or others):
            raise broken(problem, frames, bad, self.global_step)
        for index in bad:
            name = frame_names(frames)[index]
            self.left_out[frames.key(index)] = name
            warnings.warn(
                f"{problem} at step {self.global_step}: {name} is left out from here on", stacklevel=2
            )

    def _without_left_out(self, batch: Batch) -> Batch | None:
        """A batch without the structures that are left out; ``None`` if none is left."""
        if not self.left_out.keys() & set(batch.keys):
            return batch
        loader: Any = self.trainer.train_dataloader
        frames = loader.dataset
        number = {frames.key(i): i for i in range(len(frames))}
        kept = [frames[number[key]] for key in batch.keys if key not in self.left_out]
        backbone = self.potential.backbone
        return collate(backbone, kept).to(self.device) if kept else None

    # ---- checkpoints -----------------------------------------------------------------------
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen weights out, and a posterior of closed form, which is a piece of its own."""
        closed = self.potential.posterior_config.closed_form
        names = {f"potential.{name}" for name in changing(self.potential, posterior=not closed)}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            k: v for k, v in state.items() if k in names or k.startswith("likelihood.")
        }
        own = {"usual": asdict(self.usual), "left_out": list(self.left_out.items())}
        checkpoint["blip_ft"] = numbers_of(self.potential) | own

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What is no tensor."""
        state = {k.removeprefix("potential."): v for k, v in checkpoint["state_dict"].items()}
        match_precision(self.potential, state)
        own = checkpoint["blip_ft"]
        set_numbers(self.potential, own)
        self.usual = Usual(**own["usual"])
        self.left_out.update(own["left_out"])

    def _log(self, name: str, value: Any, *, batch: Batch, prog_bar: bool = False) -> None:
        self.log(name, value, prog_bar=prog_bar, batch_size=batch.n_structures, sync_dist=True, on_step=True)

    # ---- validation ----------------------------------------------------------------------
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect errors and spreads; autograd forces need gradients also here."""
        del batch_idx
        # a closed form is fitted anew at the end: the epochs before and after its first fit are compared by their means
        closed = self.potential.posterior_config.closed_form
        draws = 0 if self.plain or closed else VALIDATION_DRAWS
        with self.potential.posterior.unwatched():
            moments = predict_collated(self.potential, batch, n_draws=draws)
        assert moments.mean.forces is not None
        error = moments.mean.forces - batch.labels["forces"]
        spread = torch.zeros_like(error) if moments.forces_std is None else moments.forces_std
        energy = (moments.mean.energy - batch.labels["energy"]) / batch.n_atoms
        self._validation.append((error.flatten().cpu(), spread.flatten().cpu(), energy.cpu()))

    def held_out_scores(self) -> dict[str, Tensor]:
        """Scores of what the validation steps have collected, pooled over ranks; forgets it."""
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
        return scores

    def on_validation_epoch_end(self) -> None:
        """Log held-out scores."""
        for name, value in self.held_out_scores().items():
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
