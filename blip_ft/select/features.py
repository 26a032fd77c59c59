"""What the model says of candidates: rows of gradients in whitened weights, places in feature space, scores.

The posterior of a closed form is N(0, 1) in some coordinates z of the weights, w = theta + A z. A row of a label is
then Psi = A^T g / noise, its prior variance |Psi|^2, and all that selection needs of it. Rows are made once for every
candidate, a batch at a time, and kept on disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from blip_ft.backbones.protocol import Batch
from blip_ft.config import ObjectiveConfig
from blip_ft.errors import BlipError
from blip_ft.files import remedy_of
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.potential.checkpoint import require_space
from blip_ft.potential.distance import FeatureDistance
from blip_ft.select.pool import Pool
from blip_ft.system.out_of_memory import by_halves, is_out_of_memory
from blip_ft.uncertainty import batch_limits
from blip_ft.uncertainty.jacobian import output_gradients, random_orthonormal
from blip_ft.uncertainty.linearized import energy_gradients
from blip_ft.uncertainty.predict import predict_atoms
from blip_ft.variational.noise import OFF

Floats = NDArray[np.float64]
Precision = Literal["float32", "float16"]

#: orthonormal projections of the forces of a candidate
PROJECTIONS = 8
#: numbers of a row, of a family that has no features of its own, at most
MOST_LATENT = 4096
#: structures whose gradients are made in one call
STRUCTURES = 6
#: bytes of rows that are read at a time
BLOCK_BYTES = 2**26


# ---- the posterior in whitened weights ---------------------------------------------------------


@runtime_checkable
class Factored(Protocol):
    """A posterior of features phi with a covariance Sigma = U U^T."""

    factor: Tensor

    def features(self, gradients: Tensor) -> Tensor:
        """(B, P) gradients, weights in units of rms -> (B, m) phi."""


class Whitening:
    """A^T g: gradients of outputs in coordinates in which the posterior is N(0, 1).

    Exact for a family that has features with a covariance of their own (``sketch``); of families whose samples are
    linear in few latent numbers, A are these samples: exact in the directions of ``subspace``, from r samples for
    ``pathwise``.

    Args:
        potential: the model.

    Attributes:
        width: numbers of a row.
        of_features: it is that of a covariance in features, not of samples or directions of the weights.

    Raises:
        BlipError: its posterior has no such coordinates.
    """

    def __init__(self, potential: BayesianPotential) -> None:
        self._potential, posterior = potential, potential.posterior
        remedy = (
            "train with posterior.family=sketch (or pathwise, subspace), or choose by --method top, ood, farthest or "
            "random"
        )
        check_ready(potential)
        self._factor: Tensor | None = None
        self.of_features = isinstance(posterior, Factored)
        if isinstance(posterior, Factored):
            self._factor = posterior.factor
            self.width = len(posterior.factor)
            return
        self.width = posterior.latent_numel
        if posterior.factorised or not posterior.draws_are_weights or self.width > MOST_LATENT:
            raise BlipError(
                f"the posterior '{posterior.family}' has no covariance in few numbers, which selection could "
                "condition on new labels",
                remedy=remedy,
                field="method",
            )

    def __call__(self, gradients: Tensor) -> Tensor:
        """(B, P) gradients, weights in units of rms(w0) -> (B, width)."""
        posterior = self._potential.posterior
        if self._factor is not None:
            assert isinstance(posterior, Factored)
            return posterior.features(gradients) @ self._factor.to(gradients)
        latent = gradients.new_zeros(len(gradients), self.width).requires_grad_(True)
        rms = [self._potential.prior.rms(s.name) for s in posterior.sites]
        parts = gradients.split([s.numel for s in posterior.sites], dim=1)
        along = [(p.reshape(-1, *s.shape) / r) for p, s, r in zip(parts, posterior.sites, rms, strict=True)]
        with torch.enable_grad():
            sampled = posterior.sample(latent)
        (slope,) = torch.autograd.grad([sampled[s.name] for s in posterior.sites], latent, along)
        return slope


# ---- rows on disk ------------------------------------------------------------------------------


class RowFile:
    """Rows of candidates in a file without a name, which is gone when it is closed.

    Args:
        folder: where it is written.
        width: numbers of a row.
        precision: of the numbers.
        rows: that will come, at most.

    Raises:
        BlipError: no space for them.
    """

    def __init__(self, folder: Path, width: int, precision: Precision, rows: int) -> None:
        self.width, self._type, self._folder = width, np.dtype(precision), folder
        require_space(folder, rows * width * self._type.itemsize)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".select-")  # noqa: SIM115 closed by close
        self._counts: list[int] = []
        self._starts: list[int] = [0]

    def append(self, rows: Floats | None) -> None:
        """The (k, width) rows of the next candidate; ``None`` stands for one row of zeros.

        Raises:
            BlipError: they cannot be written.
        """
        rows = np.zeros((1, self.width)) if rows is None else rows
        largest = float(np.finfo(self._type).max)
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(np.clip(rows, -largest, largest).astype(self._type).tobytes())
        except OSError as error:
            raise BlipError(
                f"cannot keep the features of candidates: {error.strerror or error}",
                file=self._folder,
                remedy=remedy_of(error),
            ) from error
        self._counts.append(len(rows))
        self._starts.append(self._starts[-1] + len(rows))

    def __len__(self) -> int:
        return len(self._counts)

    def __getitem__(self, i: int) -> Floats:
        """(k, width) of one candidate."""
        return self._read(self._starts[i], self._counts[i])

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        """All rows in their order, (n, width) at a time."""
        size = max(1, BLOCK_BYTES // (8 * self.width))
        for start in range(0, self._starts[-1], size):
            count = min(size, self._starts[-1] - start)
            yield slice(start, start + count), self._read(start, count)

    def _read(self, start: int, count: int) -> Floats:
        step = self.width * self._type.itemsize
        self._file.seek(start * step)
        data = self._file.read(count * step)
        return np.frombuffer(data, dtype=self._type).reshape(count, self.width).astype(np.float64)

    def close(self) -> None:
        """Remove it."""
        self._file.close()


# ---- one pass over the candidates --------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """How the model is called.

    Attributes:
        structures: in one call, at most.
        atoms: in one call of more than one structure, at most; by default what the device is good for.
        progress: called with the number of candidates done after each call.
    """

    structures: int = STRUCTURES
    atoms: int | None = None
    progress: Callable[[int], object] = lambda n: None


def _each(
    pool: Pool,
    potential: BayesianPotential,
    calls: Calls,
    work: Callable[[Sequence[int], Sequence[Atoms]], list[Any]],
) -> Iterator[tuple[int, Any]]:
    """Number of every candidate and what ``work`` makes of it, in order; by halves where memory runs out.

    ``None`` for a candidate of which the model says nothing, where the pool may leave it out.

    Raises:
        DataError: where it may not.
    """
    limit = batch_limits.default_atoms(potential.backbone.device) if calls.atoms is None else calls.atoms
    frames = pool.frames()
    for batch in batch_limits.bounded(
        frames, lambda item: len(item[1]), structures=calls.structures, atoms=limit
    ):
        numbers, atoms = [i for i, _ in batch], [a for _, a in batch]

        def some(part: range, numbers: list[int] = numbers, atoms: list[Atoms] = atoms) -> list[Any]:
            try:
                return work(numbers[part.start : part.stop], atoms[part.start : part.stop])
            except Exception as error:
                if len(part) > 1 or not is_out_of_memory(error):
                    raise
                return [None]

        done = by_halves(some, range(len(batch)), [len(a) for a in atoms], what="features of candidates")
        for i, value in zip(numbers, chain.from_iterable(done), strict=True):
            if value is None:
                pool.leave_out(
                    i,
                    f"{pool.sizes[i]} atoms do not fit into memory",
                    "take a device with more memory, --dtype float32, or a method that needs less (energy, ood)",
                )
            elif not np.isfinite(value).all():
                pool.leave_out(
                    i,
                    "what the model says of this structure is not finite",
                    "it is far from all that the model knows (atoms on top of each other?): remove it",
                )
                value = None
            yield i, value
        calls.progress(len(batch))


def label_rows(
    pool: Pool,
    potential: BayesianPotential,
    objective: ObjectiveConfig,
    whitening: Whitening,
    calls: Calls,
    *,
    projections: int = PROJECTIONS,
    seed: int = 0,
) -> Iterator[tuple[int, Floats | None]]:
    """Whitened rows of the labels of every candidate: its energy, then projections of its forces.

    Args:
        pool: candidates.
        potential: the model.
        objective: has the noise of the labels.
        whitening: of its posterior.
        calls: of the model.
        projections: orthonormal projections R of the forces of each; all components where there are no more.
        seed: of the projections.

    Yields:
        Number of the candidate, and (1 + min(R, 3n), width) rows over the noise of their labels.
    """

    def work(numbers: Sequence[int], atoms: Sequence[Atoms]) -> list[Floats]:
        batch = _batch(potential, atoms, pool.keys[list(numbers)].tolist())
        counts = [1 + min(projections, 3 * len(a)) for a in atoms]
        directions = random_orthonormal(batch, max(counts) - 1, (seed, 0))
        noise = torch.full((len(atoms),), objective.forces_std, dtype=torch.float64)
        unit = torch.stack([objective.energy_std * batch.n_atoms.cpu().double(), noise])
        columns = []
        for k, (_, gradient) in enumerate(output_gradients(potential, batch, directions)):
            row = whitening(gradient).double().cpu() / unit[min(k, 1)][:, None]
            columns.append(row.numpy())
        return [np.stack([column[b] for column in columns[:count]]) for b, count in enumerate(counts)]

    return _each(pool, potential, calls, work)


def energy_rows(
    pool: Pool,
    potential: BayesianPotential,
    objective: ObjectiveConfig,
    whitening: Whitening,
    calls: Calls,
) -> Iterator[tuple[int, Floats | None]]:
    """The (1, width) row of the energy of every candidate, from the call that gives its forces."""
    sites = potential.posterior.sites

    def work(numbers: Sequence[int], atoms: Sequence[Atoms]) -> list[Floats]:
        batch = _batch(potential, atoms, pool.keys[list(numbers)].tolist())
        _, found = energy_gradients(potential, batch, stress=False)
        flat = torch.cat([(found[s.name] * potential.prior.rms(s.name)).flatten(1) for s in sites], dim=1)
        noise = objective.energy_std * batch.n_atoms.double()[:, None]
        rows = (whitening(flat).double() / noise).cpu().numpy()
        return list(rows[:, None])

    return _each(pool, potential, calls, work)


def places(
    pool: Pool, potential: BayesianPotential, calls: Calls
) -> tuple[Iterator[tuple[int, Floats | None]], int]:
    """(1, f) place of every candidate beside the training atoms: the mean of ``FeatureDistance.coordinates``; and f."""
    known = distance(potential)

    def work(numbers: Sequence[int], atoms: Sequence[Atoms]) -> list[Floats]:
        del numbers
        features, batch = _node_features(potential, atoms)
        found = known.coordinates(features, batch.numbers).split(batch.n_atoms.tolist())
        return [part.mean(dim=0, keepdim=True).numpy() for part in found]

    return _each(pool, potential, calls, work), known.mean.shape[1]


def ood_scores(pool: Pool, potential: BayesianPotential, calls: Calls) -> Iterator[tuple[int, float | None]]:
    """Largest out-of-distribution score of the atoms of every candidate."""
    known = distance(potential)

    def work(numbers: Sequence[int], atoms: Sequence[Atoms]) -> list[float]:
        del numbers
        features, batch = _node_features(potential, atoms)
        parts = known.score(features, batch.numbers).split(batch.n_atoms.tolist())
        return [float(part.max()) for part in parts]

    return _each(pool, potential, calls, work)


def force_stds(pool: Pool, potential: BayesianPotential, calls: Calls) -> Iterator[tuple[int, float | None]]:
    """Root mean square std of the force components of every candidate, eV/Å, from the model's draws."""

    def work(numbers: Sequence[int], atoms: Sequence[Atoms]) -> list[float]:
        del numbers
        return [
            float(np.sqrt(np.mean(np.square(found["forces_std"]))))
            for found in predict_atoms(
                potential, atoms, batch_size=len(atoms), batch_atoms=sum(map(len, atoms))
            )
        ]

    check_ready(potential)
    return _each(pool, potential, calls, work)


def check_ready(potential: BayesianPotential) -> None:
    """Refuse a model without error bars.

    Raises:
        BlipError: it has none.
    """
    if not potential.posterior.ready:
        raise BlipError(
            "the model has no posterior: no weight of it carries noise",
            remedy="choose by --method ood, farthest or random, or train with noise (model.noise)",
            field="method",
        )


def prior_std(
    rows: Floats, atoms: int, method: str, objective: ObjectiveConfig, calibration: Calibration | None
) -> float:
    """What the model does not know of a candidate before the batch: calibrated std, from its rows.

    Returns:
        Root mean square over force components, eV/Å; of the energy, eV/atom, where the rows are energies.
    """
    known = calibration or Calibration.identity()
    if method == "energy":
        return float(np.linalg.norm(rows)) * objective.energy_std * known.energy.scale
    forces = rows[1:]
    # projections stand for all components without bias
    return float(np.sqrt(np.square(forces).sum() / (3 * atoms))) * objective.forces_std * known.forces.scale


def _batch(potential: BayesianPotential, atoms: Sequence[Atoms], keys: list[int]) -> Batch:
    backbone = potential.backbone
    batch = backbone.batch(atoms).to(backbone.device)
    batch.keys = keys
    return batch


def _node_features(potential: BayesianPotential, atoms: Sequence[Atoms]) -> tuple[Tensor, Batch]:
    batch = _batch(potential, atoms, [])
    with torch.no_grad():
        out = potential(batch, OFF, forces=False)
    assert out.node_features is not None
    return out.node_features, batch


def distance(potential: BayesianPotential) -> FeatureDistance:
    """Where its training atoms are.

    Raises:
        BlipError: it does not know.
    """
    if potential.ood is None:
        raise BlipError(
            "the model does not know where its training atoms are in feature space",
            remedy="choose by --method covariance, top or random; a model that fit has trained, of a backbone with "
            "features, has it",
            field="method",
        )
    return potential.ood
