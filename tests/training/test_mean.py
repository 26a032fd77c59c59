"""Runs whose mean has low rank, or does not move at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blip_ft.cli import main
from blip_ft.potential.checkpoint import load_model

SMALL = [
    "model.adapter=fake",
    "model.checkpoint=tiny",
    "model.dtype=float64",
    "data.train=sio2_polymorphs@train",
    "data.validation=sio2_polymorphs@validation",
    "data.calibration=sio2_polymorphs@calibration",
    "data.test=sio2_polymorphs@test",
    "posterior.perturbed_share=0.1",
    "uncertainty.n_draws=2",
    "uncertainty.calibration_draws=2",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=2",
]


#: of the default family
FEW = ["posterior.rank=4", "posterior.projections=1"]


def fit(folder: Path, *overrides: str) -> dict:
    few = [] if any("posterior.family" in o for o in overrides) else FEW
    assert main(["fit", "sio2_sevennet", f"output={folder}", "name=run", *SMALL, *few, *overrides]) == 0
    return json.loads((folder / "run/metrics.json").read_text())


def test_a_frozen_mean_gets_error_bars_without_training(tmp_path: Path) -> None:
    metrics = fit(tmp_path, "model.mean=frozen")
    assert "plain" not in metrics  # there is nothing to fine-tune
    key = "force_mae_mev_per_ang"
    # the draws' mean is the pretrained model up to curvature
    assert metrics["blip"]["all"][key] == pytest.approx(metrics["pretrained"]["all"][key], rel=0.1)
    potential = load_model(tmp_path / "run")
    assert all(not d.any() for d in potential.converted.deltas.values())
    assert potential.posterior.ready
    assert (tmp_path / "run/report.html").stat().st_size > 10_000


@pytest.mark.backend("lora")
def test_a_mean_of_low_rank_is_trained(tmp_path: Path) -> None:
    metrics = fit(tmp_path, "model.mean=lora", "model.lora.rank=2")
    key = "force_mae_mev_per_ang"
    assert metrics["plain"]["all"][key] < metrics["pretrained"]["all"][key]
    assert metrics["blip"]["all"][key] < metrics["pretrained"]["all"][key]
    potential = load_model(tmp_path / "run")
    assert any(d.any() for d in potential.converted.deltas.values())
    assert potential.converted.layers["readout.0"].change.lora.r == {"default": 2}


@pytest.mark.default
def test_weight_decay_pulls_every_trained_parameter_to_where_it_started(tmp_path: Path) -> None:
    """Also those beside linear blocks, which are not trained as differences; here far from zero."""
    distances = []
    for decay in (0, 50):
        options = [
            "model.train=rest",
            "posterior.family=weight",
            "posterior.prior_scale=0.1",
            "objective.temperature=1e-9",
        ]
        options += [f"optimizer.weight_decay={decay}", "optimizer.learning_rate=0.01", "plain.enabled=false"]
        fit(tmp_path / str(decay), *options, "trainer.max_epochs=4")
        potential = load_model(tmp_path / str(decay) / "run")
        rest = [(p - start).norm() for p, start in potential.prior.rest]
        deltas = [d.norm() for d in potential.converted.deltas.values()]
        assert min(start.norm() for _, start in potential.prior.rest) > 0
        distances.append((torch.stack(rest), torch.stack(deltas)))
    (free, free_deltas), (held, held_deltas) = distances
    assert (held < free).all()
    assert held.sum() < 0.7 * free.sum()
    assert held_deltas.sum() < 0.7 * free_deltas.sum()
