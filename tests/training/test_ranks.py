"""Two processes must train exactly like one: sampler, noise and loss are written for ranks."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from blip_ft.cli import main

STEPS = 10


def train(
    folder: Path, *, devices: int, batch_size: int, posterior: dict[str, object], kind: str = "elbo"
) -> list[float]:
    """``train/loss`` of the first steps of a run through the command line."""
    recipe = {
        "name": f"ranks{devices}",
        "output": str(folder),
        "data": {"train": "sio2_polymorphs@train", "batch_size": batch_size}
        | {r: f"sio2_polymorphs@{r}" for r in ("validation", "calibration")}
        | {"test": "sio2_polymorphs@test"},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": posterior,
        "objective": {"temperature": 0.01, "kind": kind},
        "plain": {"enabled": False},
        "uncertainty": {"n_draws": 2},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "gradient_clip_val": 10.0,
        },
    }
    path = folder / f"recipe{devices}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    if devices == 1:
        assert main(["fit", str(path)]) == 0
        return read(folder / f"ranks{devices}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RANK", "LOCAL_RANK"))}
    done = subprocess.run(
        [sys.executable, "-m", "blip_ft.cli", "fit", str(path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return read(folder / f"ranks{devices}")


def read(run: Path) -> list[float]:
    """``train/loss`` of the first steps."""
    with (run / "metrics.csv").open() as file:
        rows = [row["train/loss"] for row in csv.DictReader(file)]
    return [float(x) for x in rows if x][:STEPS]


@pytest.mark.parametrize(
    ("posterior", "kind"),
    [
        pytest.param(
            {"family": "pathwise", "prior_scale": 0.3, "rank": 8, "projections": 4, "start": 0.0},
            "elbo",
            marks=pytest.mark.default,
            id="pathwise",
        ),
        pytest.param(
            {"family": "weight", "prior_scale": 0.1, "init_std": 0.05},
            "elbo",
            marks=pytest.mark.full,
            id="weight",
        ),
        pytest.param(
            {"family": "subspace", "prior_scale": 0.3, "rank": 8, "projections": 4, "start": 0.0},
            "elbo",
            marks=pytest.mark.full,
            id="subspace",
        ),
        pytest.param(
            {"family": "adaptive", "prior_scale": 0.1, "init_std": 0.05},
            "elbo+crps",
            marks=pytest.mark.full,
            id="adaptive",
        ),
        pytest.param(
            {"family": "channel", "prior_scale": 0.1, "init_std": 0.05, "empirical_bayes": True},
            "function_kl",
            marks=pytest.mark.full,
            id="function_kl",
        ),
    ],
)
def test_two_processes_give_the_loss_of_one(tmp_path: Path, posterior: dict[str, object], kind: str) -> None:
    one = train(tmp_path, devices=1, batch_size=8, posterior=posterior, kind=kind)
    two = train(tmp_path, devices=2, batch_size=4, posterior=posterior, kind=kind)
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=1e-9)
    assert len(set(one)) == STEPS  # the loss moves: the comparison is not of constants
