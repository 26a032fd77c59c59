"""Fits a subspace posterior to a model and its training frames.

The posterior's mathematics is in ``variational.posteriors.subspace``; here are its inputs:
gradient rows of training and context frames, the Gauss-Newton matrix averaged over real draws,
and the temperature from validation frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from blip_ft.backbone import Batch
from blip_ft.config import Recipe
from blip_ft.data import FrameDataset
from blip_ft.data.context import make_context
from blip_ft.data.dataset import Item, collate, content_key
from blip_ft.potential import BayesianPotential
from blip_ft.uncertainty.jacobian import output_gradients, random_signs
from blip_ft.variational.posteriors.subspace import Rows, SubspaceData, SubspacePosterior

#: structures per backward call
BATCH = 6
#: temperatures tried on validation frames
TEMPERATURES = tuple(10.0 ** np.arange(0.0, 3.01, 0.25))
#: label noise tried beside them, in units of ``objective.forces_std``
NOISES = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5)


@dataclass
class SubspaceFitter:
    """Everything that stays the same between fits of one run.

    Args:
        recipe: options.
        potential: its posterior is set.
        sets: needs ``train`` and ``validation``.
        console: for progress.
    """

    recipe: Recipe
    potential: BayesianPotential
    sets: dict[str, FrameDataset]
    console: Console
    reports: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        options, train = self.recipe.posterior, self.sets["train"]
        count = math.ceil(options.context * len(train))
        atoms = [train[i].atoms for i in range(len(train))]
        backbone = self.potential.backbone
        self.context = [
            Item(a, backbone.graph(a), {}, content_key(a.numbers, a.positions, a.cell.array))
            for a in make_context(atoms, count, self.recipe.seed)
        ]
        self.groups = groups_of(train)

    @property
    def posterior(self) -> SubspacePosterior:
        """The posterior of the potential."""
        posterior = self.potential.posterior
        assert isinstance(posterior, SubspacePosterior)
        return posterior

    # ---- fits ------------------------------------------------------------------------------
    def fit(self, *, final: bool = False) -> dict[str, Any]:
        """Directions, prior scale and covariance at the present mean.

        Args:
            final: also average the Gauss-Newton matrix over real draws and choose the temperature
                on the validation frames.
        """
        recipe = self.recipe
        scale, temperature = recipe.posterior.prior_scale, recipe.objective.temperature
        data = SubspaceData(
            rows=self.rows,
            prior_scale=None if scale == "auto" else float(scale),
            temperature=None if temperature == "auto" else float(temperature),
        )
        report = self.posterior.fit(data)
        s, t = report["prior_scale"], report["temperature"]
        self.potential.prior.prior_scale = s
        # the linearised covariance can be so wide that draws leave the linear regime; averaging
        # the Gauss-Newton matrix over its own draws pulls it back in (the ELBO's stationary point)
        hessian = self.mean_hessian(1)
        self.posterior.set_covariance(hessian, s, t)
        if final:
            hessian = 0.5 * (hessian + self.mean_hessian(2))
            if temperature == "auto":
                t = self.choose_temperature(hessian, s)
            self.posterior.set_covariance(hessian, s, t)
        report |= {"temperature": t, "effective_parameters": self.posterior.effective_parameters()}
        self.reports.append(report)
        self.console.print(
            f"posterior: {self.posterior.rank} directions from {report['n_rows']} gradients, prior scale {s:.3g}, "
            f"temperature {t:.3g}, {report['effective_parameters']:.0f} effective parameters"
        )
        return report

    # ---- rows ------------------------------------------------------------------------------
    def rows(self) -> Rows:
        """Gradient rows of training and context frames at the present mean."""
        train = self.sets["train"]
        items = [train[i] for i in range(len(train))]
        delta = torch.cat(
            [
                (self.potential.converted.deltas[s.name].detach() / self.potential.prior.rms(s.name)).reshape(
                    -1
                )
                for s in self.posterior.sites
            ]
        )
        gradients, targets, groups, scored = [], [], [], []
        for index, batch, values, rows in self._gradients([*items, *self.context]):
            labelled = bool(batch.labels)
            for k, (value, gradient) in enumerate(zip(values, rows, strict=True)):
                label, noise = self._label(batch, k)
                gradient = gradient / noise[:, None]
                # label minus the model linearised at its mean, moved back to the pretrained weights
                target = (label - value) / noise + (gradient @ delta.to(gradient)).double()
                gradients.append(gradient)
                targets.append(target.cpu().numpy() if labelled else np.full(len(index), np.nan))
                groups += [self.groups[i] if labelled else "" for i in index]
                scored += [k > 0] * len(index)
        return Rows(torch.cat(gradients), np.concatenate(targets), np.array(groups), np.array(scored))

    def _label(self, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """Label (B,) of output k (0: energy; then projected forces) and its noise (B,)."""
        objective, n = self.recipe.objective, batch.n_structures
        nan = torch.full((n,), torch.nan, dtype=torch.float64)
        if k == 0:
            label = batch.labels.get("energy", nan) - self.potential.reference_energy(batch)
            return label, objective.energy_std * batch.n_atoms.double()
        noise = torch.full((n,), objective.forces_std, dtype=torch.float64)
        if "forces" not in batch.labels:
            return nan, noise
        direction = self._signs(batch)[k - 1]
        product = (direction * batch.labels["forces"]).sum(dim=1)
        return torch.zeros(n, dtype=torch.float64).index_add(0, batch.structure, product), noise

    def _signs(self, batch: Batch) -> list[Tensor]:
        return random_signs(batch, self.recipe.posterior.projections, self.recipe.seed)

    def _gradients(
        self, items: Sequence[Item], *, draw: int | None = None
    ) -> Iterator[tuple[range, Batch, list[Tensor], list[Tensor]]]:
        """(frame indices, batch, outputs, gradients) of frames in batches of equal labels."""
        labelled = sum(bool(item.labels) for item in items)
        parts = [range(i, min(i + BATCH, labelled)) for i in range(0, labelled, BATCH)]
        parts += [range(i, min(i + BATCH, len(items))) for i in range(labelled, len(items), BATCH)]
        for part in parts:
            chosen = [items[i] for i in part]
            if chosen[0].labels:
                batch = collate(self.potential.backbone, chosen)
            else:
                batch = self.potential.backbone.collate([c.atoms for c in chosen], [c.graph for c in chosen])
                batch.keys = [c.key for c in chosen]
            latent = None
            if draw is not None:
                keys = [("hessian", self.potential.seed, draw, key) for key in batch.keys]
                latent = self.posterior.latent(keys, self.potential.backbone.dtype)
            values, rows = [], []
            for value, gradient in output_gradients(self.potential, batch, self._signs(batch), latent=latent):
                values.append(value.double())
                rows.append(gradient)
            yield part, batch, values, rows

    def _projected(
        self, items: Sequence[Item], *, draw: int | None = None
    ) -> Iterator[tuple[Batch, int, Any, Any]]:
        """(batch, output k, label minus output over noise (B,), gradients over noise V^T (B, r))."""
        for _, batch, values, rows in self._gradients(items, draw=draw):
            for k, (value, gradient) in enumerate(zip(values, rows, strict=True)):
                label, noise = self._label(batch, k)
                projected = (gradient @ self.posterior.directions.T).double() / noise[:, None]
                yield batch, k, ((label - value) / noise).numpy(), projected.cpu().numpy()

    def mean_hessian(self, draw: int) -> np.ndarray:
        """H = sum over training rows of g g^T in the latent space, each structure at its own draw."""
        train = self.sets["train"]
        total = np.zeros((self.posterior.rank, self.posterior.rank))
        for _, _, error, g in self._projected([train[i] for i in range(len(train))], draw=draw):
            known = np.isfinite(error)
            total += g[known].T @ g[known]
        return total

    def choose_temperature(self, hessian: np.ndarray, scale: float) -> float:
        """T with the best likelihood of the validation forces, with the label noise fitted beside it.

        Projections of a frame's force error on random signs are scored, N(0, a^2 + g^T S g).
        """
        validation = self.sets["validation"]
        errors, rows, units = [], [], []
        for batch, k, error, g in self._projected([validation[i] for i in range(len(validation))]):
            if k > 0:
                known = np.isfinite(error)
                errors.append(error[known])
                rows.append(g[known])
                # squared length of a frame's projection vector
                units.append(3.0 * batch.n_atoms.numpy()[known] / self.recipe.posterior.projections)
        error, g, unit = np.concatenate(errors), np.concatenate(rows), np.concatenate(units)
        best, chosen = math.inf, 1.0
        eye = np.eye(len(hessian))
        for t in TEMPERATURES:
            half = np.linalg.solve(np.linalg.cholesky(eye / scale**2 + hessian / t), g.T)
            spread = (half**2).sum(axis=0)
            for a in NOISES:
                variance = a * a * unit + spread
                nll = float(np.mean(0.5 * np.log(variance) + 0.5 * error**2 / variance))
                if nll < best:
                    best, chosen = nll, t
        return chosen


def groups_of(frames: FrameDataset) -> list[str]:
    """Group of each frame for the left-out rule: as the data say, else quartiles of the energy."""
    named = [str(g) for g in frames.frames["group"]]
    if len(set(named)) > 1:
        return named
    energies = [e if e is not None else math.nan for e in frames.frames["energy"]]
    n_atoms = [len(z) for z in frames.frames["numbers"]]
    per_atom = np.array(energies) / np.array(n_atoms)
    if not np.isfinite(per_atom).all():
        return [str(4 * i // len(named)) for i in range(len(named))]
    ranks = np.argsort(np.argsort(per_atom))
    return [str(4 * int(r) // len(named)) for r in ranks]
