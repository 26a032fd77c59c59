from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.robust import robust_fit, robust_z, spread, trimmed_rms


def test_spread_is_the_std_of_a_gaussian_and_ignores_outliers() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 20_000)
    assert abs(spread(values) - 2.0) < 0.05
    values[:2000] = 1e6
    assert abs(spread(values) - 2.0) < 0.4
    assert spread(np.zeros(0)) == 0.0
    assert abs(robust_z(values, 1e-3)[0]) > 1e5
    assert trimmed_rms(np.array([1.0, -1.0, 1.0, 100.0]), keep=0.75) == 1.0


@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.1, 0.25]))
def test_a_quarter_of_wrong_targets_does_not_mislead(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(120, 4))
    target = design @ np.array([1.0, -2.0, 0.5, 0.0]) + 7.0 + rng.normal(0, 0.01, 120)
    bad = rng.choice(120, int(share * 120), replace=False)
    target[bad] += rng.choice([-1, 1], len(bad)) * 5.0
    fit = robust_fit(design, target)
    good = np.setdiff1d(np.arange(120), bad)
    assert np.abs(fit.residual[good]).max() < 0.1
    assert (np.abs(fit.residual[bad]) > 4.5).all()
    assert (fit.weight[bad] == 0).all()


def test_a_point_is_left_out_of_its_own_fit() -> None:
    design = np.append(np.zeros(20), 1.0)[:, None]
    target = np.append(np.random.default_rng(0).normal(0, 0.1, 20), 0.5)
    fit = robust_fit(design, target, ridge=1e-9)
    assert abs(fit.residual[-1]) > 0 or fit.weight[-1] == 0


def test_more_columns_than_points_and_constant_targets() -> None:
    rng = np.random.default_rng(0)
    assert np.isfinite(robust_fit(rng.normal(size=(8, 12)), rng.normal(size=8)).residual).all()
    assert np.abs(robust_fit(rng.normal(size=(9, 2)), np.full(9, 3.0)).residual).max() < 1e-6
