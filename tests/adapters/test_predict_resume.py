"""A prediction by a real model that is killed and goes on, and one that does not fit into memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.io import read, write

from blip_ft.backbones.registry import get_adapter
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import save_model
from blip_ft.uncertainty.predict import predict_atoms

pytestmark = pytest.mark.backend("chgnet")

KILLED = """
import os, signal, sys
from blip_ft import cli
from blip_ft.cli import predict_file
predict_atoms, calls = predict_file.predict_atoms, []
def counted(*args, **options):
    calls.append(1)
    if len(calls) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return predict_atoms(*args, **options)
predict_file.predict_atoms = counted
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def potential() -> BayesianPotential:
    backbone = get_adapter("chgnet").load("0.3.0").double()
    model = ModelConfig(adapter="chgnet", checkpoint="0.3.0", dtype="float64", noise="readout")
    posterior = PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.05)
    return BayesianPotential(backbone, model, posterior, n_draws=2)


@pytest.fixture
def frames(tmp_path: Path, structures: dict[str, Any]) -> Path:
    some = [
        structures[name] for name in ("quartz", "carbide", "slab", "quartz", "ethanol", "carbide", "quartz")
    ]
    write(tmp_path / "in.extxyz", some)
    return tmp_path / "in.extxyz"


def test_a_killed_prediction_goes_on_to_the_same_file(
    potential: BayesianPotential, frames: Path, tmp_path: Path
):
    save_model(potential, tmp_path / "model")
    options = ["predict", str(tmp_path / "model"), str(frames), "--batch-size", "2", "-o"]
    target = str(tmp_path / "out.extxyz")

    def run(*argv: str) -> int:
        return subprocess.run([sys.executable, *argv], check=False, capture_output=True).returncode

    assert run("-c", KILLED, *options, target) == -signal.SIGKILL
    assert len(read(f"{target}.part", ":", format="extxyz")) == 4
    assert run("-m", "blip_ft.cli", *options, target, "--resume") == 0
    assert run("-m", "blip_ft.cli", *options, str(tmp_path / "whole.extxyz")) == 0
    assert Path(target).read_bytes() == (tmp_path / "whole.extxyz").read_bytes()
    assert not os.path.lexists(f"{target}.part")


def test_predictions_by_halves(potential: BayesianPotential, structures: dict[str, Any]):
    atoms = [structures[name] for name in ("quartz", "carbide", "slab", "ethanol")]
    want = predict_atoms(potential, atoms)
    energy, failed = type(potential.backbone).energy_of, []

    def limited(self: Any, batch: Any, **options: Any) -> Any:
        if len(batch.numbers) > 11:
            failed.append(len(batch.numbers))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return energy(self, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(potential.backbone), "energy_of", limited)
        got = predict_atoms(potential, atoms)
    assert failed
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one["forces"], other["forces"], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(one["forces_std"], other["forces_std"], rtol=1e-5, atol=1e-9)
