"""Potentials on the fake backbone, and LAMMPS instances with a structure in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.lammps import open_lammps
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.distance import FeatureDistance
from blip_ft.testing.fake import FakeBackbone

MASSES = {"H": 1.008, "Si": 28.085, "O": 15.999}


def potential_of(posterior: PosteriorConfig, size: str = "tiny") -> BayesianPotential:
    """The fake backbone in float64, with four draws and an out-of-distribution score."""
    model = ModelConfig(adapter="fake", checkpoint=size, dtype="float64")
    out = BayesianPotential(FakeBackbone.load(size), model, posterior, n_draws=4)
    training = np.random.default_rng(0).normal(size=(40, 8)), np.repeat([8, 14], 20), ["a", "b"] * 20
    out.ood = FeatureDistance.fit(*training)
    return out


@pytest.fixture(scope="session")
def single() -> BayesianPotential:
    """Of a family whose draws are single: their mean is the prediction."""
    return potential_of(PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.1))


@pytest.fixture(scope="session")
def paired() -> BayesianPotential:
    """Of the default family: draws come in pairs, the mean weights are the prediction."""
    out = potential_of(PosteriorConfig(rank=16))
    samples = out.posterior.directions
    samples.copy_(0.02 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(0)))
    return out


def structure(*, triclinic: bool = True, n: int = 2, seed: int = 0) -> Atoms:
    """A rattled crystal of SiO, n x n x n cells of two atoms 4.4 to 4.8 Å wide."""
    cell = [[4.4, 0, 0], [0.5, 4.6, 0], [-0.3, 0.4, 4.8]] if triclinic else [4.4, 4.6, 4.8]
    atoms = Atoms("SiO", scaled_positions=[[0, 0, 0], [0.45, 0.5, 0.55]], cell=cell, pbc=True).repeat(n)
    atoms.rattle(0.15, seed=seed)
    atoms.wrap()  # LAMMPS creates no atom outside its box
    return atoms


@pytest.fixture
def lammps(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes instances with a structure, and closes them."""
    opened: list[Any] = []

    def make(
        atoms: Atoms | None = None, *, units: str = "metal", boundary: str = "p p p", masses: Any = MASSES
    ) -> Any:
        lmp = open_lammps(["-screen", "none", "-log", str(tmp_path / "log.lammps")])
        opened.append(lmp)
        if atoms is not None:
            lmp.commands_string("\n".join(setup(atoms, units=units, boundary=boundary, masses=masses)))
        return lmp

    make.opened = opened
    yield make
    for lmp in opened:
        lmp.close()


def setup(atoms: Atoms, *, units: str = "metal", boundary: str = "p p p", masses: Any = MASSES) -> list[str]:
    """Commands that make the structure, types in the order of first appearance; its cell is LAMMPS's already."""
    symbols = list(dict.fromkeys(atoms.symbols))
    (lx, _, _), (xy, ly, _), (xz, yz, lz) = atoms.cell.array.tolist()
    tilt = f" {xy!r} {xz!r} {yz!r}" if atoms.cell.array[np.tril_indices(3, -1)].any() else ""
    shape = f"{'prism' if tilt else 'block'} 0 {lx!r} 0 {ly!r} 0 {lz!r}{tilt}"
    lines = [
        f"units {units}",
        f"boundary {boundary}",
        "atom_style atomic",
        "atom_modify map array",
        f"region box {shape}",
        f"create_box {len(symbols)} box",
        *(f"mass {i} {masses[s]}" for i, s in enumerate(symbols, 1)),
    ]
    for symbol, position in zip(atoms.symbols, atoms.positions.tolist(), strict=True):
        lines.append("create_atoms {} single {!r} {!r} {!r}".format(symbols.index(symbol) + 1, *position))
    return lines
