"""A model on the fake backbone, structures of its elements, and what a command leaves behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone


def potential_of(posterior: PosteriorConfig) -> BayesianPotential:
    """The fake backbone in float64, with four draws."""
    model = ModelConfig(adapter="fake", checkpoint="tiny", dtype="float64")
    return BayesianPotential(FakeBackbone.load("tiny"), model, posterior, n_draws=4)


def structure(n: int = 6, seed: int = 0, *, symbols: str = "SiO2SiO2", periodic: bool = True) -> Atoms:
    """A random but sensible structure of the fake's elements."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(2)] * 3), axis=-1).reshape(-1, 3)[:n]
    atoms = Atoms(symbols, positions=2.1 * grid + rng.normal(0, 0.1, (n, 3)), cell=np.diag([4.4, 4.6, 4.8]))
    atoms.pbc = periodic
    return atoms


def labelled(atoms: Atoms, seed: int = 0) -> Atoms:
    """The same structure with random labels."""
    rng = np.random.default_rng(seed)
    results = {"energy": rng.normal(), "forces": rng.normal(size=(len(atoms), 3))}
    if atoms.pbc.all():
        results["stress"] = rng.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def leftovers(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(p.name for p in folder.iterdir())
