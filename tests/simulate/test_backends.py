"""Simulations on real models: they go on to the last digit, and keep what they must."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.io import read

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.library import Potential, load_backbone
from blip_ft.simulate.guard import Limits
from blip_ft.simulate.options import Dynamics
from blip_ft.simulate.output import paths
from blip_ft.simulate.run import simulate


def potential_of(adapter: str, checkpoint: str) -> Potential:
    """The default family with made-up samples of its posterior, in float64."""
    backbone = load_backbone(adapter, checkpoint, dtype="float64")
    model = ModelConfig(adapter=adapter, checkpoint=checkpoint, dtype="float64", noise="readout")
    potential = Potential(backbone, model, PosteriorConfig(rank=8), n_draws=8)
    samples = potential.posterior.directions
    samples.copy_(0.01 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(0)))
    potential.amplitude = 0.03
    return potential.eval()


@pytest.mark.parametrize(
    ("adapter", "checkpoint"),
    [
        pytest.param("sevennet", "7net-0", marks=pytest.mark.backend("sevennet")),
        pytest.param("chgnet", "0.3.0", marks=[pytest.mark.backend("chgnet"), pytest.mark.full]),
    ],
)
def test_runs_go_on_to_the_last_digit(tmp_path: Path, adapter: str, checkpoint: str):
    potential = potential_of(adapter, checkpoint)
    start = bulk("SiC", "zincblende", a=4.36, cubic=True)
    start.rattle(0.02, seed=0)
    for ensemble in ("nve", "npt"):
        names = [tmp_path / f"{ensemble}-{part}.extxyz" for part in ("whole", "parts")]
        for target, ends in zip(names, ((12,), (4, 8, 12)), strict=True):
            for steps in ends:
                options = Dynamics(ensemble, steps, temperature=600.0, every=4, pressure_damping=50.0)  # type: ignore
                simulate(potential, start, target, options, Limits(), thin_cell=True, resume=True)
        assert len({p.read_bytes() for p in names}) == 1
        assert len({paths(p)["log"].read_bytes() for p in names}) == 1
        frames = read(names[0], ":")
        energies = [a.get_potential_energy() + a.get_kinetic_energy() for a in frames]
        if ensemble == "nve":
            assert np.ptp(energies) < 0.002 * len(start)
        assert all(a.info["energy_std"] > 0 and (a.arrays["forces_std_norm"] > 0).all() for a in frames)
