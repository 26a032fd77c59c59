"""Finished runs on the fake backbone, a pool of candidates, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from rich.console import Console

from blip_ft import cli
from blip_ft.config import ModelConfig, PosteriorConfig, parse_recipe
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training.fit import fit

#: of the fake backbone, all of them noisy
WEIGHTS = 472


def structures(n: int, seed: int, *, size: int = 1, width: float = 0.1) -> list[Atoms]:
    """Periodic SiO2 of 3 atoms, or twice as many, labelled by the fake potential with other weights."""
    rng = np.random.default_rng(seed)
    calculator = FakeBackbone.load("tiny", seed=1).stock_calculator()
    out = []
    for i in range(n):
        a = Atoms("SiO2", positions=[(0, 0, 0), (1.6, 0, 0), (0, 1.6, 0)], cell=[5, 5, 5], pbc=True)
        a = a.repeat((1, 1, 1 + (size > 1 and i % size == 0)))
        a.positions += rng.normal(0, width, a.positions.shape)
        a.calc = calculator
        energy, forces = a.get_potential_energy(), a.get_forces().copy()
        a.calc = None
        a.info |= {"REF_energy": energy, "trajectory": f"run{i % 4}"}
        a.arrays["REF_forces"] = forces
        out.append(a)
    return out


def run_of(folder: Path, **posterior: Any) -> Path:
    """Train on 24 structures."""
    write(folder / "train.extxyz", structures(24, 0))
    tree = {
        "name": "run",
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "train.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": posterior,
        "uncertainty": {"n_draws": 4, "calibration_draws": 4, "linearity_frames": 0},
        "plain": {"enabled": False},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
    }
    with pytest.MonkeyPatch.context() as patch:  # the figures of its report take most of the time
        patch.setattr("blip_ft.report.html.to_svg", lambda figure, title: f"<svg><!-- {title} --></svg>")
        fit(parse_recipe(tree), Console(quiet=True))
    return folder / "runs/run"


def potential_of(family: str, **options: Any) -> BayesianPotential:
    """A model that was not trained."""
    model = ModelConfig(adapter="fake", checkpoint="tiny", dtype="float64")
    posterior = PosteriorConfig(family=family, **options)
    return BayesianPotential(FakeBackbone.load("tiny"), model, posterior, n_draws=4)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sketch with a bucket for every weight, which is exact."""
    return run_of(tmp_path_factory.mktemp("exact"), family="sketch", buckets=WEIGHTS, rank=8)


@pytest.fixture(scope="session")
def pathwise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the default family."""
    return run_of(tmp_path_factory.mktemp("pathwise"), rank=32)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """30 candidates of 3 or 6 atoms in 4 trajectories, with labels that nobody may look at."""
    path = tmp_path / "pool.extxyz"
    write(path, structures(30, 7, size=3, width=0.2))
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: exit code, standard output, standard error."""

    def run_main(*argv: object) -> tuple[int, str, str]:
        code = cli.main(["select", *map(str, argv)])
        return code, *capsys.readouterr()

    return run_main
