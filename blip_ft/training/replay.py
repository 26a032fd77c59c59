"""Replay against forgetting: frames of a second source in every step, and how far a model has drifted.

The frames are the term ``rehearsal`` of the loss, which stands beside every objective. It adds

    weight ratio mean over replayed frames of NLL,

a term of its own, outside N: replayed frames are no data of the posterior. With weight 1 a replayed
frame pulls as much as a training frame. Labels are the pretrained model's (default), or the frames'
own after their own energy references; both get the references of the training labels on top, so
that one model can fit all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from ase import Atoms

from blip_ft.backbones.protocol import Batch
from blip_ft.config import Recipe
from blip_ft.data.batch.dataset import Item, collate, make_item
from blip_ft.data.check.replay import beside, judge_replay, replayed_rows
from blip_ft.data.findings import Finding
from blip_ft.data.frame import to_atoms
from blip_ft.data.references import fit_references
from blip_ft.data.split.reference_sets import sets_of
from blip_ft.data.split.splits import load_role
from blip_ft.objectives import Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.side_by_side import width
from blip_ft.training.terms import Part, Sources, Start, Step, Term, expected_nll
from blip_ft.uncertainty.predict import predict_atoms


@dataclass
class Replay:
    """Replayed frames and how many of them come with each step.

    Attributes:
        potential: makes the batches.
        items: frames with labels.
        ratio: replayed frames per training frame.
        weight: of the term.
        batch_size: training structures of all ranks in a step, about.
        seed: of the order.
        world: number of ranks.
        rank: this one.
    """

    potential: BayesianPotential
    items: list[Item]
    ratio: float
    weight: float
    batch_size: int
    seed: int = 0
    world: int = 1
    rank: int = 0

    @property
    def per_step(self) -> int:
        """Replayed frames of all ranks in a step."""
        return max(1, round(self.ratio * self.batch_size))

    def batch(self, epoch: int, batch_index: int) -> Batch | None:
        """Frames of this rank in a step, a function of (seed, epoch, step); ``None`` if it has none."""
        first = batch_index * self.per_step
        places = range(first, first + self.per_step)[self.rank :: self.world]
        chosen = [self._at(epoch, place) for place in places]
        backbone = self.potential.backbone
        return collate(backbone, chosen, parts=width(backbone.device)) if chosen else None

    def _at(self, epoch: int, place: int) -> Item:
        """Item of a place in an endless row of permutations."""
        turn, index = divmod(place, len(self.items))
        order = np.random.default_rng([self.seed, epoch, turn]).permutation(len(self.items))
        return self.items[int(order[index])]

    @property
    def scale(self) -> float:
        """Factor of the sum of a rank's NLL: ranks are averaged, hence times their number."""
        return self.weight * self.ratio * self.world / self.per_step


@dataclass
class Rehearsal(Term):
    """``rehearsal``: NLL of replayed frames.

    Args:
        memory: these frames.
        likelihood: of their labels.
    """

    memory: Replay
    likelihood: Likelihood

    @classmethod
    def load(cls, sources: Sources) -> list[Item]:
        """See :func:`load_replay`."""
        return load_replay(sources.recipe, sources.potential, sources.findings)

    @classmethod
    def build(cls, start: Start, frames: Sequence[Any]) -> Self | None:
        """See :func:`make_replay`."""
        memory = make_replay(start.recipe, start.potential, list(frames), world=start.world, rank=start.rank)
        return None if memory is None else cls(memory, start.likelihood)

    def __call__(self, step: Step) -> Part:
        """Beside the objective, not scaled by N."""
        share = self.memory.batch(step.epoch, step.index)
        if share is None:
            return Part("replay", alone=step.zero)
        share = share.to(step.batch.n_atoms.device)
        nll = expected_nll(self.likelihood, step.predict(share), share)
        return Part("replay", alone=nll.sum() * self.memory.scale)


@dataclass
class Probe:
    """Frames on which the pretrained model's predictions are remembered.

    Attributes:
        frames: structures.
        energy: (m,) eV, without the references of the training labels.
        forces: (n, 3) of each, eV/Å.
    """

    frames: list[Atoms]
    energy: np.ndarray = field(default_factory=lambda: np.empty(0))
    forces: list[np.ndarray] = field(default_factory=list)

    def drift(self, potential: BayesianPotential) -> dict[str, float]:
        """Rms change from the pretrained model: ``energy_mev_per_atom``, ``forces_mev_per_ang``.

        A constant per frame size (the energy references) is taken off the energies.
        """
        now = predict_atoms(potential, self.frames, n_draws=0)
        n = np.array([len(a) for a in self.frames])
        own = np.array([sum(potential.references.get(int(z), 0.0) for z in a.numbers) for a in self.frames])
        energy = (np.array([p["energy"] for p in now]) - own - self.energy) / n
        forces = np.concatenate([(p["forces"] - f).ravel() for p, f in zip(now, self.forces, strict=True)])
        return {
            "energy_mev_per_atom": 1e3 * float(np.sqrt(np.mean(energy**2))),
            "forces_mev_per_ang": 1e3 * float(np.sqrt(np.mean(forces**2))),
            "n_structures": float(len(self.frames)),
        }


def load_replay(
    recipe: Recipe, potential: BayesianPotential, findings: list[Finding] | None = None
) -> list[Item]:
    """Replayed frames with their labels; none where the recipe replays nothing.

    Labels of their own are checked as those of the other roles are, and wrong ones left out as
    ``data.bad_labels`` says.

    Args:
        recipe: options.
        potential: at the pretrained weights, with the references of the training labels.
        findings: what a user should know is added here.

    Raises:
        DataError: they cannot be read, have no labels of their own where these are asked for, or labels in a wrong
            unit, or hold an element that the model does not know.
    """
    options = recipe.data.replay
    if options is None or options.source is None:
        return []
    findings = [] if findings is None else findings
    rows = replayed_rows(recipe.data, potential.backbone, findings)
    items = [make_item(row, potential.backbone) for row in rows]
    model = predict_atoms(potential, [item.atoms for item in items], n_draws=0)
    if options.labels == "pretrained":
        for item, p in zip(items, model, strict=True):
            nothing = torch.full((6,), torch.nan, dtype=torch.float64)
            stress = nothing if p["stress"] is None else torch.as_tensor(p["stress"], dtype=torch.float64)
            item.labels |= {
                "energy": torch.tensor(p["energy"], dtype=torch.float64),
                "forces": torch.as_tensor(p["forces"], dtype=torch.float64),
                "stress": stress,
            }
        return items
    if not recipe.model.from_scratch:  # initial weights know no labels to compare with
        compared = [beside(row, item.atoms, p) for row, item, p in zip(rows, items, model, strict=True)]
        judged = judge_replay(recipe, rows, compared, by_state=not potential.backbone.conditions)
        findings += judged.findings
        kept = judged.kept(recipe.data.bad_labels)
        rows, items, model = [rows[i] for i in kept], [items[i] for i in kept], [model[i] for i in kept]
    residual = np.array([float(i.labels["energy"]) - p["energy"] for i, p in zip(items, model, strict=True)])
    sets = recipe.data.reference_sets
    members = (
        sets_of(rows, sets.by) if sets is not None else {"": np.flatnonzero(np.isfinite(residual)).tolist()}
    )
    for index in filter(len, members.values()):  # another level of theory has other atomic energies
        shift = fit_references([items[i].atoms.numbers for i in index], residual[index])
        for item in (items[i] for i in index):
            item.labels["energy"] = item.labels["energy"] - shift.energy(item.atoms.numbers)
    return items


def load_probe(recipe: Recipe, potential: BayesianPotential) -> Probe | None:
    """Probe frames with the pretrained model's predictions; ``None`` where the recipe names none.

    Args:
        recipe: options.
        potential: at the pretrained weights.

    Raises:
        DataError: they cannot be read, or hold an element that the model does not know.
    """
    options = recipe.data.replay
    if options is None or options.probe is None:
        return None
    frames = []
    for row in load_role(recipe.data, options.probe, labels=False):
        frames.append(to_atoms(row, labels=False))
        potential.backbone.check(frames[-1], file=row["source"], frame=row["frame"])
    predictions = predict_atoms(potential, frames, n_draws=0)
    shift = [sum(potential.references.get(int(z), 0.0) for z in a.numbers) for a in frames]
    energy = np.array([p["energy"] for p in predictions]) - np.array(shift)
    return Probe(frames, energy, [np.asarray(p["forces"]) for p in predictions])


def make_replay(
    recipe: Recipe, potential: BayesianPotential, items: list[Item], *, world: int, rank: int
) -> Replay | None:
    """The replay of one rank; ``None`` without frames."""
    options = recipe.data.replay
    if options is None or not items:
        return None
    size = recipe.data.batch_size * world
    if recipe.data.batch_by != "structures":
        size = max(1, math.ceil(size / max(len(item.atoms) for item in items)))
    return Replay(potential, items, options.ratio, options.weight, size, recipe.seed, world, rank)


def describe(drift: dict[str, Any]) -> str:
    """The drift of one model in words."""
    return (
        f"{drift['energy_mev_per_atom']:.2f} meV/atom and {drift['forces_mev_per_ang']:.1f} meV/Å (rms) from the "
        f"pretrained model on {drift['n_structures']:.0f} probe frames"
    )
