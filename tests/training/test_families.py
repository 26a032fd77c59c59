"""Every posterior family and objective through the real entry point, on the fake backbone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import blip_ft
from blip_ft.cli import main
from blip_ft.fake import FakeBackbone

from .test_bad_input import frames

RUNS: dict[str, dict[str, Any]] = {
    "adaptive": {"posterior": {"family": "adaptive"}},
    "adaptive as in the paper": {
        "posterior": {"family": "adaptive", "mode": "local", "prior": "dropout"},
        "model": {"noise": "radial"},
    },
    "posthoc_laplace": {
        "posterior": {"family": "posthoc_laplace", "prior_scale": "auto"},
        "objective": {"temperature": "auto"},
    },
    "crps": {"posterior": {"family": "channel"}, "objective": {"kind": "crps"}},
    "elbo+crps": {"posterior": {"family": "adaptive"}, "objective": {"kind": "elbo+crps"}},
    "function_kl": {
        "posterior": {"family": "weight", "mode": "flipout"},
        "objective": {"kind": "function_kl", "replay": "replay.extxyz", "likelihood": "joint_student_t"},
    },
    "function_kl of subspace": {
        "posterior": {"family": "subspace", "start": 0.5},
        "objective": {"kind": "function_kl", "likelihood": "student_t"},
    },
    "empirical Bayes from scratch": {
        "posterior": {"family": "weight", "empirical_bayes": True},
        "model": {"from_scratch": True, "train": "rest"},
    },
}


@pytest.mark.parametrize("case", RUNS)
def test_fit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from ase.io import write

    monkeypatch.chdir(tmp_path)
    write("train.extxyz", frames(24))
    bare = [a.copy() for a in frames(3, seed=5)]
    for a in bare:
        a.info.clear()
        del a.arrays["REF_forces"]
    write("replay.extxyz", bare)
    options = RUNS[case]
    tree: dict[str, Any] = {
        "name": "run",
        "output": "runs",
        "data": {"train": "train.extxyz", "batch_size": 4},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"} | options.get("model", {}),
        "posterior": {"prior_scale": 0.2, "rank": 4, "projections": 1} | options["posterior"],
        "objective": {"temperature": 1e-4} | options.get("objective", {}),
        "uncertainty": {"n_draws": 2},
        "plain": {"enabled": False},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "recipe.yaml"]) == 0, capsys.readouterr().err
    metrics = json.loads(Path("runs/run/metrics.json").read_text())
    assert math.isfinite(metrics["blip"]["seen"]["force_crps_mev_per_ang"])
    history = json.loads(Path("runs/run/history.json").read_text())["blip"]
    assert sum("train_loss" in row for row in history) == 2
    assert all(math.isfinite(v) for row in history for v in row.values())
    potential = blip_ft.load("runs/run")
    assert potential.posterior.family == options["posterior"]["family"]
    (item,) = blip_ft.uncertainty.predict.predict_atoms(potential, frames(1))
    assert item["energy_std"] > 0
    if options.get("model", {}).get("from_scratch"):
        assert "initial weights, seed 0" in potential.backbone.origin["checkpoint"]
        scales = [
            float(potential.prior.std(n).mean() / potential.prior.rms(n).mean())
            for n in potential.prior.sites
        ]
        assert len({round(s, 6) for s in scales}) > 1


def test_the_plain_model_is_the_mean_of_posthoc_laplace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One training serves both, and the covariance does not move it."""
    from ase.io import write

    monkeypatch.chdir(tmp_path)
    write("train.extxyz", frames(24))
    tree = {
        "name": "run",
        "output": "runs",
        "data": {"train": "train.extxyz", "batch_size": 4},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"family": "posthoc_laplace", "projections": 1, "context": 0.2},
        "uncertainty": {"n_draws": 2},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "recipe.yaml"]) == 0
    history = json.loads(Path("runs/run/history.json").read_text())
    assert history["plain"] == history["blip"]
    potential = blip_ft.load("runs/run")
    plain = np.load(next(Path("runs/run/predictions").glob("plain-seen.npz")))
    with torch.no_grad():
        energies = potential(potential.backbone.batch(frames(24))).energy.numpy()
    for energy in plain["energy"]:
        assert np.abs(energies - energy).min() < 1e-9
    assert len(potential.posterior.mu) > 0


def test_replayed_frames_are_checked_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from ase import Atoms
    from ase.io import write

    monkeypatch.chdir(tmp_path)
    write("train.extxyz", frames(12))
    write("replay.extxyz", [Atoms("SiO"), Atoms("Au")])
    tree = {
        "name": "run",
        "output": "runs",
        "data": {"train": "train.extxyz"},
        "model": {"adapter": "fake", "checkpoint": "tiny"},
        "posterior": {"family": "weight", "prior_scale": 0.2},
        "objective": {"kind": "function_kl", "temperature": 1.0, "replay": "replay.extxyz"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "recipe.yaml"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for part in ("replay.extxyz", "frame 1", "Au"):
        assert part in message
    assert not Path("runs").exists()


class TestFromScratch:
    def test_weights_are_new_and_constants_stay(self) -> None:
        from blip_ft.training.scratch import initial

        pretrained = FakeBackbone()
        for p in pretrained.parameters():
            p.data.mul_(1.5)
        fresh = initial(pretrained, seed=3)
        for (name, a), b in zip(fresh.named_parameters(), pretrained.parameters(), strict=True):
            assert not (a == b).all(), name
        assert "initial weights, seed 3" in fresh.origin["checkpoint"]

    @pytest.mark.backend("sevennet")
    def test_sevennet(self) -> None:
        from ase.build import molecule
        from blip_ft.adapters.sevennet import SevenNetBackbone

        from blip_ft.training.scratch import initial

        pretrained = SevenNetBackbone.load("7net-0")
        one, again, other = (dict(initial(pretrained, s).named_parameters()) for s in (0, 0, 1))
        old = dict(pretrained.named_parameters())
        constants = 0
        for name, p in one.items():
            assert torch.equal(p, again[name])
            if "rescale" in name or "denominator" in name:
                constants += 1
                assert torch.equal(p, old[name])
            elif name.endswith("weight"):
                assert not torch.isclose(p, old[name]).all()
                assert not torch.isclose(p, other[name]).all()
        assert constants >= 7
        # and the vendor's calculator around it says the same
        fresh = initial(pretrained, 0)
        atoms = molecule("H2O", vacuum=6, pbc=True)
        atoms.calc = fresh.stock_calculator()
        energy = fresh(fresh.batch([atoms])).energy.item()
        assert math.isfinite(energy)
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-5)
