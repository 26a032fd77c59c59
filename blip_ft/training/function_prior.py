"""Structures on which the pretrained model is to be remembered: the term ``function_kl`` of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import datasets
import numpy as np
import torch
from ase import Atoms

from blip_ft.backbones.protocol import Backbone, Batch
from blip_ft.config import Recipe
from blip_ft.data.batch.dataset import FrameDataset, Item, collate
from blip_ft.data.frame import atoms_key, to_atoms
from blip_ft.data.split.context import make_context
from blip_ft.data.split.splits import load_role
from blip_ft.objectives import ElboScale, Likelihood, function_kl
from blip_ft.objectives.likelihood import compared
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.side_by_side import width
from blip_ft.training.terms import Part, Sources, Start, Step, Term
from blip_ft.variational.noise import OFF

#: structures per call when the pretrained model is asked
BATCH = 8


@dataclass
class FunctionPrior:
    """Structures labelled by the pretrained model, each of which comes once per epoch.

    Attributes:
        potential: makes the batches.
        items: structures whose labels are the pretrained model's predictions.
        error: RMSE of the pretrained model on the training labels: ``energy`` eV/atom, ``forces`` eV/Å.
        seed: of their order.
        world: number of ranks.
        rank: this one.
    """

    potential: BayesianPotential
    items: list[Item]
    error: dict[str, float]
    seed: int = 0
    world: int = 1
    rank: int = 0

    def batch(self, epoch: int, batch_index: int, steps: int) -> Batch | None:
        """Structures of this rank in one of the ``steps`` steps of an epoch; ``None`` if there are none."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
        index = order[batch_index::steps][self.rank :: self.world]
        backbone, chosen = self.potential.backbone, [self.items[i] for i in index]
        return collate(backbone, chosen, parts=width(backbone.device)) if chosen else None


@dataclass
class FunctionKl(Term):
    """``function_kl``: KL of the predictions from the pretrained model's.

    Args:
        replay: structures.
        likelihood: of the labels, for their noise.
        scale: constants of the mini-batch loss.
    """

    replay: FunctionPrior
    likelihood: Likelihood
    scale: ElboScale

    @classmethod
    def load(cls, sources: Sources) -> list[Atoms]:
        """See :func:`replayed`."""
        return replayed(sources.recipe, sources.train, sources.potential.backbone, sources.context)

    @classmethod
    def build(cls, start: Start, frames: Sequence[Any]) -> Self:
        """Ask the pretrained model about the structures."""
        assert start.train is not None
        replay = make_function_prior(
            start.potential,
            frames,
            start.train,
            start.likelihood,
            seed=start.recipe.seed,
            world=start.world,
            rank=start.rank,
        )
        return cls(replay, start.likelihood, start.scale)

    def __call__(self, step: Step) -> Part:
        """Over an epoch every structure comes once, so a step stands for 1/steps of the sum."""
        steps = self.scale.steps_per_epoch
        share = self.replay.batch(step.epoch, step.index, steps)
        if share is None:
            return Part("kl", whole=step.zero)
        share = share.to(step.batch.n_atoms.device)
        each = function_kl(step.predict(share), share, self.likelihood.std, self.replay.error)
        return Part("kl", whole=each.sum() * step.world * steps)


def replayed(
    recipe: Recipe, train: datasets.Dataset, backbone: Backbone, context: Sequence[Atoms] = ()
) -> list[Atoms]:
    """The structures that a recipe wants replayed.

    Args:
        recipe: ``objective.frames`` names them. By default they are ``context`` and perturbed copies of
            the training frames.
        train: training frames.
        backbone: must know the elements.
        context: the user's unlabelled structures (``data.context``).

    Raises:
        DataError: they cannot be read, or hold an element that the model does not know.
    """
    options = recipe.objective
    if options.frames is None:
        atoms = [to_atoms(row, labels=False) for row in train]
        made = make_context(atoms, math.ceil(recipe.posterior.perturbed_share * len(atoms)), recipe.seed)
        return [*context, *made]
    rows = load_role(recipe.data, options.frames, labels=False)
    frames = [to_atoms(row, labels=False) for row in rows]
    for row, frame in zip(rows, frames, strict=True):
        backbone.check(frame, file=row["source"], frame=row["frame"])
    return frames


def make_function_prior(
    potential: BayesianPotential,
    frames: Sequence[Atoms],
    train: FrameDataset,
    likelihood: Likelihood,
    *,
    seed: int,
    world: int = 1,
    rank: int = 0,
) -> FunctionPrior:
    """Ask the model, whose mean must be at the pretrained weights, about ``frames``.

    Args:
        potential: not yet trained.
        frames: structures; labels are not looked at.
        train: its labels give the pretrained model's error, at least the label noise.
        likelihood: for the label noise.
        seed: of the order of the structures.
        world: number of ranks.
        rank: this one.
    """
    backbone = potential.backbone
    items = [Item(a, backbone.graph(a), {}, atoms_key(a)) for a in frames]
    for start in range(0, len(items), BATCH):
        chosen = items[start : start + BATCH]
        batch = backbone.collate([i.atoms for i in chosen], [i.graph for i in chosen]).to(backbone.device)
        with torch.no_grad():
            out = potential(batch, OFF)
        assert out.forces is not None
        forces = out.forces.double().cpu().split([len(i.atoms) for i in chosen])
        for item, energy, force in zip(chosen, out.energy.cpu(), forces, strict=True):
            stress = torch.full((6,), torch.nan, dtype=torch.float64)
            item.labels.update(energy=energy, forces=force, stress=stress)
    return FunctionPrior(potential, items, _error(potential, train, likelihood), seed, world, rank)


def _error(potential: BayesianPotential, train: FrameDataset, likelihood: Likelihood) -> dict[str, float]:
    """RMSE by kind on the labels of the training frames."""
    sums = {"energy": [0.0, 0.0], "forces": [0.0, 0.0]}
    for start in range(0, len(train), BATCH):
        items = [train[i] for i in range(start, min(start + BATCH, len(train)))]
        batch = collate(potential.backbone, items).to(potential.backbone.device)
        with torch.no_grad():
            sides = compared(potential(batch, OFF), batch, stress=False)
        for kind, (predicted, label, _) in sides.items():
            square = (predicted - label)[~torch.isnan(label)].square()
            sums[kind][0] += float(square.sum())
            sums[kind][1] += square.numel()
    noise = likelihood.std
    return {k: max(noise[k], math.sqrt(total / n) if n else 0.0) for k, (total, n) in sums.items()}
