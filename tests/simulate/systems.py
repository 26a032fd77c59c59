"""A model on the fake backbone that can be simulated with, a structure, and calculators whose answers are known."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.library import Potential
from blip_ft.potential.calibration import Calibration, PropertyCalibration
from blip_ft.potential.distance import FeatureDistance
from blip_ft.potential.levels import Levels
from blip_ft.testing.fake import FakeBackbone
from blip_ft.variational.noise import OFF


def model(*, scores: bool = True) -> Potential:
    """The default family around the fake backbone, with made-up samples of its posterior, calibrated."""
    potential = Potential(
        FakeBackbone.load("tiny"),
        ModelConfig(adapter="fake", checkpoint="tiny", dtype="float64"),
        PosteriorConfig(rank=16),
        n_draws=8,
    )
    generator = torch.Generator().manual_seed(0)
    samples = potential.posterior.directions
    samples.copy_(0.01 * torch.randn(samples.shape, generator=generator))
    potential.amplitude = 0.03
    potential.calibration = Calibration(
        energy=PropertyCalibration(aleatoric=1e-3, scale=2.0, n_residuals=9),
        forces=PropertyCalibration(aleatoric=2e-2, scale=3.0, n_residuals=99),
    )
    if scores:
        features, numbers = [], []
        for seed in range(4):
            batch = potential.backbone.batch([structure(seed)])
            with torch.no_grad():
                features.append(potential(batch, OFF).node_features.double().numpy())
            numbers.append(batch.numbers.numpy())
        groups = [str(i) for i, n in enumerate(numbers) for _ in n]
        potential.ood = FeatureDistance.fit(np.concatenate(features), np.concatenate(numbers), groups)
    potential.levels = Levels(0.1, 2.0, 24)
    return potential.eval()


def structure(seed: int = 0, *, periodic: bool = True) -> Atoms:
    """Six atoms of the fake's elements, in a cell that is thicker than its cutoff."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(2)] * 3), axis=-1).reshape(-1, 3)[:6]
    positions = 2.1 * grid + rng.normal(0, 0.05, (6, 3))
    return Atoms("SiO2SiO2", positions=positions, cell=np.diag([4.4, 4.6, 4.8]), pbc=periodic)


class Springs(Calculator):
    """Every atom bound to every other by a spring, so that the whole is free: 3 n - 3 oscillators of one frequency."""

    implemented_properties = ["energy", "free_energy", "forces"]

    def __init__(self, at: np.ndarray, k: float) -> None:
        super().__init__()
        self.at, self.k = at, k

    def calculate(self, atoms=None, properties=None, system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        u = self.atoms.positions - self.at
        forces = -self.k * (len(u) * u - u.sum(axis=0))
        energy = 0.5 * self.k * (len(u) * (u**2).sum() - (u.sum(axis=0) ** 2).sum())
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
