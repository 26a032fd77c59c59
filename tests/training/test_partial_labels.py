"""Frames with some labels only, weights, the user's unlabelled structures, and streams, in whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.io import write

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.cli import main
from blip_ft.config import ObjectiveConfig
from blip_ft.data.batch.dataset import FrameDataset, collate
from blip_ft.data.read.sources import load_source
from blip_ft.objectives import Likelihood
from blip_ft.testing.fake import FakeBackbone

from .labelled import frames as make_frames

Frames = list[Atoms]
#: labels that the pretrained model has to learn
frames = partial(make_frames, n=24, other=True)


def fit(folder: Path, labelled: Frames, *overrides: str, **sections: Any) -> dict[str, Any]:
    write(folder / "train.extxyz", labelled)
    tree: dict[str, Any] = {
        "name": "run",
        "output": str(folder / "runs"),
        "overwrite": True,
        "data": {"train": str(folder / "train.extxyz"), "references": "shift"},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"rank": 4, "projections": 2, "start": 0.5},
        "plain": {"enabled": False},
        "uncertainty": {"n_draws": 2},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    for name, section in sections.items():
        tree[name] = tree[name] | section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", str(folder / "recipe.yaml"), *overrides]) == 0
    return json.loads((folder / "runs/run/metrics.json").read_text())["blip"]["seen"]


def test_energies_alone(tmp_path: Path) -> None:
    data = frames()
    for a in data:
        del a.arrays["REF_forces"]
    metrics = fit(tmp_path, data)
    assert math.isfinite(metrics["energy_mae_mev_per_atom"])
    history = json.loads((tmp_path / "runs/run/history.json").read_text())["blip"]
    epochs = [row for row in history if "train_loss" in row]  # the others are steps of the mean after them
    assert all(row["val_energy_mae"] > 0 for row in epochs), "some score chooses the epoch"
    assert not any("val_crps" in row for row in epochs), "without forces there is no CRPS of them"
    assert all("val_force_mae" not in row for row in history if row not in epochs)


def test_forces_alone(tmp_path: Path) -> None:
    data = frames()
    for a in data:
        del a.info["REF_energy"]
    assert math.isfinite(fit(tmp_path, data)["force_mae_mev_per_ang"])


def test_some_of_both_and_weights(tmp_path: Path) -> None:
    data = frames()
    for i, a in enumerate(data):
        if i % 3 == 0:
            del a.arrays["REF_forces"]
        elif i % 3 == 1:
            del a.info["REF_energy"]
            a.arrays["atom_weight"] = np.array([1.0, 0.0, 0.5])
        a.info["config_weight"] = 1 + i % 2
    metrics = fit(tmp_path, data)
    assert math.isfinite(metrics["force_mae_mev_per_ang"])
    assert math.isfinite(metrics["energy_mae_mev_per_atom"])


def test_context_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = frames(n=5, seed=3)
    for a in bare:
        a.info.clear()
        del a.arrays["REF_forces"]
    write(tmp_path / "mine.extxyz", bare)
    fit(
        tmp_path,
        frames(),
        data={"train": str(tmp_path / "train.extxyz"), "context": str(tmp_path / "mine.extxyz")},
        posterior={"family": "subspace", "rank": 4, "projections": 4, "perturbed_share": 0.5},
    )
    fits = json.loads((tmp_path / "runs" / "run" / "receipt.json").read_text())["posterior"]
    last = fits[-1]
    made = math.ceil(0.5 * last["n_train_rows"] / 5)
    assert last["n_rows"] == last["n_train_rows"] + 5 * (5 + made), "5 rows: energy and 4 projections"
    assert "context: 5 of 5 unlabelled structures" in capsys.readouterr().err
    gold = bare[0]
    gold.numbers[0] = 79
    write(tmp_path / "mine.extxyz", gold)
    assert main(["fit", str(tmp_path / "recipe.yaml")]) == 2
    assert "element Au is unknown" in " ".join(capsys.readouterr().err.split())


def test_batches_by_edges(tmp_path: Path) -> None:
    data = frames()
    fit(tmp_path, data, "data.batch_by=edges", "data.batch_size=400", "data.cache_gb=0.0001")


def test_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "held.extxyz", frames(n=9, seed=5))
    held = {
        role: f"{tmp_path}/held.extxyz@{part}"
        for role, part in (("validation", "0:3"), ("calibration", "3:6"), ("test", "6:"))
    }
    stream = {"frames": 24, "buffer": 8, "sample": 10}
    data = {"train": str(tmp_path / "train.extxyz"), "stream": stream, **held}
    assert math.isfinite(fit(tmp_path, frames(), data=data)["force_mae_mev_per_ang"])
    stream["frames"] = 23
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"data": data})
    )
    capsys.readouterr()
    assert main(["fit", str(tmp_path / "recipe.yaml")]) == 2
    assert "more than 23" in capsys.readouterr().err


# ---- weights -----------------------------------------------------------------------------------


@pytest.fixture
def batch(tmp_path: Path) -> Callable[..., tuple[Prediction, Batch]]:
    backbone = FakeBackbone()

    def make(data: Frames) -> tuple[Prediction, Batch]:
        write(tmp_path / "b.extxyz", data)
        items = FrameDataset(load_source(str(tmp_path / "b.extxyz")), backbone)
        made = collate(backbone, [items[i] for i in range(len(items))])
        return backbone(made), made

    return make


@pytest.mark.parametrize("law", ["gaussian", "student_t"])
def test_a_frame_of_weight_two_counts_as_two(law: str, batch: Any) -> None:
    likelihood = Likelihood(ObjectiveConfig(likelihood=law))  # type: ignore[arg-type]
    a, b = frames(n=2)
    twice = likelihood(*batch([a, a, b])).total.sum()
    a.info["config_weight"] = 2.0
    assert float(likelihood(*batch([a, b])).total.sum()) == pytest.approx(float(twice), rel=1e-12)


def test_weights_of_atoms_are_exponents_of_their_force_terms(batch: Any) -> None:
    likelihood = Likelihood(ObjectiveConfig())
    (a,) = frames(n=1)
    plain = likelihood(*batch([a]))
    a.arrays["atom_weight"] = np.array([2.0, 0.0, 1.0])
    prediction, made = batch([a])
    weighted = likelihood(prediction, made)
    assert float(weighted.energy) == float(plain.energy)
    std = likelihood.std["forces"]
    z = (prediction.forces - torch.as_tensor(a.arrays["REF_forces"])) / std
    each = (0.5 * z**2 + math.log(std) + 0.5 * math.log(2 * math.pi)).sum(dim=1)
    assert float(weighted.forces) == pytest.approx(float(2 * each[0] + each[2]), rel=1e-7)


def test_the_posterior_sees_weights_as_copies(tmp_path: Path) -> None:
    """H of a frame of weight 2 is H of two copies, and without weight there is none."""
    from blip_ft.closed_form.gradients import GradientRows
    from blip_ft.config import load_recipe
    from blip_ft.potential.bayesian import BayesianPotential

    (tmp_path / "r.yaml").write_text(
        "data: {train: x}\nmodel: {adapter: fake, checkpoint: tiny, dtype: float64}"
    )
    recipe = load_recipe(
        str(tmp_path / "r.yaml"),
        [
            "posterior.rank=3",
            "posterior.projections=4",
            "posterior.perturbed_share=0",
            "posterior.prior_scale=0.1",
        ],
    )

    def information(data: Frames) -> np.ndarray:
        write(tmp_path / "b.extxyz", data)
        backbone = FakeBackbone()
        potential = BayesianPotential(backbone, recipe.model, recipe.posterior)
        train = FrameDataset(load_source(str(tmp_path / "b.extxyz")), backbone)
        rows = GradientRows(recipe.objective, potential, train).rows(4)
        known = np.isfinite(rows.targets)
        g = rows.gradients[torch.as_tensor(known)].double()
        return (g.T @ g).numpy()

    a, b = frames(n=2)
    copies = information([a, a, b])
    a.info["config_weight"] = 2.0
    np.testing.assert_allclose(information([a, b]), copies, rtol=1e-9, atol=1e-9 * np.abs(copies).max())
