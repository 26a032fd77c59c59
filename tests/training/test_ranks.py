"""Two processes must train exactly like one: sampler, noise and loss are written for ranks."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from blip_ft.cli import main

STEPS = 10
PATHWISE: dict[str, object] = {
    "family": "pathwise",
    "prior_scale": 0.3,
    "rank": 8,
    "projections": 4,
    "start": 0.4,
}


def train_recipe(
    folder: Path,
    devices: int,
    batch_size: int = 4,
    posterior: dict[str, object] | None = None,
    kind: str = "elbo",
    epochs: int = 2,
) -> Path:
    """A recipe for so many ranks."""
    recipe = {
        "name": f"ranks{devices}",
        "output": str(folder),
        "data": {"train": "sio2_polymorphs@train", "batch_size": batch_size}
        | {r: f"sio2_polymorphs@{r}" for r in ("validation", "calibration")}
        | {"test": "sio2_polymorphs@test"},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": posterior or PATHWISE,
        "objective": {"temperature": 0.01, "kind": kind},
        "plain": {"enabled": False},
        "uncertainty": {"n_draws": 2},
        "trainer": {
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "gradient_clip_val": 10.0,
        },
    }
    path = folder / f"recipe{devices}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(
    folder: Path,
    *,
    devices: int,
    batch_size: int,
    posterior: dict[str, object],
    kind: str = "elbo",
    epochs: int = 2,
    steps: int = STEPS,
) -> list[float]:
    """``train/loss`` of the first steps of a run through the command line."""
    path = train_recipe(folder, devices, batch_size, posterior, kind, epochs)
    if devices == 1:
        assert main(["fit", str(path)]) == 0
        return read(folder / f"ranks{devices}", steps)
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
    return read(folder / f"ranks{devices}", steps)


def read(run: Path, steps: int) -> list[float]:
    """``train/loss`` of the first steps."""
    with (run / "metrics.csv").open() as file:
        rows = [row["train/loss"] for row in csv.DictReader(file)]
    return [float(x) for x in rows if x][:steps]


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
            {
                "family": "sketch",
                "prior_scale": 0.3,
                "rank": 8,
                "buckets": 128,
                "projections": 4,
                "start": 0.0,
            },
            "elbo",
            marks=pytest.mark.full,
            id="sketch",
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


@pytest.mark.full
def test_one_to_four_ranks_train_one_model(tmp_path: Path) -> None:
    """The loss of 30 steps, the posterior, and what is made of them; ranks divide rows, draws and predictions."""
    losses = {
        n: train(tmp_path, devices=n, batch_size=12 // n, posterior=PATHWISE, epochs=10, steps=30)
        for n in (1, 2, 3, 4)
    }
    assert len(losses[1]) == 30
    one = load_file(tmp_path / "ranks1/model/model.safetensors")
    metrics = json.loads((tmp_path / "ranks1/metrics.json").read_text())
    for n in (2, 3, 4):
        assert losses[n] == pytest.approx(losses[1], rel=1e-9), n
        other = load_file(tmp_path / f"ranks{n}/model/model.safetensors")
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-9, msg=f"{n} ranks: {name}")
        found = json.loads((tmp_path / f"ranks{n}/metrics.json").read_text())
        for key, value in metrics["blip"]["all"].items():
            assert found["blip"]["all"][key] == pytest.approx(value, rel=1e-6, abs=1e-9), (n, key)


@pytest.mark.default
def test_two_ranks_are_killed_and_go_on(tmp_path: Path) -> None:
    """All processes of a run by SIGKILL, after some steps; then `resume` with as many."""
    train(tmp_path, devices=2, batch_size=4, posterior=PATHWISE, epochs=3)
    recipe = tmp_path / "recipe2.yaml"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RANK", "LOCAL_RANK"))}
    program = [sys.executable, "-m", "blip_ft.cli"]
    with subprocess.Popen(
        [*program, "fit", str(recipe), "name=killed"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as started:
        assert started.stderr is not None
        for line in started.stderr:
            if line.startswith("epoch 2/"):
                os.killpg(started.pid, signal.SIGKILL)
                break
        assert started.wait(60) == -signal.SIGKILL
    run = tmp_path / "killed"
    assert (run / "pieces/epochs.json").exists()
    done = subprocess.run(
        [*program, "resume", str(run)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on after 2 epochs" in done.stderr or "going on after 1 epochs" in done.stderr
    for name in ("metrics.json", "calibration.json", "model/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "ranks2" / name).read_bytes(), name


@pytest.mark.parametrize(
    "failing", [pytest.param(0, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.default)]
)
def test_a_rank_that_fails_ends_all(failing: int, tmp_path: Path) -> None:
    """Within a minute, with its message and no process left behind."""
    code = (
        "import os, sys, time\n"
        "from blip_ft.training import module\n"
        "from blip_ft.errors import BlipError\n"
        "step = module.FineTuneModule.training_step\n"
        "def failing(self, batch, batch_idx):\n"
        f"    if self.trainer.global_rank == {failing} and self.global_step == 2:\n"
        "        print('failed at', time.time(), file=sys.stderr, flush=True)\n"
        "        raise BlipError('this rank cannot go on')\n"
        "    return step(self, batch, batch_idx)\n"
        "module.FineTuneModule.training_step = failing\n"
        "from blip_ft.cli import main\n"
        "sys.exit(main())\n"
    )
    (tmp_path / "program.py").write_text(code)
    train_recipe(tmp_path, 2)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "RANK", "LOCAL_RANK"))}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), "fit", str(tmp_path / "recipe2.yaml")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as started:
        _, errors = started.communicate(timeout=300)  # until no process is left that could write
        ended = time.time()
    assert started.returncode != 0
    assert "this rank cannot go on" in errors
    failed = float(next(line for line in errors.splitlines() if line.startswith("failed at")).split()[2])
    assert ended - failed < 60
