"""What one training step minimises: the sum of the terms that ``objective.kind`` stands for.

Terms and how they enter the loss: :mod:`blip_ft.training.terms`. Plain fine-tuning is the NLL of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.config import Recipe
from blip_ft.objectives import ElboScale, Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.terms import PLAIN, objective_spec
from blip_ft.training.halving import AtomLimit
from blip_ft.training.terms import Part, Start, Step, Term, specs_of
from blip_ft.variational.noise import Noise


@dataclass
class StepLoss:
    """The loss of one rank's share of a step, and its parts by name for the log (detached)."""

    loss: Tensor
    parts: dict[str, Tensor]

    @property
    def data(self) -> Tensor:
        """What the labels add."""
        return self.parts["nll"]

    @property
    def kl(self) -> Tensor:
        """What the prior, or the pretrained model, adds, before T/N."""
        return self.parts["kl"]


class Objective:
    """Computes the loss of a step.

    Args:
        terms: summed in this order.
        potential: the model.
        likelihood: of the labels.
        scale: constants of the mini-batch loss.
        recipe: options.
        draws: independent noise samples per step.
        plain: without noise.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        potential: BayesianPotential,
        likelihood: Likelihood,
        scale: ElboScale,
        recipe: Recipe,
        *,
        draws: int = 1,
        plain: bool = False,
    ) -> None:
        self.terms = list(terms)
        self.potential, self.likelihood, self.scale, self.recipe = potential, likelihood, scale, recipe
        self.draws, self.plain = 1 if plain else draws, plain
        self.limit = AtomLimit(potential, recipe.data.atoms_at_once)

    def __call__(self, batch: Batch, *, epoch: int, batch_index: int, step: int, world: int) -> StepLoss:
        """Loss of a rank's share of a step.

        Args:
            batch: this rank's structures.
            epoch: keys the noise, with the structure.
            batch_index: number of the step within the epoch, on all ranks alike.
            step: number of the step within the run, likewise.
            world: number of ranks.
        """
        samples, own = self._samples(batch, epoch, step)
        position = epoch + batch_index / self.scale.steps_per_epoch
        share = Step(
            batch,
            samples,
            own,
            lambda other: self._samples(other.to(batch.n_atoms.device), epoch, step)[0],
            epoch,
            batch_index,
            world,
            position,
        )
        parts = [term(share) for term in self.terms]
        each = [p.each for p in parts if p.each is not None]
        whole = [p.whole for p in parts if p.whole is not None]
        loss = self.scale.loss(
            _sum(each, share.zero.expand(batch.n_structures)),
            _sum(whole, share.zero),
            epoch=position,
            world=world,
        )
        for part in parts:
            if part.alone is not None:
                loss = loss + part.alone
        return StepLoss(loss, self._logged(parts, share))

    def _logged(self, parts: Sequence[Part], step: Step) -> dict[str, Tensor]:
        """Parts of one name together; those of every structure as their mean."""
        out = {"nll": step.zero, "kl": step.zero}
        each: dict[str, Tensor] = {}
        for part in parts:
            value = part.logged
            if value is None:
                if part.each is not None:  # summed over structures at the end, as in the loss
                    each[part.name] = each[part.name] + part.each if part.name in each else part.each
                scalars = [v for v in (part.whole, part.alone) if v is not None]
                value = _sum(scalars, step.zero)
            out[part.name] = out.get(part.name, step.zero) + value.detach()
        share = step.world / self.scale.divisor
        return out | {name: out[name] + value.detach().sum() * share for name, value in each.items()}

    def _samples(self, batch: Batch, epoch: int, step: int) -> tuple[list[Prediction], Tensor | None]:
        """Predictions with independent noise, and the mean over them of each structure's KL."""
        mode = "off" if self.plain else self.recipe.posterior.noise_mode
        batch = self.limit.parts(batch)
        samples: list[Prediction] = []
        own: list[Tensor] = []
        for k in range(self.draws):
            samples.append(
                self.potential(
                    batch,
                    Noise(mode, epoch=epoch, step=step, sample=k),
                    stress=self.recipe.objective.use_stress,
                    create_graph=True,
                )
            )
            if self.potential.structure_kl is not None:
                own.append(self.potential.structure_kl)
        return samples, torch.stack(own).mean(dim=0) if own else None


def _sum(values: Sequence[Tensor], zero: Tensor) -> Tensor:
    """In their order; ``zero`` for none."""
    return sum(values[1:], values[0]) if values else zero


def make_objective(
    start: Start, *, plain: bool = False, frames: Mapping[str, Sequence[Any]] | None = None
) -> Objective:
    """The objective of a recipe, or that of plain fine-tuning, with all its terms.

    Args:
        start: model and recipe.
        plain: the mean's likelihood alone.
        frames: {term: what it loaded} (``terms.load_frames``).
    """
    options = start.recipe.objective
    spec = PLAIN if plain else objective_spec(options.kind)
    start = replace(start, terms=spec.terms)
    built = (s.term_class.build(start, (frames or {}).get(s.name, ())) for s in specs_of(spec))
    return Objective(
        [term for term in built if term is not None],
        start.potential,
        start.likelihood,
        start.scale,
        start.recipe,
        draws=options.draws or spec.draws,
        plain=plain,
    )
