"""What users of the library call: put variational layers around a model, train it in one's own loop, load,
predict, evaluate.

Recipes do more (references, splits, checks, resume, reports); this is for those who write the loop themselves.
docs/python.md shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from blip_ft.backbones.protocol import Backbone, Batch
from blip_ft.backbones.registry import get_adapter
from blip_ft.config import ModelConfig, ObjectiveConfig, PosteriorConfig
from blip_ft.data.batch.dataset import FrameDataset, collate
from blip_ft.data.batch.sampler import EpochBatchSampler
from blip_ft.data.read.set_aside import SetAside
from blip_ft.data.read.sources import load_source
from blip_ft.data.references import fit_references
from blip_ft.errors import BlipError
from blip_ft.objectives import Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import load_model, save_model
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.calibration import calibrate, levels_of
from blip_ft.uncertainty.metrics import Metrics, set_metrics
from blip_ft.uncertainty.predict import Method, predict_atoms, predict_set
from blip_ft.variational.noise import Noise


def load_frames(source: str | Path, *, labels: bool = True) -> datasets.Dataset:
    """Labelled frames from anything that recipes read, in eV and Å, without isolated atoms and unconverged steps.

    Args:
        source: a file, folder, glob, hub id or shipped set, with ``@`` selectors as in recipes.
        labels: refuse frames without energy and forces.

    Raises:
        DataError: the source is missing, empty or damaged.
    """
    return SetAside().examples(load_source(str(source), labels=labels))


def load_backbone(
    adapter: str, checkpoint: str, *, dtype: str = "float32", trust: bool = False, **options: Any
) -> Backbone:
    """A pretrained model behind the protocol that all adapters fulfil.

    Args:
        adapter: ``sevennet``, ``chgnet``, ``diep``, ``mace``, ``fairchem``, ``orb``, or that of
            another package.
        checkpoint: the vendor's name of the model, or a file in its format.
        dtype: ``float32`` or ``float64``.
        trust: open a pickled file that is no published release; it can run code.
        options: of the adapter (head, task, modality).

    Raises:
        BlipError: no such adapter.
        CheckpointError: missing, damaged or untrusted file.
        ImportError: its backend is not installed.
    """
    backbone = get_adapter(adapter).load(checkpoint, trust=trust, **options)
    return backbone.to(getattr(torch, dtype))


def bayesian(
    backbone: Backbone,
    *,
    family: str = "weight",
    train: str | Sequence[str] = "all",
    noise: str | Sequence[str] = "all",
    seed: int = 0,
    n_draws: int = 16,
    **options: Any,
) -> Potential:
    """Variational layers around a model in memory; step 0 is the pretrained model.

    Args:
        backbone: freshly loaded; converted in place.
        family: posterior family. Those whose spread is trained step by step (``weight``, ``channel``,
            ``adaptive``) suit a loop of one's own; those of closed form are fitted by recipes.
        train: modules whose mean is trained: a preset of the adapter or regular expressions.
        noise: modules that carry noise, likewise.
        seed: of all noise.
        n_draws: fixed draws to predict with.
        options: keys of ``posterior`` (docs/recipes.md).

    Raises:
        ConversionError: a pattern matches nothing, or the noise mode does not suit the family.
        pydantic.ValidationError: an option that the family has not.
    """
    origin = backbone.origin.get("checkpoint", "in memory")
    dtype = "float64" if backbone.dtype == torch.float64 else "float32"
    model = ModelConfig(
        adapter=backbone.name,
        checkpoint=origin,
        dtype=dtype,  # type: ignore[arg-type]
        train=train if isinstance(train, str) else list(train),
        noise=noise if isinstance(noise, str) else list(noise),
    )
    return Potential(backbone, model, PosteriorConfig(family=family, **options), seed=seed, n_draws=n_draws)


class Potential(BayesianPotential):
    """A potential with error bars, as :func:`load` and :func:`bayesian` return it."""

    # ---- training in one's own loop --------------------------------------------------------
    def batches(
        self, frames: datasets.Dataset | FrameDataset, batch_size: int, *, epoch: int
    ) -> Iterator[Batch]:
        """Batches of one epoch, with labels, on the potential's device, in an order of its own.

        Args:
            frames: of :func:`load_frames`; a :class:`FrameDataset` keeps its graphs from epoch to epoch.
            batch_size: structures in a batch.
            epoch: number of the epoch, which the order depends on.
        """
        items = self.dataset(frames)
        sampler = EpochBatchSampler(len(items), batch_size, seed=self.seed)
        sampler.set_epoch(epoch)
        for index in sampler:
            yield collate(self.backbone, [items[i] for i in index]).to(self.backbone.device)

    def dataset(self, frames: datasets.Dataset | FrameDataset) -> FrameDataset:
        """Frames with their graphs, which are made once."""
        return frames if isinstance(frames, FrameDataset) else FrameDataset(frames, self.backbone)

    def fit_references(self, frames: datasets.Dataset | FrameDataset) -> Mapping[int, float]:
        """Energies per element (eV) that bring the labels' zero and the model's together; before training.

        Raises:
            BlipError: no frame has an energy.
        """
        self.references = {}
        found = predict_set(self, self.dataset(frames), "references", n_draws=0, stress=False)
        known = np.flatnonzero(np.isfinite(found.energy_label))
        if not len(known):
            raise BlipError("no frame has an energy to fit references on")
        numbers = np.split(found.numbers, np.cumsum(found.n_atoms)[:-1])
        residual = (found.energy_label - found.energy)[known]
        self.references = dict(fit_references([numbers[i] for i in known], residual).shift)
        return self.references

    def elbo(
        self,
        batch: Batch,
        *,
        epoch: int,
        n_train: float,
        likelihood: Likelihood | None = None,
    ) -> Tensor:
        """Minus the evidence lower bound per training frame, from one sample: expected NLL + KL / N, a scalar in nats.

        Args:
            batch: of :meth:`batches`.
            epoch: keys the noise, with each structure.
            n_train: N, frames in the whole training set.
            likelihood: noise stds of the labels; by default those of recipes.
        """
        likelihood = Likelihood(ObjectiveConfig()) if likelihood is None else likelihood
        noise = Noise(self.posterior_config.noise_mode, epoch=epoch)
        prediction = self(batch, noise, stress=likelihood.use_stress, create_graph=True)
        nll = likelihood(prediction, batch).total
        each = nll if self.structure_kl is None else nll + self.structure_kl
        loss: Tensor = each.mean() + self.kl() / n_train
        return loss

    # ---- use -------------------------------------------------------------------------------
    def calibrate(self, frames: datasets.Dataset | FrameDataset) -> None:
        """Fit the width of the error bars on frames that nothing was trained on or chosen by."""
        found = predict_set(self.eval(), self.dataset(frames), "calibration")
        self.calibration = calibrate(found).for_new_frames()
        self.levels = levels_of(found, self.calibration)

    def predict(
        self, structures: Sequence[Atoms], *, n_draws: int | None = None, method: Method = "draws"
    ) -> list[dict[str, Any]]:
        """Energy, forces, stress and their stds; see :func:`blip_ft.uncertainty.predict.predict_atoms`."""
        return predict_atoms(self.eval(), structures, n_draws=n_draws, method=method)

    def evaluate(self, frames: datasets.Dataset | FrameDataset, *, method: Method = "draws") -> Metrics:
        """Errors and, with error bars, their scores on labelled frames, as ``blip-finetune evaluate`` prints them."""
        return set_metrics(
            predict_set(self.eval(), self.dataset(frames), "frames", method=method), self.calibration
        )

    def calculator(self, *, n_draws: int | None = None, method: Method = "draws") -> BlipCalculator:
        """An ASE calculator; see :class:`blip_ft.uncertainty.calculator.BlipCalculator`."""
        return BlipCalculator(self, n_draws=n_draws, method=method)

    def save(self, folder: str | Path) -> None:
        """Write a model folder, which :func:`load` and all commands open."""
        save_model(self, folder)


def load(
    path: str | Path, *, dtype: str | None = None, device: str = "cpu", reference_set: str | None = None
) -> Potential:
    """Open a trained potential; see :func:`blip_ft.potential.checkpoint.load_model`."""
    return load_model(path, dtype=dtype, device=device, reference_set=reference_set, kind=Potential)
