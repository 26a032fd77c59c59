"""Terms of the loss: what each needs, and what it adds to a step.

With N training structures and temperature T the loss of a step is

    mean over structures of the parts that each has  +  T/N (with its warm-up) the parts of the whole  +  what
    stands alone.

===============  =========================================  ==========================================
term             each structure                             of the whole
===============  =========================================  ==========================================
``likelihood``   E_q[NLL_n]
``crps``         CRPS_n, times ``objective.crps_weight``
                 where the likelihood stands beside it
``kl``           T KL_n of its own weights (``adaptive``)   KL(q || p)
``kl_of_mean``                                              KL of the mean
``function_kl``                                             sum over replayed structures of their KL
``rehearsal``    alone: see :mod:`blip_ft.training.replay`
===============  =========================================  ==========================================

The expectations are means over independent noise samples, which all terms of a step share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import datasets
import torch
from ase import Atoms
from torch import Tensor

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.config import Recipe
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.findings import Finding
from blip_ft.objectives import ElboScale, Likelihood, label_crps
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.terms import ObjectiveSpec, TermSpec, everywhere


@dataclass(frozen=True)
class Sources:
    """What a term may take its frames from, before training.

    Attributes:
        recipe: options.
        train: training frames.
        potential: at the pretrained weights, with the references of the training labels.
        context: the user's unlabelled structures (``data.context``).
        findings: what a user should know of the frames is added here.
    """

    recipe: Recipe
    train: datasets.Dataset
    potential: BayesianPotential
    context: Sequence[Atoms] = ()
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """What a term is built from; the potential is still at the pretrained weights.

    Attributes:
        recipe: options.
        potential: the model.
        likelihood: of the labels.
        scale: constants of the mini-batch loss.
        train: training frames; ``None`` where nobody asks for them.
        terms: names of all terms of this objective.
        world: number of ranks.
        rank: this one.
    """

    recipe: Recipe
    potential: BayesianPotential
    likelihood: Likelihood
    scale: ElboScale
    train: FrameDataset | None = None
    terms: tuple[str, ...] = ()
    world: int = 1
    rank: int = 0


@dataclass(frozen=True)
class Step:
    """One rank's share of a step.

    Attributes:
        batch: this rank's structures.
        samples: predictions of them with independent noise.
        structure_kl: (B,) KL of each structure's own weights, mean over the samples; ``None`` for families whose
            weights are shared by all structures.
        predict: predictions of other structures in the noise of this step, as many.
        epoch: keys the noise, with the structure.
        index: number of the step within the epoch, on all ranks alike.
        world: number of ranks.
        position: fractional epoch, for the warm-up.
    """

    batch: Batch
    samples: Sequence[Prediction]
    structure_kl: Tensor | None
    predict: Callable[[Batch], Sequence[Prediction]]
    epoch: int
    index: int
    world: int
    position: float

    @property
    def zero(self) -> Tensor:
        """A scalar 0 on the right device, float64."""
        return self.samples[0].energy.new_zeros((), dtype=torch.float64)


@dataclass
class Part:
    """What a term adds to a step.

    Attributes:
        name: in the log, ``train/<name>``; parts of one name are added up.
        each: (b,) of every structure of the batch.
        whole: scalar, weighted by T/N.
        alone: scalar of this rank, added as it is; ranks are averaged.
        logged: for the log, in place of the values above.
    """

    name: str
    each: Tensor | None = None
    whole: Tensor | None = None
    alone: Tensor | None = None
    logged: Tensor | None = None


class Term(ABC):
    """A term of the loss; registered by :func:`blip_ft.terms.term`."""

    @classmethod
    def load(cls, sources: Sources) -> Sequence[Any]:
        """Frames that it needs beside the batches, read and checked before training.

        Raises:
            DataError: they cannot be used.
        """
        del sources
        return ()

    @classmethod
    def build(cls, start: Start, frames: Sequence[Any]) -> Self | None:
        """The term of one rank; ``None`` where it has nothing to do.

        Args:
            start: model and recipe.
            frames: what :meth:`load` returned.
        """
        del start, frames
        return cls()

    @abstractmethod
    def __call__(self, step: Step) -> Part:
        """What it adds to a step; a part of the same name in every step, on every rank."""


@dataclass
class ExpectedNll(Term):
    """``likelihood``: E_q[NLL_n]."""

    likelihood: Likelihood

    @classmethod
    def build(cls, start: Start, frames: Sequence[Any]) -> Self:  # noqa: D102
        del frames
        return cls(start.likelihood)

    def __call__(self, step: Step) -> Part:
        """Mean over the samples."""
        return Part("nll", each=expected_nll(self.likelihood, step.samples, step.batch))


@dataclass
class LabelCrps(Term):
    """``crps``: fair CRPS of the labels, over the noise.

    Args:
        likelihood: of the labels, for their noise.
        stress: score the stress too.
        weight: beside the NLL.
    """

    likelihood: Likelihood
    stress: bool
    weight: float | None

    @classmethod
    def build(cls, start: Start, frames: Sequence[Any]) -> Self:  # noqa: D102
        del frames
        options = start.recipe.objective
        alone = "likelihood" not in start.terms
        return cls(start.likelihood, options.use_stress, None if alone else options.crps_weight)

    def __call__(self, step: Step) -> Part:
        """Logged with the NLL, in whose place or beside which it stands."""
        crps = label_crps(step.samples, step.batch, self.likelihood.std, stress=self.stress)
        return Part("nll", each=crps if self.weight is None else self.weight * crps)


@dataclass
class WeightKl(Term):
    """``kl``: KL of mean and spread from the prior, and that of each structure's own weights."""

    potential: BayesianPotential
    scale: ElboScale

    @classmethod
    def build(cls, start: Start, frames: Sequence[Any]) -> Self:  # noqa: D102
        del frames
        return cls(start.potential, start.scale)

    def __call__(self, step: Step) -> Part:
        """KL(q || p), nats."""
        kl, own = self.potential.kl().double(), step.structure_kl
        if own is None:
            return Part("kl", whole=kl)
        # in the units of the other families: T/N times it is what the loss has
        logged = kl + self.scale.n_train * (step.world / self.scale.divisor) * own.sum()
        return Part(
            "kl", each=self.scale.structure_weight(step.position) * own, whole=kl, logged=logged.detach()
        )


@dataclass
class MeanKl(Term):
    """``kl_of_mean``: KL of the mean alone."""

    potential: BayesianPotential

    @classmethod
    def build(cls, start: Start, frames: Sequence[Any]) -> Self:  # noqa: D102
        del frames
        return cls(start.potential)

    def __call__(self, step: Step) -> Part:
        """1/2 |delta|^2 / s^2."""
        del step
        return Part("kl", whole=self.potential.prior.kl_mean(dict(self.potential.converted.deltas)).double())


def expected_nll(likelihood: Likelihood, samples: Sequence[Prediction], batch: Batch) -> Tensor:
    """(B,) mean over samples of the NLL."""
    return torch.stack([likelihood(p, batch).total for p in samples]).mean(dim=0)


def specs_of(objective: ObjectiveSpec) -> list[TermSpec]:
    """Its terms, and those that stand beside every objective."""
    return list({spec.name: spec for spec in (*objective.specs, *everywhere())}.values())


def load_frames(objectives: Sequence[ObjectiveSpec], sources: Sources) -> dict[str, Sequence[Any]]:
    """{term: frames} that the terms of some objectives need.

    Raises:
        DataError: they cannot be used.
    """
    specs = {spec.name: spec for objective in objectives for spec in specs_of(objective)}
    return {name: spec.term_class.load(sources) for name, spec in specs.items()}
