"""Draws evaluated together are the draws evaluated one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.families.base.linear import ClosedFormData, LinearizedModel
from blip_ft.families.registry import without_foreign_keys
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty import draws
from blip_ft.uncertainty.draws import evaluate_draws


def make(family: str) -> BayesianPotential:
    potential = BayesianPotential(
        FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(
            **without_foreign_keys({"family": family, "rank": 6, "prior_scale": 0.3, "init_std": 0.05})
        ),
        n_draws=4,
    )
    if family == "pathwise":
        rows = torch.randn(20, 472, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        nothing = np.zeros(20)
        potential.posterior.fit(
            ClosedFormData(LinearizedModel(rows, nothing, np.arange(20) % 3, nothing == 0), 0.3)
        )
    potential.references = {8: -3.0, 14: 7.0}
    return potential


@pytest.mark.parametrize("family", ["pathwise", "weight", "adaptive"])
@pytest.mark.parametrize("together", [3, 6, 100])
def test_together_and_one_by_one(family: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    crystal = bulk("SiO", "rocksalt", 4.6)
    crystal.rattle(0.1, seed=1)
    potential = make(family)
    batch = potential.backbone.batch([crystal, molecule("H2O")])
    monkeypatch.setattr(draws, "TOGETHER", {"cpu": 0})
    single = evaluate_draws(potential, batch, 6, stress=True)
    calls: list[str] = []
    forward = potential.forward

    def spy(*args: Any, **kwargs: Any) -> object:
        calls.append(args[1].mode)
        return forward(*args, **kwargs)

    monkeypatch.setattr(potential, "forward", spy)
    rows = max(len(index) for index in batch.rows.values())
    monkeypatch.setattr(draws, "TOGETHER", {"cpu": together * rows})
    several = evaluate_draws(potential, batch, 6, stress=True)
    if family == "adaptive":  # its spread depends on the input: no weights to copy
        assert calls == ["draw"] * 6
    else:
        assert calls == ["structure"] * (2 if together == 3 else 1)
    for one, other in zip(single, several, strict=True):
        for name, value in vars(one).items():
            if value is not None:
                torch.testing.assert_close(
                    getattr(other, name), value, rtol=1e-10, atol=1e-12, equal_nan=True
                )
    assert not torch.allclose(several[0].energy, several[1].energy)
    assert potential.n_draws == 4
