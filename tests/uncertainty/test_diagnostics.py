import json
import math

import numpy as np
import pytest

from blip_ft.potential.calibration import Calibration, PropertyCalibration
from blip_ft.uncertainty.calibration import fit
from blip_ft.uncertainty.diagnostics import (
    exploding_variance,
    find_diagnostics,
    over_narrow_unseen,
    over_wide_seen,
    sigma_stuck,
)
from blip_ft.uncertainty.metrics import metrics_table

HEALTHY = [{"epoch": i, "posterior_std_mean": 0.1 + 0.02 * i, "train_loss": 5.0 - i} for i in range(4)]


def history(*stds: float, **more: float) -> list[dict[str, float]]:
    return [{"epoch": i, "posterior_std_mean": s, **more} for i, s in enumerate(stds)]


def test_healthy_run_has_none(make_prediction):
    sets = {"seen": make_prediction(30), "hot": make_prediction(30, seed=1)}
    calibration = Calibration(forces=fit(sets["seen"].forces_error.ravel(), sets["seen"].forces_std.ravel()))
    assert find_diagnostics(metrics=metrics_table(sets), calibration=calibration, history=HEALTHY) == []
    assert find_diagnostics(metrics={}, calibration=Calibration.identity(), history=[]) == []


@pytest.mark.parametrize(("factor", "found"), [(10.0, True), (4.0, True), (1.5, False), (0.2, False)])
def test_wide_on_seen(factor, found):
    rng = np.random.default_rng(0)
    s = 0.05 * np.exp(rng.normal(size=500))
    result = over_wide_seen("forces", fit(rng.normal(size=500) * s, factor * s))
    assert [r.name for r in result] == ["over_wide_seen"] * found
    if found:
        assert f"about {factor:.2g}"[:7] in result[0].message
        assert "prior_scale" in result[0].remedy


def test_spread_that_calibration_switched_off_is_told_from_a_wide_one():
    rng = np.random.default_rng(0)
    s = 0.02 * np.exp(rng.normal(size=2000))
    item = fit(0.1 * rng.normal(size=2000), s)
    assert item.scale < 1 / 3
    assert item.zms_before > 1
    assert [r.name for r in over_wide_seen("forces", item)] == ["spread_switched_off"]


def test_model_without_spread_is_not_judged():
    assert over_wide_seen("forces", fit([0.1] * 8, None)) == []
    assert over_wide_seen("forces", PropertyCalibration()) == []


def test_narrow_on_unseen_names_the_set(make_prediction):
    sets = {
        "seen": make_prediction(20, scale=3),
        "hot": make_prediction(20, scale=3),
        "cold": make_prediction(20),
    }
    found = over_narrow_unseen(metrics_table(sets))
    assert [s.name for s in found] == ["over_narrow_unseen"]
    assert "'hot'" in found[0].message
    assert "inside the 90 % interval" in found[0].message


def test_narrow_by_either_measure():
    narrow = {"coverage90": 0.9, "zms": 4.1}, {"coverage90": 0.59, "zms": 1.0}, {"zms": 5.0}
    for row in narrow:
        assert len(over_narrow_unseen({"hot": row})) == 1
    for row in ({"coverage90": 0.61, "zms": 3.9}, {"coverage90": None, "zms": None}, {}):
        assert over_narrow_unseen({"hot": row}) == []
    # a single unseen set may be called 'unseen'; the pool of several is not judged again
    assert len(over_narrow_unseen({"unseen": {"zms": 9}})) == 1
    assert len(over_narrow_unseen({"hot": {"zms": 9}, "unseen": {"zms": 9}, "all": {"zms": 9}})) == 1


def test_exploding_variance():
    (error,) = exploding_variance(history(0.5, 1.0, 2.5))
    assert (error.name, error.severity) == ("exploding_variance", "error")
    (warning,) = exploding_variance(history(0.05, 0.3, 0.9))
    assert warning.severity == "warning"
    assert "18-fold" in warning.message
    for bad in (math.nan, math.inf):
        (broken,) = exploding_variance([{"epoch": 0, "train_loss": 1.0}, {"epoch": 7, "train_loss": bad}])
        assert broken.severity == "error"
        assert "epoch 7" in broken.message
        assert exploding_variance(history(0.1, bad))[0].severity == "error"
    assert exploding_variance(history(0.1, 0.5, 0.99)) == []
    assert exploding_variance(history(1.0, 0.3)) == []
    assert exploding_variance([{"epoch": 0}]) == []


def test_sigma_stuck():
    (found,) = sigma_stuck(history(0.1, 0.1005, 0.1002))
    assert found.name == "sigma_stuck"
    assert "std_learning_rate" in found.remedy
    assert sigma_stuck(history(0.1, 0.102)) == []
    assert sigma_stuck(history(0.1, 0.08, 0.1)) == []  # it left and came back
    assert sigma_stuck(history(0.1)) == []
    assert sigma_stuck([{"epoch": 0, "train_loss": 1.0}] * 3) == []


def test_all_are_collected_and_serialisable():
    wide = PropertyCalibration(0.01, 0.1, n_residuals=50, n_frames=5, zms_before=0.01)
    found = find_diagnostics(
        metrics={"hot": {"zms": 9.0, "coverage90": 0.3}},
        calibration=Calibration(forces=wide),
        history=history(0.1, 0.1, 0.1),
    )
    assert [s.name for s in found] == ["over_wide_seen", "over_narrow_unseen", "sigma_stuck"]
    assert all(s.remedy and s.message for s in found)
    json.dumps([s.to_dict() for s in found])
