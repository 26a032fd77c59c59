"""Rows of candidates of SevenNet-0, whose layers give gradients of energies by taps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write
from ase.spacegroup import crystal

from blip_ft.closed_form.gradients import GradientRows
from blip_ft.config import ModelConfig, ObjectiveConfig, PosteriorConfig, Recipe
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.read.sources import load_source
from blip_ft.families.base.linear import ClosedFormData
from blip_ft.library import load_backbone
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.select.choose import Wish, choose
from blip_ft.select.features import Calls, Whitening, energy_rows, label_rows
from blip_ft.select.pool import Known, look


@pytest.mark.backend("sevennet")
def test_rows_and_a_batch(tmp_path: Path) -> None:
    """Rows are those that the posterior is fitted to; energies are the same by both ways; a batch is chosen."""
    quartz = crystal(
        ["Si", "O"],
        [(0.4697, 0.0, 2 / 3), (0.4135, 0.2669, 0.7858)],
        spacegroup=154,
        cellpar=[4.9134, 4.9134, 5.4052, 90, 90, 120],
    )
    frames: list[Atoms] = []
    for i in range(5):
        atoms = Atoms(quartz.numbers, positions=quartz.positions, cell=quartz.cell, pbc=True)
        atoms.rattle(0.02 + 0.05 * i, seed=i)
        atoms.info["energy"], atoms.arrays["forces"] = 0.0, np.zeros((9, 3))
        frames.append(atoms)
    write(tmp_path / "train.extxyz", frames[:2])
    write(tmp_path / "pool.extxyz", frames[2:])
    model = ModelConfig(adapter="sevennet", checkpoint="7net-0", dtype="float64", noise="readout")
    posterior = PosteriorConfig(family="sketch", buckets=64, rank=8)
    backbone = load_backbone("sevennet", "7net-0", dtype="float64")
    potential = BayesianPotential(backbone, model, posterior, n_draws=2)
    objective = ObjectiveConfig()

    def rows_of(name: str) -> GradientRows:
        source = FrameDataset(load_source(str(tmp_path / name)), potential.backbone)
        return GradientRows(objective, potential, source, orthonormal=True)

    potential.posterior.fit(ClosedFormData(rows_of("train.extxyz").rows(4), prior_scale=0.3))
    recipe = Recipe(name="a", data={"train": "train.extxyz"}, model=model, objective=objective)
    known = Known(recipe, {})
    pool = look(str(tmp_path / "pool.extxyz"), potential, known)
    whitening = Whitening(potential)
    rows = dict(label_rows(pool, potential, objective, whitening, Calls(2), projections=4))
    energies = dict(energy_rows(pool, potential, objective, whitening, Calls(2)))
    (made,) = rows_of("pool.extxyz").features(potential.posterior.features, 64, 4)
    for i, key in enumerate(pool.keys):
        mine = made.gradients[torch.from_numpy(made.keys == key)]
        expected = potential.posterior.covariance(mine).numpy()
        np.testing.assert_allclose(rows[i] @ rows[i].T, expected, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(energies[i][0], rows[i][0], rtol=1e-6, atol=1e-9)
    found = choose(potential, known, pool, Wish(frames=2, projections=4), scratch=tmp_path)
    assert len({c.candidate for c in found}) == 2
