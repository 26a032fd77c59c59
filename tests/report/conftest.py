"""A whole run made of synthetic predictions."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from blip_ft.config import Recipe, parse_recipe
from blip_ft.uncertainty.calibration import calibrate, rmse_calibration
from blip_ft.uncertainty.diagnostics import find_diagnostics
from blip_ft.uncertainty.metrics import metrics_table
from blip_ft.uncertainty.results import SetPrediction


def make_prediction(
    name: str, *, frames: int = 12, seed: int = 0, error: float = 0.02, with_std: bool = True
) -> SetPrediction:
    """Honest error bars: errors are N(0, std^2)."""
    rng = np.random.default_rng(seed)
    n_atoms = rng.integers(4, 9, size=frames)
    n = int(n_atoms.sum())
    energy, forces, stress = (
        -330 + rng.normal(size=frames),
        rng.normal(size=(n, 3)),
        rng.normal(size=(frames, 6)),
    )
    stds = [0.05 * error * np.exp(rng.normal(size=frames)), error * np.exp(0.5 * rng.normal(size=(n, 3)))]
    return SetPrediction(
        name=name,
        n_atoms=n_atoms,
        numbers=rng.choice([8, 14], size=n),
        frames=[f"{name}#{i}" for i in range(frames)],
        energy=energy * n_atoms,
        forces=forces,
        stress=stress,
        energy_label=(energy + stds[0] * rng.normal(size=frames)) * n_atoms,
        forces_label=forces + stds[1] * rng.normal(size=(n, 3)),
        stress_label=np.full((frames, 6), np.nan),
        energy_std=stds[0] * n_atoms if with_std else None,
        forces_std=stds[1] if with_std else None,
        stress_std=np.full((frames, 6), np.nan) if with_std else None,
    )


def make_linearity(sets: tuple[str, ...] = ("seen", "hot"), *, exact: bool = True) -> dict[str, Any]:
    """What ``linearity.study`` gives."""
    rng = np.random.default_rng(0)

    def entry(n: int) -> dict[str, Any]:
        same = np.exp(rng.normal(size=n)) * 0.02
        curve = [
            {"amplitude": a, "shift": 0.2 * a * a, "low": 1 - 0.1 * a, "median": 1.0, "high": 1 + 0.1 * a}
            for a in (0.3, 0.6, 1.0)
        ]
        draws = same * (1 + 0.01 * rng.normal(size=n))
        return {
            "draws": draws.tolist(),
            "same": same.tolist(),
            "exact": same.tolist() if exact else None,
            "curve": curve,
        }

    return {
        "n_draws": 8,
        "amplitude": 0.6,
        "max_shift": 0.05,
        "sampling_error": 0.27,
        "derivatives": "linear",
        "sets": {name: {"n_frames": 2, "energy": entry(2), "forces": entry(30)} for name in sets},
    }


@dataclass
class Finding:
    kind: str
    severity: str
    frames: list[str]
    message: str
    remedy: str


def make_recipe(name: str = "demo") -> Recipe:
    tree = {"name": name, "data": {"train": "x.xyz"}, "model": {"adapter": "fake", "checkpoint": "tiny"}}
    return parse_recipe(tree)


def make_run(unseen: tuple[str, ...] = ("hot", "dense")) -> dict[str, Any]:
    """The arguments of ``write_report``."""
    predictions, metrics = {}, {}
    calibration = calibrate(make_prediction("calibration", seed=9))
    for model, error in (("pretrained", 0.06), ("plain", 0.02), ("blip", 0.02)):
        ours = model == "blip"
        predictions[model] = {
            name: make_prediction(name, seed=i, error=error * (1 + 4 * i), with_std=ours)
            for i, name in enumerate(("seen", *unseen))
        }
        constant = rmse_calibration(make_prediction("validation", error=error, with_std=False))
        metrics[model] = metrics_table(predictions[model], calibration if ours else constant)
    history = {
        model: [
            {"epoch": float(i), "train_loss": 9.0 - i, "val_crps": 5 / (1 + i), "val_force_mae": 7 / (1 + i)}
            | ({"train_kl": 50.0 - i, "posterior_std_mean": 0.1 + 0.05 * i} if model == "blip" else {})
            for i in range(6)
        ]
        for model in ("plain", "blip")
    }
    return {
        "recipe": make_recipe(),
        "metrics": metrics,
        "predictions": predictions,
        "calibration": calibration,
        "history": history,
        "receipt": {
            "step_zero": {"n_frames": 4, "energy_ev_per_atom": 1.25e-7},
            "references": {"shift": {"Si": -110.25}, "rank": 1, "null_space": [{"O": 0.4, "Si": -0.8}]},
            "conversion": [{"name": f"layer{i}", "action": "converted", "reason": None} for i in range(40)],
            "versions": {"torch": "2.13.0"},
            "nothing": None,
        },
        "findings": [
            Finding("duplicates", "info", [], "none", ""),
            Finding("units", "warning", ["x.xyz#3"], "forces look small", "check the units"),
        ],
        "signatures": find_diagnostics(
            metrics=metrics["blip"], calibration=calibration, history=history["blip"]
        ),
    }


@pytest.fixture
def run() -> dict[str, Any]:
    """The arguments of ``write_report``."""
    return make_run()
