"""Replay against forgetting, and the drift from the pretrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.io import write

from blip_ft.cli import main
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.data.batch.dataset import make_item
from blip_ft.data.read.sources import load_source
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training.replay import Replay


def frames(n: int, *, seed: int, label: int | None) -> list[Atoms]:
    """Structures, labelled by a fake potential of the weights ``label``."""
    rng = np.random.default_rng(seed)
    calculator = None if label is None else FakeBackbone.load("tiny", seed=label).stock_calculator()
    out = []
    for i in range(n):
        a = Atoms("SiO2", positions=[(0, 0, 0), (1.6, 0, 0), (0, 1.6, 0)], cell=[5, 5, 5], pbc=True)
        a.positions += rng.normal(0, 0.1, (3, 3))
        if calculator is not None:
            a.calc = calculator
            energy, forces = a.get_potential_energy(), a.get_forces().copy()
            a.calc = None
            a.info |= {"REF_energy": energy, "run": f"run{i % 4}"}
            a.arrays["REF_forces"] = forces
        out.append(a)
    return out


def fit(folder: Path, replay: dict[str, Any]) -> dict[str, dict[str, float]]:
    write(folder / "train.extxyz", frames(16, seed=0, label=1))
    write(folder / "old.extxyz", frames(6, seed=1, label=None))
    write(folder / "labelled.extxyz", frames(6, seed=1, label=2))
    tree = {
        "name": "run",
        "output": str(folder / "runs"),
        "overwrite": True,
        "data": {
            "train": str(folder / "train.extxyz"),
            "replay": replay | {"probe": str(folder / "old.extxyz")},
        },
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"family": "weight", "prior_scale": 0.3, "init_std": 1e-4},
        "objective": {"temperature": 1e-4},
        "optimizer": {"learning_rate": 0.01},
        "plain": {"enabled": False},
        "uncertainty": {"n_draws": 2},
        "trainer": {"max_epochs": 6, "accelerator": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", str(folder / "recipe.yaml")]) == 0
    return json.loads((folder / "runs/run/drift.json").read_text())


def test_replay_holds_the_model_where_it_was(tmp_path: Path) -> None:
    free = fit(tmp_path, {})["blip"]
    held = fit(tmp_path, {"source": str(tmp_path / "old.extxyz"), "ratio": 2.0, "weight": 20.0})["blip"]
    assert held["n_structures"] == 6
    assert held["forces_mev_per_ang"] < 0.5 * free["forces_mev_per_ang"]
    page = (tmp_path / "runs/run/report.html").read_text(encoding="utf-8")
    assert f'<td class="n">{held["forces_mev_per_ang"]:.3g}</td><td class="n">6</td>' in page
    assert "train/replay" in (tmp_path / "runs/run/metrics.csv").read_text().splitlines()[0]


def test_own_labels_of_another_level_are_shifted(tmp_path: Path) -> None:
    drift = fit(tmp_path, {"source": str(tmp_path / "labelled.extxyz"), "labels": "own"})
    assert drift["blip"]["forces_mev_per_ang"] > 0


@pytest.fixture
def memory(tmp_path: Path) -> Replay:
    write(tmp_path / "a.extxyz", frames(5, seed=0, label=0))
    backbone = FakeBackbone()
    model = ModelConfig(adapter="fake", checkpoint="tiny", dtype="float64")
    potential = BayesianPotential(backbone, model, PosteriorConfig(rank=2))
    items = [make_item(row, backbone) for row in load_source(str(tmp_path / "a.extxyz"))]
    return Replay(potential, items, ratio=0.5, weight=1.0, batch_size=4)


def test_every_frame_comes_as_often_and_the_order_is_a_function_of_seed_and_epoch(memory: Replay) -> None:
    assert memory.per_step == 2
    keys = [k for step in range(5) for k in memory.batch(0, step).keys]
    assert sorted(keys) == sorted([item.key for item in memory.items] * 2)
    assert keys == [k for step in range(5) for k in memory.batch(0, step).keys]
    assert keys != [k for step in range(5) for k in memory.batch(1, step).keys]


def test_ranks_share_a_step(memory: Replay) -> None:
    one = memory.batch(3, 1).keys
    shares = []
    for rank in (0, 1):
        memory.world, memory.rank = 2, rank
        shares += memory.batch(3, 1).keys
    assert sorted(shares) == sorted(one)
    assert memory.scale == pytest.approx(2 * 0.5 / 2), "ranks are averaged"
    assert torch.isfinite(memory.batch(0, 0).labels["forces"]).all()
