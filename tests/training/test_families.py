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
from blip_ft.families.registry import without_foreign_keys
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.predict import predict_atoms

from .labelled import frames

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
        "objective": {"kind": "function_kl", "frames": "replay.extxyz", "likelihood": "joint_student_t"},
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
        "posterior": without_foreign_keys(
            {"prior_scale": 0.2, "rank": 4, "projections": 1} | options["posterior"]
        ),
        "objective": {"temperature": 1e-4} | options.get("objective", {}),
        "uncertainty": {"n_draws": 2, "linearity_draws": 2},
        "plain": {"enabled": False},
        "trainer": {"max_epochs": 2, "accelerator": "cpu"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "recipe.yaml"]) == 0, capsys.readouterr().err
    if options["posterior"]["family"] == "adaptive":
        (clamped,) = (
            r["clamped"] for r in json.loads(Path("runs/run/receipt.json").read_text())["posterior"]
        )
        assert {"message", "update"} >= clamped.keys() > set()
        assert all(0 <= share <= 1 for share in clamped.values())
    metrics = json.loads(Path("runs/run/metrics.json").read_text())
    assert math.isfinite(metrics["blip"]["seen"]["force_crps_mev_per_ang"])
    assert metrics["blip"]["seen"]["ood_score_median"] > 0
    assert -1 <= metrics["blip"]["seen"]["spearman_atom_ood"] <= 1
    assert "spearman_atom_ood" not in metrics["pretrained"]["seen"]
    history = json.loads(Path("runs/run/history.json").read_text())["blip"]
    assert sum("train_loss" in row for row in history) == 2
    assert all(math.isfinite(v) for row in history for v in row.values())
    linearity = json.loads(Path("runs/run/linearity.json").read_text())
    assert linearity["n_draws"] == 2
    assert linearity["sets"]["seen"]["forces"]["curve"][-1]["amplitude"] == 1.0
    assert 'id="draws"' in Path("runs/run/report.html").read_text()
    potential = blip_ft.load("runs/run")
    assert potential.posterior.family == options["posterior"]["family"]
    (item,) = predict_atoms(potential, frames(1))
    assert item["energy_std"] > 0
    assert potential.ood.numbers.tolist() == [8, 14]
    assert 0 < item["ood_score"].max() == item["ood_score_max"] < math.inf
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
        "posterior": {"family": "posthoc_laplace", "projections": 1, "perturbed_share": 0.2},
        "uncertainty": {"n_draws": 2},
        "plain": {"enabled": True},
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
        "objective": {"kind": "function_kl", "temperature": 1.0, "frames": "replay.extxyz"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "recipe.yaml"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    for part in ("replay.extxyz", "frame 1", "Au"):
        assert part in message
    assert not Path("runs").exists()


class TestReplayedFrames:
    """What ``function_kl`` compares on."""

    def frames(self, tmp_path: Path, *overrides: str) -> list[Any]:
        from ase.io import write

        from blip_ft.config import apply_override, parse_recipe
        from blip_ft.data.split.context import load_context
        from blip_ft.data.split.splits import load_splits
        from blip_ft.training.function_prior import replayed

        write(tmp_path / "train.extxyz", frames(12))
        write(tmp_path / "mine.extxyz", frames(3, seed=5))
        write(tmp_path / "other.extxyz", frames(2, seed=6))
        tree: dict[str, Any] = {
            "name": "run",
            "data": {"train": str(tmp_path / "train.extxyz")},
            "model": {"adapter": "fake", "checkpoint": "tiny"},
            "posterior": {"family": "weight", "prior_scale": 0.2, "perturbed_share": 0.5},
            "objective": {"kind": "function_kl", "temperature": 1.0},
        }
        for override in overrides:
            apply_override(tree, override.replace("@", f"{tmp_path}/"))
        recipe = parse_recipe(tree)
        splits, backbone = load_splits(recipe.data), FakeBackbone()
        context = load_context(recipe.data, backbone, len(splits.train), lambda text: None)
        self.n_train = len(splits.train)
        return replayed(recipe, splits.train, backbone, context)

    def test_the_users_structures_and_perturbed_copies(self, tmp_path: Path) -> None:
        mine = frames(3, seed=5)
        both = self.frames(tmp_path, "data.context=@mine.extxyz")
        made = self.frames(tmp_path)
        assert [a.positions.tolist() for a in both[3:]] == [a.positions.tolist() for a in made]
        assert len(made) == math.ceil(0.5 * self.n_train)
        for one, other in zip(both, mine, strict=False):
            np.testing.assert_allclose(one.positions, other.positions, atol=1e-7)

    def test_the_users_structures_alone(self, tmp_path: Path) -> None:
        assert len(self.frames(tmp_path, "data.context=@mine.extxyz", "posterior.perturbed_share=0")) == 3

    def test_named_frames_come_in_their_place(self, tmp_path: Path) -> None:
        options = ("data.context=@mine.extxyz", "objective.frames=@other.extxyz")
        (one, _) = self.frames(tmp_path, *options)
        np.testing.assert_allclose(one.positions, frames(1, seed=6)[0].positions, atol=1e-7)

    def test_a_run_trains_on_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The frames of the loss are the user's, labelled by the pretrained model."""
        from ase.io import write

        from blip_ft.training import function_prior

        seen: list[Any] = []
        make_function_prior = function_prior.make_function_prior

        def remember(potential: Any, structures: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(structures)
            return make_function_prior(potential, structures, *args, **kwargs)

        monkeypatch.setattr(function_prior, "make_function_prior", remember)
        monkeypatch.chdir(tmp_path)
        write("train.extxyz", frames(12))
        write("mine.extxyz", frames(3, seed=5))
        tree = {
            "name": "run",
            "output": "runs",
            "data": {"train": "train.extxyz", "context": "mine.extxyz"},
            "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
            "posterior": {"family": "weight", "prior_scale": 0.2, "perturbed_share": 0},
            "objective": {"kind": "function_kl", "temperature": 1.0},
            "uncertainty": {"n_draws": 2},
            "plain": {"enabled": False},
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(tree))
        assert main(["fit", "recipe.yaml"]) == 0
        assert len(seen) == 3
        for one, other in zip(seen, frames(3, seed=5), strict=True):
            np.testing.assert_allclose(one.positions, other.positions, atol=1e-7)


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

    def test_the_default_family_learns(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The command of docs/families.md: labels of another potential, around the initial weights."""
        from ase.io import write

        monkeypatch.chdir(tmp_path)
        sets = {
            role: frames(n, seed=seed, other=True)
            for seed, (role, n) in enumerate(
                {"train": 32, "validation": 8, "calibration": 8, "test": 8}.items()
            )
        }
        for role, atoms in sets.items():
            write(f"{role}.extxyz", atoms)
        load = FakeBackbone.load

        def pretrained(*args: Any, **options: Any) -> FakeBackbone:
            """As if trained: the fake backbone's weights are its initial ones otherwise."""
            backbone = load(*args, **options)
            for p in backbone.parameters():
                p.data.mul_(1.5)
            return backbone

        monkeypatch.setattr(FakeBackbone, "load", pretrained)
        tree = {
            "name": "run",
            "output": "runs",
            "data": {role: f"{role}.extxyz" for role in sets} | {"batch_size": 4},
            "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
            "optimizer": {"learning_rate": 0.003},
            "uncertainty": {"n_draws": 4, "linearity_draws": 2},
            "plain": {"enabled": False},
            "trainer": {"max_epochs": 12, "accelerator": "cpu"},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(tree))
        command = ("model.from_scratch=true", "model.train=rest", "posterior.prior_scale=1")
        assert main(["fit", "recipe.yaml", *command]) == 0

        fresh = FakeBackbone()
        calculator = fresh.stock_calculator()
        untrained = {
            role: 1e3 * np.mean([np.abs(calculator.get_forces(a) - a.arrays["REF_forces"]) for a in atoms])
            for role, atoms in sets.items()
        }
        metrics = json.loads(Path("runs/run/metrics.json").read_text())
        assert metrics["pretrained"]["seen"]["force_mae_mev_per_ang"] == pytest.approx(untrained["test"])
        assert metrics["blip"]["seen"]["force_mae_mev_per_ang"] < 0.2 * untrained["test"]
        history = [
            row["val_force_mae"] for row in json.loads(Path("runs/run/history.json").read_text())["blip"]
        ]
        # before the first closed form, whose Gauss-Newton step helps along, and at the end
        assert max(history[6], history[-1]) < 0.2 * untrained["validation"]

        potential = blip_ft.load("runs/run")
        assert potential.posterior.family == "pathwise"
        initial = dict(fresh.model.named_parameters())
        for name, layer in potential.converted.layers.items():
            weight = initial[f"{name}.weight"]
            assert torch.equal(layer.pretrained, weight)
            assert layer.delta.abs().max() > 0.01
            rms = weight.square().mean().sqrt()
            torch.testing.assert_close(potential.prior.std(name), rms.expand_as(weight))
        starts = [start for _, start in potential.prior.rest]
        biases = [p for name, p in initial.items() if name.endswith("bias") and "again" not in name]
        assert len(starts) == len(biases) == 5
        for start, bias in zip(starts, biases, strict=True):
            assert torch.equal(start, bias)
        for item in predict_atoms(potential, sets["test"]):
            for key in ("energy_std", "forces_std", "stress_std"):
                assert np.isfinite(item[key]).all()
                assert (np.asarray(item[key]) > 0).all()

    @pytest.mark.backend("sevennet")
    def test_sevennet(self) -> None:
        from ase.build import molecule

        from blip_ft.adapters.sevennet.backbone import SevenNetBackbone
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
