"""What one training step minimises, for every kind of objective.

With data terms D_n of the structures, N training structures and temperature T,

===============  ===========================  ====================================================
``kind``         D_n                          beside the mean over structures of D_n
===============  ===========================  ====================================================
``elbo``         E_q[NLL_n]                   T/N KL(q || p)
``crps``         CRPS_n                       T/N of the KL of the mean
``elbo+crps``    E_q[NLL_n] + weight CRPS_n   T/N KL(q || p)
``function_kl``  E_q[NLL_n]                   T/N sum over replayed structures of their KL
===============  ===========================  ====================================================

The expectations are means over ``draws`` independent samples. Families with a KL for each structure
(``adaptive``) add T KL_n to D_n where the table has KL(q || p). Plain fine-tuning is NLL_n of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip_ft.backbone import Batch, Prediction
from blip_ft.config import Recipe
from blip_ft.objectives import ElboScale, Likelihood, function_kl, label_crps
from blip_ft.potential import BayesianPotential

if TYPE_CHECKING:
    from blip_ft.training.memory import Memory
    from blip_ft.training.replay import Replay


@dataclass
class StepLoss:
    """The loss of one rank's share of a step, and its parts for the log (detached)."""

    loss: Tensor
    data: Tensor
    kl: Tensor
    replay: Tensor | None = None


class Objective:
    """Computes the loss of a step.

    Args:
        potential: the model.
        likelihood: of the labels.
        scale: constants of the mini-batch loss.
        recipe: options.
        plain: the mean's likelihood alone.
        replay: structures for ``function_kl``.
    """

    def __init__(
        self,
        potential: BayesianPotential,
        likelihood: Likelihood,
        scale: ElboScale,
        recipe: Recipe,
        *,
        plain: bool = False,
        replay: Replay | None = None,
    ) -> None:
        self.potential, self.likelihood, self.scale, self.recipe = potential, likelihood, scale, recipe
        self.plain, self.replay = plain, replay
        #: frames of ``data.replay``, whose term stands beside every objective, plain too
        self.memory: Memory | None = None
        options = recipe.objective
        self.kind = "elbo" if plain else options.kind
        self.draws = 1 if plain else options.draws or (1 if self.kind == "elbo" else 2)

    def __call__(self, batch: Batch, *, epoch: int, batch_index: int, step: int, world: int) -> StepLoss:
        """Loss of a rank's share of a step, with the term of replayed frames; arguments as below."""
        out = self._objective(batch, epoch=epoch, batch_index=batch_index, step=step, world=world)
        share = None if self.memory is None else self.memory.batch(epoch, batch_index)
        if self.memory is not None and share is not None:
            share = share.to(batch.n_atoms.device)
            samples, _ = self._samples(share, epoch, step)
            nll = torch.stack([self.likelihood(p, share).total for p in samples]).mean(dim=0)
            term = nll.sum() * self.memory.scale
            out.loss, out.replay = out.loss + term, term.detach()
        return out

    def _objective(self, batch: Batch, *, epoch: int, batch_index: int, step: int, world: int) -> StepLoss:
        """Loss of a rank's share of a step.

        Args:
            batch: this rank's structures.
            epoch: keys the noise, with the structure.
            batch_index: number of the step within the epoch, on all ranks alike.
            step: number of the step within the run, likewise.
            world: number of ranks.
        """
        position = epoch + batch_index / self.scale.steps_per_epoch
        samples, own = self._samples(batch, epoch, step)
        noise = self.likelihood.std
        nll = torch.stack([self.likelihood(p, batch).total for p in samples]).mean(dim=0)
        data = nll
        if "crps" in self.kind:
            crps = label_crps(samples, batch, noise, stress=self.recipe.objective.use_stress)
            data = crps if self.kind == "crps" else nll + self.recipe.objective.crps_weight * crps
        zero = nll.new_zeros(())
        if self.plain:
            return self._total(data, zero, zero, None, position, world)
        if self.kind == "function_kl":
            assert self.replay is not None
            share = self.replay.batch(epoch, batch_index, self.scale.steps_per_epoch)
            each = zero
            if share is not None:
                remembered, _ = self._samples(share.to(batch.n_atoms.device), epoch, step)
                each = function_kl(remembered, share.to(batch.n_atoms.device), noise, self.replay.error).sum()
            # over an epoch every structure comes once, so a step stands for 1/steps of the sum
            return self._total(data, zero, each * world * self.scale.steps_per_epoch, None, position, world)
        if self.kind == "crps":
            kl = self.potential.prior.kl_mean(dict(self.potential.converted.deltas)).double()
            return self._total(data, kl, zero, None, position, world)
        return self._total(data, self.potential.kl().double(), zero, own, position, world)

    def _total(
        self,
        data: Tensor,
        kl: Tensor,
        replayed: Tensor,
        own: Tensor | None,
        position: float,
        world: int,
    ) -> StepLoss:
        """Put the parts together; ``own`` (B,) is the KL of each structure."""
        terms = data if own is None else data + self.scale.structure_weight(position) * own
        loss = self.scale.loss(terms, kl + replayed, epoch=position, world=world)
        share = world / self.scale.divisor
        logged = kl + replayed
        if own is not None:  # in the units of the other families: T/N times it is what the loss has
            logged = logged + self.scale.n_train * share * own.sum()
        return StepLoss(loss, data.detach().sum() * share, logged.detach())

    def _samples(self, batch: Batch, epoch: int, step: int) -> tuple[list[Prediction], Tensor | None]:
        """Predictions with independent noise, and the mean over them of each structure's KL."""
        mode = "off" if self.plain else self.recipe.posterior.mode
        samples: list[Prediction] = []
        own: list[Tensor] = []
        for k in range(self.draws):
            samples.append(
                self.potential(
                    batch,
                    mode=mode,
                    epoch=epoch,
                    step=step,
                    sample=k,
                    stress=self.recipe.objective.use_stress,
                    create_graph=True,
                )
            )
            if self.potential.structure_kl is not None:
                own.append(self.potential.structure_kl)
        return samples, _mean(own)


def _mean(values: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(values)).mean(dim=0) if values else None
