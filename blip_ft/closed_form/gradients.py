"""Gradients of model outputs with respect to the noisy weights: what closed-form posteriors are fitted to.

One row for the energy of a frame and one for each of its force components, or for each of R random
projections of them that stand for all (``uncertainty.jacobian``: ``random_signs``, ``random_orthonormal``). Rows are
held side by side (:meth:`GradientRows.rows`), or reduced to the features of a family that holds none as they are made
(:meth:`GradientRows.features`), some thousand at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from blip_ft.backbones.protocol import Batch
from blip_ft.closed_form.row_order import merged, places
from blip_ft.config import ObjectiveConfig
from blip_ft.data.batch.dataset import FrameDataset, Item, collate
from blip_ft.families.base.linear import LinearizedModel
from blip_ft.objectives.likelihood import frame_weights
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system import divided
from blip_ft.system.out_of_memory import by_halves
from blip_ft.system.side_by_side import side_by_side, width
from blip_ft.uncertainty.jacobian import all_components, output_gradients, random_orthonormal, random_signs

#: structures whose graphs are held at the same time
BATCH = 6
#: features that are held at the same time, on each rank
CHUNK = 2048


@dataclass(frozen=True)
class _Outputs:
    """What belongs to the rows of some frames: see ``LinearizedModel``."""

    targets: np.ndarray
    errors: np.ndarray
    scored: np.ndarray
    groups: list[str]
    keys: list[int]


class _Frames(Sequence[Item]):
    """Some frames of a set; made, or taken from its cache, when they are asked for."""

    def __init__(self, frames: FrameDataset) -> None:
        self.frames, self.chosen = frames, list(range(len(frames)))
        self.sizes = frames.sizes("atoms")

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, number: int) -> Item: ...

    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...

    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self.frames[i] for i in self.chosen[number]]
        return self.frames[self.chosen[number]]

    def leave_out(self, keys: Collection[int]) -> list[int]:
        """Without those of some keys; returns the numbers of those that stay."""
        kept = [n for n, i in enumerate(self.chosen) if self.frames.key(i) not in keys]
        self.chosen, self.sizes = [self.chosen[n] for n in kept], [self.sizes[n] for n in kept]
        return kept


class GradientRows:
    """Makes the rows of one run's frames at the present mean; ranks divide them, and have all in the end.

    Args:
        objective: has the noise of the labels.
        potential: the model.
        train: labelled frames.
        context: frames without labels, whose rows may be wanted too.
        seed: of the random projections.
        orthonormal: projections are orthonormal (``random_orthonormal``), and never more than there are components.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        potential: BayesianPotential,
        train: FrameDataset,
        context: Sequence[Item] = (),
        *,
        seed: int = 0,
        orthonormal: bool = False,
    ) -> None:
        self.objective, self.potential, self.seed, self.orthonormal = objective, potential, seed, orthonormal
        self.labelled = _Frames(train)
        self.context = list(context)
        self.groups = groups_of(train)

    def leave_out(self, keys: Collection[int]) -> None:
        """Make no rows of some training frames from here on."""
        self.groups = [self.groups[i] for i in self.labelled.leave_out(keys)]

    def _counts(self, sizes: np.ndarray, projections: int | None) -> np.ndarray:
        """Rows of frames of so many atoms."""
        if projections is None:
            return 1 + 3 * sizes
        return 1 + (
            np.minimum(projections, 3 * sizes) if self.orthonormal else np.full_like(sizes, projections)
        )

    def rows(
        self,
        projections: int | None,
        *,
        number: int = 0,
        context: bool = False,
        progress: Callable[[int], object] = lambda n: None,
    ) -> LinearizedModel:
        """LinearizedModel of training frames, and of context frames behind them.

        Args:
            projections: R per frame; ``None`` for every force component.
            number: other numbers give other projections.
            context: also rows of the context frames.
            progress: called with the number of frames done after each batch.
        """
        parts, sizes = self._parts(labelled=True), np.array(self.labelled.sizes)
        if context:
            parts += self._parts(labelled=False)
            sizes = np.concatenate([sizes, [len(i.atoms) for i in self.context]]).astype(np.int64)
        return self._make(parts, sizes, projections, number, progress)

    def features(
        self,
        reduce: Callable[[Tensor], Tensor],
        width: int,
        projections: int | None,
        *,
        number: int = 0,
        progress: Callable[[int], object] = lambda n: None,
    ) -> Iterator[LinearizedModel]:
        """The rows of training frames, reduced as they are made; some thousand at a time, in the order of the frames.

        Frames without labels have rows too, with NaN for targets.

        Args:
            reduce: (B, P) gradients, weights in units of rms -> (B, width) features.
            width: numbers of a row.
            projections: R per frame; ``None`` for every force component.
            number: other numbers give other projections.
            progress: called with the number of frames done after each batch.
        """
        sizes = np.array(self.labelled.sizes)
        counts, most = self._counts(sizes, projections), CHUNK * divided.world_size()
        chunk: list[range] = []
        rows = 0
        for part in self._parts(labelled=True):
            chunk.append(part)
            rows += int(counts[part.start : part.stop].sum())
            if rows >= most:
                yield self._make(chunk, sizes, projections, number, progress, (reduce, width))
                chunk, rows = [], 0
        if chunk:
            yield self._make(chunk, sizes, projections, number, progress, (reduce, width))

    def _make(
        self,
        parts: Sequence[range],
        sizes: np.ndarray,
        projections: int | None,
        number: int,
        progress: Callable[[int], object],
        reduced: tuple[Callable[[Tensor], Tensor], int] | None = None,
    ) -> LinearizedModel:
        """Rows of consecutive batches of frames, labelled ones before context; with ``reduce`` and ``width`` of
        :meth:`features` their features.
        """
        counts, first = self._counts(sizes, projections), parts[0].start if parts else 0
        # filled in place: these rows are the largest thing that a fit holds (posterior.max_bytes)
        backbone, sites = self.potential.backbone, self.potential.posterior.sites
        weights = sum(s.numel for s in sites)
        ends = [0, *np.cumsum(counts[first : parts[-1].stop if parts else 0]).tolist()]
        gradients = torch.empty(
            ends[-1],
            weights if reduced is None else reduced[1],
            dtype=backbone.dtype,
            device=backbone.device,
        )

        def of(part: range) -> Tensor:
            return gradients[ends[part.start - first] : ends[part.stop - first]]

        def work(part: range) -> _Outputs:
            place = of(part)

            def piece(some: range) -> tuple[np.ndarray, _Outputs]:
                at = places(part, some, counts)
                items = [self._frame(i) for i in some]
                return at, self._fill(place, at, items, some, projections, number, reduced and reduced[0])

            made = by_halves(piece, part, sizes[part.start : part.stop].tolist(), what="gradient rows")
            progress(len(part))
            return merged(made)

        done = divided.divided(lambda some: side_by_side(work, some, threads=width(backbone.device)), parts)
        divided.exchange([of(part) for part in parts])
        labels = np.concatenate([d.targets for d in done])
        counted = np.concatenate([d.scored for d in done])
        # energies alone are labelled: they are scored then; of features, what has been collected says so
        if reduced is None and not np.isfinite(labels[counted]).any():
            counted[:] = True
        return LinearizedModel(
            gradients,
            labels,
            np.array([g for d in done for g in d.groups]),
            counted,
            np.concatenate([d.errors for d in done]),
            np.array([key for d in done for key in d.keys], dtype=np.int64),
        )

    def _frame(self, number: int) -> Item:
        """A training frame, or a context frame behind them."""
        known = len(self.labelled)
        return self.labelled[number] if number < known else self.context[number - known]

    def _fill(
        self,
        place: Tensor,
        at: np.ndarray,
        items: Sequence[Item],
        part: range,
        projections: int | None,
        number: int,
        reduce: Callable[[Tensor], Tensor] | None,
    ) -> _Outputs:
        """LinearizedModel of one batch of frames, energies first, at their places, and what belongs to them."""
        whole, index = len(at) == len(place), torch.from_numpy(at).to(place.device)
        batch = self._batch(items)
        directions = self._directions(batch, projections, number)
        known, has = bool(batch.labels), batch.n_atoms
        moved = self._change(batch, directions) if known else []
        labels = self._labels(batch, directions)
        targets, errors, groups, keys, scored, done = [], [], [], [], [], 0
        for k, (value, gradient) in enumerate(output_gradients(self.potential, batch, directions)):
            value, (label, noise) = value.double(), labels[k]
            # smaller frames of the batch have no such component
            cut = k and (projections is None or self.orthonormal)
            mine = k <= 3 * has if cut else torch.ones_like(has, dtype=torch.bool)
            n = int(mine.sum())
            if reduce is not None:
                gradient = reduce(gradient)
            chosen, unit = gradient if n == len(mine) else gradient[mine], noise[mine].to(gradient)[:, None]
            if whole:
                torch.div(chosen, unit, out=place[done : done + n])
            else:
                place[index[done : done + n]] = chosen / unit
            done += n
            error = (label - value) / noise if known else torch.full_like(noise, torch.nan)
            errors.append(error[mine].cpu().numpy())
            # label minus the model linearised at its mean, moved back to the pretrained weights
            target = error + moved[k] / noise if known else error
            targets.append(target[mine].cpu().numpy())
            chosen_frames = [i for i, m in enumerate(mine.tolist()) if m]
            groups += [self.groups[part[i]] if known else "" for i in chosen_frames]
            keys += [batch.keys[i] for i in chosen_frames]
            scored += [k > 0] * n
        return _Outputs(np.concatenate(targets), np.concatenate(errors), np.array(scored), groups, keys)

    def hessian(self, basis: Tensor, projections: int | None, draw: int) -> np.ndarray:
        """H = sum over training rows of g g^T along a basis of the weights, each structure at a draw of its own.

        Draws are as wide as those of training and prediction (``BayesianPotential.amplitude``).

        Args:
            basis: (r, P) directions of the noisy weights, in units of rms(w0).
            projections: R per frame; ``None`` for every force component.
            draw: number of the draw.

        Returns:
            (r, r).
        """
        posterior, dtype = self.potential.posterior, self.potential.backbone.dtype
        directions_of_weights = basis.T

        def work(part: range) -> np.ndarray:
            total: np.ndarray = np.zeros((len(basis), len(basis)))
            batch = self._batch([self.labelled[i] for i in part])
            keys = [("hessian", self.potential.seed, draw, key) for key in batch.keys]
            latent = self.potential.amplitude * posterior.latent(keys, dtype)
            directions = self._directions(batch, projections, 0)
            labels = self._labels(batch, directions)
            outputs = output_gradients(self.potential, batch, directions, latent=latent)
            for (value, gradient), (label, noise) in zip(outputs, labels, strict=True):
                g = (gradient @ directions_of_weights).double() / noise[:, None]
                g = g[torch.isfinite(label - value.double())]
                total += (g.T @ g).cpu().numpy()
            return total

        def by_part(part: range) -> np.ndarray:
            sizes = [self.labelled.sizes[i] for i in part]
            halves = by_halves(work, part, sizes, what="gradient rows")
            return sum(halves[1:], halves[0])

        threads = width(self.potential.backbone.device)
        parts = self._parts(labelled=True)
        matrices = divided.divided(lambda some: side_by_side(by_part, some, threads=threads), parts)
        out: np.ndarray = np.sum(matrices, axis=0)
        return out

    def _change(self, batch: Batch, directions: Sequence[Tensor]) -> list[Tensor]:
        """Linearised change of each output (B,) from the pretrained weights to the present mean.

        Over **all** trained weights, also those without noise: what fine-tuning had to do is what
        the prior's scale has to allow for. One central difference along theta - w0.
        """
        state, deltas = self.potential.converted.noise, self.potential.converted.deltas
        step, out = 0.02, []
        for sign in (1.0, -1.0):
            weights = {name: sign * step * d.detach() for name, d in deltas.items()}
            with state.perturbed("draw", weights), torch.no_grad():
                prediction = self.potential.backbone(batch, forces=True, stress=False)
            out.append([prediction.energy.double(), *_project_forces(batch, directions, prediction.forces)])
        return [(plus - minus) / (2 * step) for plus, minus in zip(*out, strict=True)]

    def _labels(self, batch: Batch, directions: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Label (B,) and its noise (B,) of every output: the energy, then the forces along directions."""
        objective = self.objective
        n_atoms = batch.n_atoms.double()
        nan = torch.full_like(n_atoms, torch.nan)
        energy = batch.labels.get("energy", nan) - self.potential.reference_energy(batch)
        noise = torch.full_like(n_atoms, objective.forces_std)
        if "forces" in batch.labels:
            # atoms without weight have no label, and their direction is zero
            known = torch.where((_atom_weights(batch) > 0)[:, None], batch.labels["forces"], 0.0)
            forces = _project_forces(batch, directions, known)
        else:
            forces = [nan] * len(directions)
        # a weight multiplies the log likelihood, so it divides the variance
        root = frame_weights(batch).sqrt()
        energy_noise = objective.energy_std * n_atoms
        return [(energy, energy_noise / root), *((f, noise / root) for f in forces)]

    def _directions(self, batch: Batch, projections: int | None, number: int) -> list[Tensor]:
        """(n, 3) vectors along which forces are taken, times the root of the atoms' weights."""
        root = _atom_weights(batch).sqrt().cpu()[:, None]
        if projections is None:
            chosen = all_components(batch)
        else:
            draw = random_orthonormal if self.orthonormal else random_signs
            chosen = draw(batch, projections, (self.seed, number))
        return [d * root for d in chosen]

    def _parts(self, *, labelled: bool) -> list[range]:
        """Batches of the training frames, or of context frames behind them; those that are in work together have
        :data:`BATCH` frames.
        """
        size = max(1, BATCH // width(self.potential.backbone.device))
        start, stop = (
            (0, len(self.labelled))
            if labelled
            else (len(self.labelled), len(self.labelled) + len(self.context))
        )
        return [range(i, min(i + size, stop)) for i in range(start, stop, size)]

    def _batch(self, items: Sequence[Item]) -> Batch:
        """A batch of frames that all have labels, or none, on the model's device."""
        backbone = self.potential.backbone
        if items[0].labels:
            return collate(backbone, items).to(backbone.device)
        batch = backbone.collate([i.atoms for i in items], [i.graph for i in items])
        batch.keys = [i.key for i in items]
        return batch.to(backbone.device)


def _project_forces(batch: Batch, directions: Sequence[Tensor], forces: Tensor | None) -> list[Tensor]:
    """Each direction times the forces, per structure, (B,) each."""
    assert forces is not None
    zero = torch.zeros(batch.n_structures, dtype=torch.float64, device=forces.device)
    return [
        zero.index_add(0, batch.structure, (direction.to(forces.device) * forces.double()).sum(dim=1))
        for direction in directions
    ]


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
