"""Means and standard deviations from the fixed posterior draws.

Every draw is an ordinary potential; energy, forces and stress of one draw belong together. Where draws are
single, their mean is reported, so mean forces are the gradient of the mean energy. They are then
centred (``BayesianPotential.draw_latents``), hence the divisor K and not K - 1. Families whose draws come
in pairs (``Posterior.paired``) report the mean weights, the exact std of the energy from the gradient of the
same call, and for all else the spread of half the differences of pairs. Draws are taken at
``BayesianPotential.amplitude`` of the posterior's width, where the model is still close to linear
in its weights, and their stds are divided by it. Covariances of forces from few draws are moved towards
round ones (``shrinkage``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from blip_ft.backbones.protocol import Batch
from blip_ft.data.batch.dataset import FrameDataset, collate
from blip_ft.errors import DataError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.system.out_of_memory import by_halves, is_out_of_memory, release
from blip_ft.system.side_by_side import side_by_side, width
from blip_ft.uncertainty import batch_limits
from blip_ft.uncertainty.draws import moments_of_draws
from blip_ft.uncertainty.linearized import Linearized, predict_linearized
from blip_ft.uncertainty.moments import BatchMoments, to_double
from blip_ft.uncertainty.results import SetPrediction
from blip_ft.uncertainty.shrinkage import shrunk
from blip_ft.variational.noise import OFF

#: how error bars are made
Method = Literal["draws"] | Linearized


def predict_batch(
    potential: BayesianPotential,
    batch: Batch,
    *,
    n_draws: int | None = None,
    stress: bool = True,
    method: Method = "draws",
) -> BatchMoments:
    """Mean and covariance of a batch.

    Args:
        potential: the model.
        batch: structures.
        n_draws: 0 evaluates the mean weights only; with ``method='linear'`` the number of random
            directions, by default all.
        stress: also predict stress.
        method: ``draws``: moments over the fixed draws; ``energy`` and ``linear``: the mean model
            with stds of the linearised one (``linearized``).

    The out-of-distribution score comes from the features of the same calls: with draws from their mean
    over draws, which are those of the mean weights to first order, since draws are centred.
    """
    if len(batch.parts) > 1 and width(potential.backbone.device) > 1:

        def work(part: Batch) -> BatchMoments:
            return predict_batch(potential, part, n_draws=n_draws, stress=stress, method=method)

        return BatchMoments.concatenate(side_by_side(work, batch.parts))
    out = _moments(potential, batch, n_draws=n_draws, stress=stress, method=method)
    features = out.mean.node_features
    if potential.ood is not None and features is not None:
        out.ood_score = potential.ood.score(features, batch.numbers)
    return out


def _moments(
    potential: BayesianPotential, batch: Batch, *, n_draws: int | None, stress: bool, method: Method
) -> BatchMoments:
    """What :func:`predict_batch` returns, without the score."""
    if method != "draws" and n_draws != 0:
        return predict_linearized(potential, batch, method=method, n_directions=n_draws, stress=stress)
    n = potential.n_draws if n_draws is None else n_draws
    if n == 0 or not potential.posterior.ready:
        with torch.no_grad():  # the backbone switches autograd on for its own forces
            return BatchMoments(to_double(potential(batch, OFF, stress=stress)))
    moments = _draws_that_fit(potential, batch, n, stress=stress)
    assert moments.forces_cov is not None
    # draws are centred, or half the differences of pairs
    moments.forces_cov = shrunk(moments.forces_cov, n // 2 if potential.posterior.paired else n - 1)
    if potential.posterior.paired:
        # the mean weights themselves, and the exact std of the energy from the same call
        exact = predict_linearized(potential, batch, method="energy", stress=stress)
        moments.mean, moments.energy_std = exact.mean, exact.energy_std
    return moments


def _draws_that_fit(potential: BayesianPotential, batch: Batch, n: int, *, stress: bool) -> BatchMoments:
    """Moments over the draws; one after the other where memory runs out with several in one call."""
    try:
        return moments_of_draws(potential, batch, n, stress=stress)
    except Exception as error:
        if batch.copies is None or not is_out_of_memory(error):
            raise
    release()
    return moments_of_draws(potential, replace(batch, copies=None, parts=()), n, stress=stress)


def predict_collated(potential: BayesianPotential, batch: Batch, *, n_draws: int) -> BatchMoments:
    """:func:`predict_batch` without stress, for a batch that others have made; by halves where memory runs out.

    Args:
        potential: the model.
        batch: from ``data.dataset.collate``, on the model's device.
        n_draws: draws.
    """
    backbone, items = potential.backbone, batch.items

    def work(some: range) -> BatchMoments:
        whole = len(some) == batch.n_structures
        piece = batch if whole else collate(backbone, items[some.start : some.stop]).to(backbone.device)
        return predict_batch(potential, piece, n_draws=n_draws, stress=False)

    if not items:  # a worker's batch cannot be divided
        return predict_batch(potential, batch, n_draws=n_draws, stress=False)
    sizes = batch.n_atoms.tolist()
    return BatchMoments.concatenate(by_halves(work, range(len(sizes)), sizes, what="validation"))


def predict_set(
    potential: BayesianPotential,
    dataset: FrameDataset,
    name: str,
    *,
    n_draws: int | None = None,
    batch_size: int = batch_limits.STRUCTURES,
    batch_atoms: int | None = None,
    stress: bool = True,
    method: Method = "draws",
    progress: Callable[[int], Any] | None = None,
) -> SetPrediction:
    """Predictions, stds and labels of a whole set.

    Args:
        potential: the model.
        dataset: frames with or without labels.
        name: of the set.
        n_draws: draws to use; 0 for the mean weights alone (no stds).
        batch_size: structures per call.
        batch_atoms: atoms per call of more than one structure; by default what the device is good for
            (``batch_limits``).
        stress: also predict stress.
        method: see :func:`predict_batch`.
        progress: called with the number of frames done after each batch.

    A batch that does not fit into memory is halved.
    """
    names, backbone = frame_names(dataset), potential.backbone
    sizes = dataset.sizes("atoms")
    atoms = batch_limits.default_atoms(backbone.device) if batch_atoms is None else batch_atoms

    def work(index: range) -> SetPrediction:
        items = [dataset[i] for i in index]
        batch = collate(backbone, items, parts=width(backbone.device), copies=True).to(backbone.device)
        moments = predict_batch(potential, batch, n_draws=n_draws, stress=stress, method=method)
        return _to_arrays(moments, batch, name, names[index.start : index.stop])

    parts: list[SetPrediction] = []
    for index in batch_limits.ranges(sizes, structures=batch_size, atoms=atoms):
        parts += by_halves(work, index, sizes[index.start : index.stop], what="predicting")
        if progress is not None:
            progress(len(index))
    return SetPrediction.concatenate(parts, name)


def frame_names(dataset: FrameDataset) -> list[str]:
    """Where each frame came from, ``file#frame``."""
    return [f"{s}#{f}" for s, f in zip(dataset.frames["source"], dataset.frames["frame"], strict=True)]


def _to_arrays(moments: BatchMoments, batch: Batch, name: str, frames: list[str]) -> SetPrediction:
    B, n = batch.n_structures, int(batch.n_atoms.sum())
    nan6, nan3 = np.full((B, 6), np.nan), np.full((n, 3), np.nan)
    get = _numpy
    labels = {k: get(v) for k, v in batch.labels.items()}
    forces, stress = get(moments.mean.forces), get(moments.mean.stress)
    return SetPrediction(
        name=name,
        n_atoms=batch.n_atoms.cpu().numpy(),
        numbers=batch.numbers.cpu().numpy(),
        frames=frames,
        energy=moments.mean.energy.cpu().numpy(),
        forces=nan3 if forces is None else forces,
        stress=nan6 if stress is None else stress,
        energy_label=_or(labels.get("energy"), np.full(B, np.nan)),
        forces_label=_or(labels.get("forces"), nan3),
        stress_label=_or(labels.get("stress"), nan6),
        energy_std=get(moments.energy_std),
        forces_std=get(moments.forces_std),
        stress_std=(nan6 if moments.stress_std is None else get(moments.stress_std))
        if moments.energy_std is not None
        else None,
        forces_std_norm=get(moments.forces_std_norm),
        ood_score=get(moments.ood_score),
    )


def _numpy(value: Tensor | None) -> Any:
    return None if value is None else value.detach().cpu().numpy()


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def predict_atoms(
    potential: BayesianPotential,
    atoms: Sequence[Atoms],
    *,
    batch_size: int = batch_limits.STRUCTURES,
    batch_atoms: int | None = None,
    n_draws: int | None = None,
    method: Method = "draws",
    graphs: Sequence[Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[dict[str, Any]]:
    """Predict structures; one dict each.

    Keys, shapes and units are those of :data:`blip_ft.uncertainty.outputs.OUTPUTS`; ``stress`` is ``None`` where the
    structure is not periodic. Epistemic stds are multiplied by the calibration's scale if there is one; aleatoric stds
    are the scatter of the labels that the calibration found, total ones the roots of the sums of both squares, and
    both are absent where no calibration frame had a label of the property, as its scatter is then unknown. What
    ``method`` (:func:`predict_batch`) or the model does not give is absent too.

    Batches are bounded as in :func:`predict_set`, and halved where they do not fit into memory.

    Args:
        potential: the model.
        atoms: structures.
        batch_size: structures per call.
        batch_atoms: atoms per call of more than one structure; by default what the device is good for.
        n_draws: see :func:`predict_batch`.
        method: likewise.
        graphs: of the structures, where they are made already: structures are then not checked again.
        progress: called with the number of structures done after each batch.

    Raises:
        DataError: the model cannot describe a structure, or has not the memory for it alone.
    """
    backbone, sizes = potential.backbone, [len(a) for a in atoms]

    def work(index: range) -> list[dict[str, Any]]:
        some = slice(index.start, index.stop)
        made = None if graphs is None else graphs[some]
        batch = backbone.batch(atoms[some], graphs=made, parts=width(backbone.device)).to(backbone.device)
        try:
            moments = predict_batch(potential, batch, n_draws=n_draws, method=method)
        except Exception as error:
            if len(index) > 1 or not is_out_of_memory(error):
                raise
            raise DataError(
                f"{sizes[index.start]} atoms do not fit into memory",
                remedy="--method energy or --draws 0 need less; or a device with more memory",
            ) from error
        return _split(moments, batch, potential.calibration or Calibration.identity())

    out: list[dict[str, Any]] = []
    limit = batch_limits.default_atoms(backbone.device) if batch_atoms is None else batch_atoms
    for index in batch_limits.ranges(sizes, structures=batch_size, atoms=limit):
        if graphs is None:
            for i in index:
                backbone.check(atoms[i])
        for part in by_halves(work, index, sizes[index.start : index.stop], what="predicting"):
            out += part
        if progress is not None:
            progress(len(index))
    return out


def _split(moments: BatchMoments, batch: Batch, calibration: Calibration) -> list[dict[str, Any]]:
    """One dict of numpy arrays per structure."""
    sizes = batch.n_atoms.tolist()
    forces = moments.mean.forces
    assert forces is not None
    out: list[dict[str, Any]] = []
    start = 0
    for i, n in enumerate(sizes):
        atoms = slice(start, start + n)
        start += n
        stress = None if moments.mean.stress is None else moments.mean.stress[i]
        periodic = stress is not None and bool(torch.isfinite(stress).all())
        item: dict[str, Any] = {
            "energy": float(moments.mean.energy[i]),
            "forces": _numpy(forces[atoms]),
            "stress": _numpy(stress) if periodic else None,
            "energies": _numpy(moments.mean.node_energy[atoms])
            if moments.mean.node_energy is not None
            else None,
        }
        if moments.ood_score is not None:
            item["ood_score"] = _numpy(moments.ood_score[atoms])
            item["ood_score_max"] = float(item["ood_score"].max(initial=0.0))
        if moments.energy_std is not None:
            e, f, s = calibration.energy, calibration.forces, calibration.stress
            item["energy_std"] = e.scale * float(moments.energy_std[i])
            if e.measured:
                # the energy's calibration is per atom, as its labels are compared per atom
                item["energy_std_aleatoric"] = e.aleatoric * n
                item["energy_std_total"] = float(np.hypot(item["energy_std_aleatoric"], item["energy_std"]))
            if moments.node_energy_std is not None:
                item["energies_std"] = e.scale * _numpy(moments.node_energy_std[atoms])
            if moments.forces_cov is not None:
                covariance = f.scale**2 * _numpy(moments.forces_cov[atoms])
                variance = np.diagonal(covariance, axis1=1, axis2=2).clip(min=0)
                item["forces_cov"], item["forces_std"] = covariance, np.sqrt(variance)
                item["forces_std_norm"] = np.sqrt(variance.sum(axis=1))
                if f.measured:
                    item["forces_std_aleatoric"] = f.aleatoric
                    item["forces_std_total"] = np.hypot(f.aleatoric, item["forces_std"])
                item["std_sampling_error"] = moments.sampling_error
            if periodic and moments.stress_std is not None:
                item["stress_std"] = s.scale * _numpy(moments.stress_std[i])
                if s.measured:
                    item["stress_std_aleatoric"] = s.aleatoric
                    item["stress_std_total"] = np.hypot(s.aleatoric, item["stress_std"])
        out.append(item)
    return out
