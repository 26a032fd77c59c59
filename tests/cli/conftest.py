"""A finished run on the fake backbone, frames, and a way to run commands in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ase.io import write

from blip_ft import cli
from blip_ft.config import PosteriorConfig
from blip_ft.potential.calibration import Calibration, PropertyCalibration
from blip_ft.potential.checkpoint import save_model

from .structures import potential_of, structure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a finished run leaves it, with a calibrated model that was never trained."""
    folder: Path = tmp_path_factory.mktemp("runs") / "fake"
    potential = potential_of(PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.05))
    potential.references = {8: -2.0, 14: -5.0}
    potential.calibration = Calibration(
        energy=PropertyCalibration(aleatoric=1e-3, scale=2.0),
        forces=PropertyCalibration(aleatoric=2e-2, scale=3.0),
    )
    save_model(potential, folder / "model")
    return folder


@pytest.fixture(scope="module")
def pathwise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default family, with made-up samples of its posterior."""
    folder: Path = tmp_path_factory.mktemp("runs") / "pathwise"
    potential = potential_of(PosteriorConfig(rank=16))
    samples = potential.posterior.directions
    samples.copy_(0.01 * torch.randn(samples.shape, generator=torch.Generator().manual_seed(0)))
    potential.amplitude = 0.03
    save_model(potential, folder / "model")
    return folder


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Five structures without labels, one of them a molecule."""
    path = tmp_path / "in.extxyz"
    write(path, [structure(seed=i, periodic=i != 3) for i in range(5)])
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit code, standard output, standard error."""

    def run_main(*argv: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run_main
