"""Fits a subspace posterior to a model and its training frames.

The posterior's mathematics is in ``variational.posteriors.subspace``; here are its inputs:
gradient rows of training and context frames, and the Gauss-Newton matrix averaged over real draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from rich.console import Console
from torch import Tensor

from blip_ft.backbone import Batch
from blip_ft.config import Recipe
from blip_ft.data import FrameDataset
from blip_ft.data.context import make_context
from blip_ft.data.dataset import Item, collate, content_key
from blip_ft.objectives.likelihood import frame_weights
from blip_ft.potential import BayesianPotential
from blip_ft.uncertainty.jacobian import output_gradients, random_signs
from blip_ft.uncertainty.predict import predict_set
from blip_ft.variational.posteriors.subspace import (
    Rows,
    SubspaceData,
    SubspacePosterior,
    as_good,
    gauss_newton_step,
    geometric_mean,
    labelled,
)

#: structures per backward call
BATCH = 6
#: lengths of a Gauss-Newton step that are tried; random projections overshoot, so short ones too
STEP_LENGTHS = (0.25, 0.5, 0.75, 1.0)
#: draws per training structure, one after the other, that the last covariance is averaged over
FINAL_DRAWS = 2


@dataclass
class SubspaceFitter:
    """Everything that stays the same between fits of one run.

    Args:
        recipe: options.
        potential: its posterior is set.
        sets: needs ``train`` and ``validation``.
        console: for progress.
        unlabelled: structures (``data.context``) whose directions are in beside those of perturbed
            training frames.
        moved: called after every Gauss-Newton step of the mean.
    """

    recipe: Recipe
    potential: BayesianPotential
    sets: dict[str, FrameDataset]
    console: Console
    unlabelled: Sequence[Atoms] = ()
    moved: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        options, train = self.recipe.posterior, self.sets["train"]
        count = math.ceil(options.context * len(train))
        atoms = [train[i].atoms for i in range(len(train))]
        backbone = self.potential.backbone
        made = make_context(atoms, count, self.recipe.seed)
        self.context = [
            Item(a, backbone.graph(a), {}, content_key(a.numbers, a.positions, a.cell.array)) for a in made
        ]
        self.groups = groups_of(train)
        self.projections = self.recipe.posterior.projections
        self.round = 0  # the fits of one final call take different projections

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
            final: with all projections, and an average over more draws.
        """
        recipe = self.recipe
        scale = recipe.posterior.prior_scale
        steps: list[float] = []
        rows: Rows | None
        rounds = max(1, recipe.posterior.mean_steps) if final else 1
        for self.round in range(rounds):
            # fits that only steer the noise in training or move the mean do with half the projections
            last = final and self.round == rounds - 1
            self.projections = max(1, recipe.posterior.projections // (1 if last else 2))
            rows = None  # as large as all that follows: free it before the next
            rows = self.rows()
            report = self.posterior.fit(
                SubspaceData(
                    rows=rows,
                    prior_scale=None if scale == "auto" else float(scale),
                    temperature=recipe.objective.kl_temperature,
                )
            )
            if recipe.posterior.mean_steps:
                steps.append(self.move_mean(rows, report["prior_scale"]))
                if self.moved is not None:
                    self.moved()
        report["mean_steps"] = steps
        return self.settle(report, final=final)

    def settle(self, report: dict[str, Any], *, final: bool) -> dict[str, Any]:
        """Covariance from real draws along the directions as they are.

        Args:
            report: of the posterior's fit: ``prior_scale`` and ``temperature``; completed and returned.
            final: average over more draws.
        """
        s, t = report["prior_scale"], report["temperature"]
        if final:
            # in training the mean keeps the wide prior it started with: an s from the first fit's few
            # projections can be several times too small, and would pull the mean back
            self.potential.prior.prior_scale = s
        self.potential.amplitude = self.recipe.posterior.amplitude
        # draws of the linearised covariance can leave the linear regime: gradients are larger there and the
        # next covariance too narrow, the one after it too wide again; their geometric mean is neither
        self.projections = max(1, self.recipe.posterior.projections // 2)
        for draw in range(FINAL_DRAWS if final else 1):
            before = self.posterior.precision()
            self.posterior.set_covariance(self.mean_hessian(draw), s, t)
            if draw:
                self.posterior.set_precision(geometric_mean(before, self.posterior.precision()))
        report |= {
            "amplitude": self.potential.amplitude,
            "effective_parameters": self.posterior.effective_parameters(),
        }
        self.potential.fit_reports.append({"final": final} | report)
        self.console.print(
            f"posterior: {self.posterior.rank} directions of {report['n_rows']} gradients hold "
            f"{100 * report['captured']:.0f} % of the spread; prior scale {s:.3g}, "
            f"{report['effective_parameters']:.0f} effective parameters, "
            f"draws at {self.potential.amplitude:.2g} of the width"
        )
        return report

    def move_mean(self, rows: Rows, scale: float) -> float:
        """A damped Gauss-Newton step of the mean, of the length that validation frames prefer.

        Returns:
            Length in units of the full step, one of :data:`STEP_LENGTHS`; 0 where none helps.
        """
        known = rows.is_train
        assert rows.errors is not None
        step = gauss_newton_step(labelled(rows.gradients, known), rows.errors[known], scale)
        deltas, sites = self.potential.converted.deltas, self.posterior.sites
        parts = step.split([s.numel for s in sites])
        moves = {
            s.name: part.reshape(s.shape) * self.potential.prior.rms(s.name)
            for s, part in zip(sites, parts, strict=True)
        }
        at_rest = self.validation_misfit()
        scores: dict[float, Misfit] = {}
        at = 0.0
        with torch.no_grad():
            for length in (*STEP_LENGTHS, None):  # the last round sets the best one
                target = length or self._length(at_rest, scores)
                for name, move in moves.items():
                    deltas[name].add_((target - at) * move)
                at = target
                if length is not None:
                    scores[length] = self.validation_misfit()
        return at

    @staticmethod
    def _length(at_rest: Misfit, scores: dict[float, Misfit]) -> float:
        """The best length, or 0 where staying is within a standard error (paired differences) of it."""
        best = min(scores, key=lambda length: scores[length].value)
        rest = at_rest.by_frame(at_rest)
        return 0.0 if as_good(rest, scores[best].by_frame(at_rest)) else best

    def validation_misfit(self) -> Misfit:
        """Errors of the mean weights on the validation frames."""
        p = predict_set(self.potential, self.sets["validation"], "validation", n_draws=0, stress=False)
        frames = range(len(p.n_atoms))
        forces = [p.forces_error[p.structure == i].ravel() for i in frames]
        return Misfit([[f, np.atleast_1d(e)] for f, e in zip(forces, p.energy_error, strict=True)])

    # ---- rows ------------------------------------------------------------------------------
    def rows(self) -> Rows:
        """Gradient rows of training and context frames at the present mean."""
        train = self.sets["train"]
        items = [train[i] for i in range(len(train))]
        targets, errors, groups, scored = [], [], [], []
        frames = [*items, *self.context]
        # filled in place: these rows are the largest thing that a fit holds (posterior.max_bytes)
        backbone, sites = self.potential.backbone, self.potential.posterior.sites
        gradients = torch.empty(
            len(frames) * (1 + self.projections),
            sum(s.numel for s in sites),
            dtype=backbone.dtype,
            device=backbone.device,
        )
        done = 0
        for index, batch, values, rows in self._gradients(frames):
            known = bool(batch.labels)
            moved = self._change(batch) if known else []
            outputs = zip(values, rows, self._labels(batch), strict=True)
            for k, (value, gradient, (label, noise)) in enumerate(outputs):
                gradients[done : done + len(index)] = gradient / noise[:, None]
                done += len(index)
                error = (label - value) / noise if known else torch.full_like(noise, torch.nan)
                errors.append(error.cpu().numpy())
                # label minus the model linearised at its mean, moved back to the pretrained weights
                targets.append((error + moved[k] / noise if known else error).cpu().numpy())
                groups += [self.groups[i] if known else "" for i in index]
                scored += [k > 0] * len(index)
        target, counts = np.concatenate(targets), np.array(scored)
        if not np.isfinite(target[counts]).any():  # energies alone are labelled: they are scored then
            counts[:] = True
        return Rows(gradients, target, np.array(groups), counts, np.concatenate(errors))

    def _change(self, batch: Batch) -> list[Tensor]:
        """Linearised change of each output (B,) from the pretrained weights to the present mean.

        Over **all** trained weights, also those without noise: what fine-tuning had to do is what
        the prior's scale has to allow for. One central difference along theta - w0.
        """
        state, deltas = self.potential.converted.noise, self.potential.converted.deltas
        step, out = 0.02, []
        for sign in (1.0, -1.0):
            state.clear()
            state.mode = "draw"
            state.weights = {name: sign * step * d.detach() for name, d in deltas.items()}
            try:
                with torch.no_grad():
                    prediction = self.potential.backbone(batch, forces=True, stress=False)
            finally:
                state.clear()
            out.append([prediction.energy.double(), *self._project_forces(batch, prediction.forces)])
        return [(plus - minus) / (2 * step) for plus, minus in zip(*out, strict=True)]

    def _project_forces(self, batch: Batch, forces: Tensor | None) -> list[Tensor]:
        """Each sign vector times the forces, per structure, (B,) each."""
        assert forces is not None
        zero = torch.zeros(batch.n_structures, dtype=torch.float64, device=forces.device)
        return [
            zero.index_add(0, batch.structure, (direction.to(forces.device) * forces.double()).sum(dim=1))
            for direction in self._signs(batch)
        ]

    def _labels(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Label (B,) and its noise (B,) of every output: the energy, then the projected forces."""
        objective = self.recipe.objective
        n_atoms = batch.n_atoms.double()
        nan = torch.full_like(n_atoms, torch.nan)
        energy = batch.labels.get("energy", nan) - self.potential.reference_energy(batch)
        noise = torch.full_like(n_atoms, objective.forces_std)
        if "forces" in batch.labels:
            # atoms without weight have no label, and their direction is zero
            known = torch.where((_atom_weights(batch) > 0)[:, None], batch.labels["forces"], 0.0)
            forces = self._project_forces(batch, known)
        else:
            forces = [nan] * self.projections
        # a weight multiplies the log likelihood, so it divides the variance
        root = frame_weights(batch).sqrt()
        energy_noise = objective.energy_std * n_atoms
        return [(energy, energy_noise / root), *((f, noise / root) for f in forces)]

    def _signs(self, batch: Batch) -> list[Tensor]:
        root = _atom_weights(batch).sqrt().cpu()[:, None]
        return [
            signs * root for signs in random_signs(batch, self.projections, (self.recipe.seed, self.round))
        ]

    def _gradients(
        self, items: Sequence[Item], *, draw: int | None = None
    ) -> Iterator[tuple[range, Batch, list[Tensor], list[Tensor]]]:
        """(frame indices, batch, outputs, gradients) of frames in batches of equal labels."""
        backbone = self.potential.backbone
        labelled = sum(bool(item.labels) for item in items)
        parts = [range(i, min(i + BATCH, labelled)) for i in range(0, labelled, BATCH)]
        parts += [range(i, min(i + BATCH, len(items))) for i in range(labelled, len(items), BATCH)]
        for part in parts:
            chosen = [items[i] for i in part]
            batch = self._batch(chosen)
            latent = None
            if draw is not None:
                keys = [("hessian", self.potential.seed, draw, key) for key in batch.keys]
                latent = self.potential.amplitude * self.posterior.latent(keys, backbone.dtype)
            values, rows = [], []
            for value, gradient in output_gradients(self.potential, batch, self._signs(batch), latent=latent):
                values.append(value.double())
                rows.append(gradient)
            yield part, batch, values, rows

    def _batch(self, items: Sequence[Item]) -> Batch:
        """A batch of frames that all have labels, or none, on the model's device."""
        backbone = self.potential.backbone
        if items[0].labels:
            return collate(backbone, items).to(backbone.device)
        batch = backbone.collate([i.atoms for i in items], [i.graph for i in items])
        batch.keys = [i.key for i in items]
        return batch.to(backbone.device)

    def mean_hessian(self, draw: int) -> np.ndarray:
        """H = sum over training rows of g g^T in the latent space, each structure at a draw of its own.

        Draws are as wide as those of training and prediction (``posterior.amplitude``).
        """
        train = self.sets["train"]
        total: np.ndarray = np.zeros((self.posterior.rank, self.posterior.rank))
        directions = self.posterior.directions.T
        for _, batch, values, rows in self._gradients([train[i] for i in range(len(train))], draw=draw):
            for value, gradient, (label, noise) in zip(values, rows, self._labels(batch), strict=True):
                g = ((gradient @ directions).double() / noise[:, None])[torch.isfinite(label - value)]
                total += (g.T @ g).cpu().numpy()
        return total


class Misfit:
    """NLL of labels under Laplacian noise of unknown width, of energies and forces each.

    At the best width it is n log(mean |error|) for n labels of a kind, up to a constant: a step may not
    pay for forces with energies that are many times worse, however small beside the objective's noise.

    Args:
        errors: for every frame the errors of each kind; not finite where there is no label.

    Attributes:
        widths: mean |error| of each kind, NaN without labels.
        value: the NLL per frame.
    """

    def __init__(self, errors: Sequence[Sequence[np.ndarray]]) -> None:
        known = [[np.abs(e[np.isfinite(e)]) for e in kinds] for kinds in errors]
        self._sums = np.array([[e.sum() for e in kinds] for kinds in known])
        counts = np.array([[e.size for e in kinds] for kinds in known]).sum(axis=0)
        self.widths = [
            max(float(total) / n, 1e-9) if n else math.nan
            for total, n in zip(self._sums.sum(axis=0), counts, strict=True)
        ]
        terms = [n * math.log(b) for n, b in zip(counts, self.widths, strict=True) if n]
        self.value = sum(terms) / len(errors)

    def by_frame(self, other: Misfit) -> np.ndarray:
        """(F,) NLL of every frame, up to a constant, with the widths of another."""
        terms: np.ndarray = np.nansum(self._sums / np.array(other.widths), axis=1)
        return terms


def _atom_weights(batch: Batch) -> Tensor:
    """(n,) weights of the atoms' force terms; ones for context frames."""
    return batch.labels.get("atom_weight", torch.ones_like(batch.numbers, dtype=torch.float64))


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
