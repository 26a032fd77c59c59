"""Real draws against the linearised model: agreement where it is linear, curvature where it is not."""

import json
import math

import numpy as np
import pytest
import torch

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.read.sources import load_source
from blip_ft.families.registry import without_foreign_keys
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty import linearity
from blip_ft.uncertainty.draws import sampling_error
from blip_ft.uncertainty.linearity import agreement, quartiles, study

from .test_linearized import RANK, make


@pytest.fixture(scope="module")
def rows():
    return {name: load_source(f"sio2_polymorphs@{name}") for name in ("test", "stishovite", "tridymite")}


def sets_of(potential, rows):
    return {name: FrameDataset(r, potential.backbone) for name, r in rows.items()}


def test_where_the_model_is_linear_all_agree(rows):
    potential = make(std=1e-5)
    potential.amplitude = 0.7
    result = study(potential, sets_of(potential, rows), n_frames=5, n_draws=256, amplitudes=(0.2,))
    assert (potential.amplitude, potential.n_draws) == (0.7, 4), "left as it was"
    assert [e["n_frames"] for e in result["sets"].values()] == [2, 2, 1]
    table = {(r["quantity"], r["reference"], r["set"]): r for r in agreement(result)}
    assert len(table) == 16, "two quantities, two references, three sets and all"
    for (_, reference, _), row in table.items():
        if reference == "same":  # no sampling error at all
            assert row["low"] == pytest.approx(1, abs=2e-3)
            assert row["high"] == pytest.approx(1, abs=2e-3)
            assert row["expected"] == 0
        else:
            assert row["expected"] == sampling_error(256) == pytest.approx(1 / math.sqrt(510))
            assert row["median"] == pytest.approx(1, abs=4 * row["expected"])
    for entry in result["sets"].values():
        for quantity in ("energy", "forces"):
            assert max(p["shift"] for p in entry[quantity]["curve"]) < 0.01
    json.dumps(result, allow_nan=False)


def test_the_mean_is_shifted_by_curvature_as_the_square_of_the_amplitude(rows):
    potential = make(std=1e-4)
    result = study(
        potential,
        sets_of(potential, {"test": rows["test"]}),
        n_frames=1,
        n_draws=8,
        amplitudes=(0.25, 0.5),
    )
    for quantity in ("energy", "forces"):
        small, large, full = (p["shift"] for p in result["sets"]["test"][quantity]["curve"])
        assert large / small == pytest.approx(4, rel=0.05)
        assert full / large == pytest.approx(4, rel=0.05)


def test_all_derivatives_give_the_spread_of_the_same_draws(rows, monkeypatch):
    """From a basis of latent space, along each draw, and by differences."""
    potential = make(std=1e-5)
    sets = sets_of(potential, {"test": rows["test"]})
    found = []
    for limit, derivatives in ((1024, True), (1, True), (1, False)):
        monkeypatch.setattr(linearity, "MAX_DIRECTIONS", limit)
        monkeypatch.setattr(linearity, "_has_derivatives", lambda _, it=derivatives: it)
        found.append(study(potential, sets, n_frames=2, n_draws=RANK + 1)["sets"]["test"])
    for quantity, tolerance in (("energy", 1e-5), ("forces", 1e-5)):
        basis, along, differences = (np.array(f[quantity]["same"]) for f in found)
        np.testing.assert_allclose(along, basis, rtol=1e-9, atol=1e-12 * basis.max())
        np.testing.assert_allclose(differences, basis, rtol=tolerance, atol=1e-6 * basis.max())
    assert found[0]["forces"]["exact"] is not None
    assert found[1]["forces"]["exact"] is None


@pytest.mark.parametrize("family", ["adaptive", "channel", "weight"])
def test_other_families(family, rows):
    potential = BayesianPotential(
        FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(
            **without_foreign_keys({"family": family, "prior_scale": 0.3, "init_std": 2e-4, "min_std": 1e-5})
        ),
    )
    result = study(potential, sets_of(potential, rows), n_frames=2, n_draws=4)
    assert list(result["sets"]) == ["test", "stishovite"], "the first sets where there are more than frames"
    assert result["derivatives"] == ("differences" if family == "adaptive" else "linear")
    for row in agreement(result):
        assert row["reference"] == "same" or row["quantity"] == "energy"
        if row["reference"] == "same":
            assert row["median"] == pytest.approx(1, abs=0.05)
    assert ("exact" in {r["reference"] for r in agreement(result)}) == (family != "adaptive")


def test_without_posterior_there_is_nothing_to_compare(rows):
    potential = make()
    potential.posterior.directions.zero_()
    result = study(potential, sets_of(potential, rows), n_frames=3, n_draws=2)
    assert result["sets"] == {}
    assert agreement(result) == []


def test_components_without_spread_do_not_count():
    reference = np.array([1.0, 2.0, 1e-9, 0.0])
    assert quartiles(np.array([1.1, 2.2, 5.0, 0.0]), reference) == pytest.approx((1.1, 1.1, 1.1))
    assert quartiles(np.zeros(2), np.zeros(2)) == (None, None, None)


def test_sampling_error_is_that_of_centred_draws():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    stds = ((z - z.mean(dim=1, keepdim=True)).square().mean(dim=1) * 6 / 5).sqrt()
    assert float(stds.std()) == pytest.approx(sampling_error(6), rel=0.06)
