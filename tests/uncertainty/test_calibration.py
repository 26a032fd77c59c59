import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import norm

from blip_ft.potential.calibration import PROPERTIES, Calibration, PropertyCalibration
from blip_ft.uncertainty.calibration import (
    LEVELS,
    calibrate,
    conformal_quantile,
    fit,
    gaussian_nll,
    rmse_calibration,
)
from blip_ft.uncertainty.diagnostics import find_diagnostics, one_frame_carries
from blip_ft.uncertainty.metrics import set_metrics

ML = math.inf  # plain maximum likelihood


def synthetic(noise: float, scale: float, n: int = 40_000, seed: int = 0, width: float = 1.0):
    rng = np.random.default_rng(seed)
    s = 0.05 * np.exp(width * rng.normal(size=n))
    return rng.normal(size=n) * np.sqrt(noise**2 + (scale * s) ** 2), s


@pytest.mark.parametrize(
    ("noise", "scale"), [(0.02, 1.7), (0.1, 0.5), (0.005, 1.0), (0.05, 6.0), (1.0, 20.0)]
)
@pytest.mark.parametrize("prior", [ML, math.log(10)])
def test_recovers_noise_and_scale(noise, scale, prior):
    found = fit(*synthetic(noise, scale), scale_prior=prior)
    assert found.aleatoric == pytest.approx(noise, rel=0.05)
    assert found.scale == pytest.approx(scale, rel=0.05)


def test_recovers_the_ends():
    only_scale = fit(*synthetic(0.0, 0.3))
    assert only_scale.aleatoric < 2e-3
    assert only_scale.scale == pytest.approx(0.3, rel=0.02)
    error, s = synthetic(0.02, 0.0)
    only_noise = fit(error, s, scale_prior=ML)
    assert only_noise.aleatoric == pytest.approx(0.02, rel=0.02)
    assert only_noise.scale < 0.01


def test_no_spread_gives_the_rms_exactly():
    error = np.array([0.3, -0.1, 0.2, 0.05, -0.4, 0.1])
    rms = math.sqrt(np.mean(error**2))
    for std, scale in ((None, 0.0), (np.zeros(6), 1.0)):
        found = fit(error, std)
        assert (found.aleatoric, found.scale) == (pytest.approx(rms, rel=1e-14), scale)
        assert found.zms_before is None
        assert found.nll_before is None
        assert found.nll_after == pytest.approx(gaussian_nll(error, rms).mean())


def test_constant_spread_is_divided_by_the_prior():
    rng = np.random.default_rng(1)
    error = rng.normal(size=200)
    rms = math.sqrt(np.mean(error**2))
    narrow = fit(error, np.full(200, 0.5))
    assert narrow.scale == pytest.approx(1.0, abs=1e-3)
    assert narrow.aleatoric == pytest.approx(math.sqrt(rms**2 - 0.25), rel=1e-3)
    wide = fit(error, np.full(200, 4.0))
    assert wide.scale == pytest.approx(rms / 4, rel=1e-6)
    assert wide.aleatoric == 0.0


@given(
    seed=st.integers(0, 10_000),
    noise=st.floats(1e-3, 1),
    scale=st.floats(0, 5),
    n=st.integers(5, 60),
    unit=st.floats(1e-3, 1e3),
)
def test_optimal_and_invariant(seed, noise, scale, n, unit):
    error, s = synthetic(noise, scale, n=n, seed=seed)
    found = fit(error, s, scale_prior=ML)
    total = found.total(s)
    # the mean squared z-score is 1, and no other (a, c) that an independent optimiser finds is better
    assert np.mean((error / total) ** 2) == pytest.approx(1.0, rel=1e-9)

    def nll(x):
        return gaussian_nll(error, np.sqrt(x[0] ** 2 + (x[1] * s) ** 2) + 1e-300).mean()

    for start in ([0.1, 0.1], [0.001, 2.0], [1.0, 0.01]):
        other = minimize(nll, start, method="Nelder-Mead", options={"maxiter": 400})
        assert found.nll_after <= other.fun + 1e-6
    # other units of error and spread; order and sign of the residuals
    order = np.random.default_rng(seed).permutation(n)
    rescaled = fit(unit * error, unit * s, scale_prior=ML)
    shuffled = fit(-error[order], s[order], scale_prior=ML)
    for other_fit, factor in ((rescaled, unit), (shuffled, 1.0)):
        assert other_fit.nll_after == pytest.approx(found.nll_after + math.log(factor), abs=1e-7)
        np.testing.assert_allclose(other_fit.total(factor * s), factor * total, rtol=1e-3)


def test_other_unit_of_the_spread_changes_the_scale_only():
    error, s = synthetic(0.03, 1.2)
    a, b = fit(error, s, scale_prior=ML), fit(error, 7 * s, scale_prior=ML)
    assert b.scale == pytest.approx(a.scale / 7, rel=1e-6)
    assert b.aleatoric == pytest.approx(a.aleatoric, rel=1e-6)


def test_prior_keeps_an_unlucky_spread_but_yields_to_data():
    """Spread unrelated to errors: few frames keep some of it, many frames switch it off."""
    scales = []
    for frames in (8, 20_000):
        rng = np.random.default_rng(3)
        s = 0.05 * np.exp(rng.normal(size=frames))
        error = 0.05 * rng.normal(size=frames)
        ml, prior = fit(error, s, scale_prior=ML), fit(error, s)
        assert prior.scale >= ml.scale
        scales.append(prior.scale)
    assert scales[0] > 0.1
    assert scales[1] < 0.05


def test_frames_not_components_are_counted_by_the_prior():
    error, s = synthetic(0.05, 0.0, n=400, seed=5)
    many = fit(error, s, np.arange(400))
    few = fit(error, s, np.repeat(np.arange(4), 100))
    assert few.n_frames == 4
    assert many.n_frames == 400
    assert few.scale > many.scale


def test_few_residuals_keep_scale_one():
    error, s = np.array([0.5, -0.4, 0.3]), np.array([0.1, 0.1, 0.1])
    found = fit(error, s)
    assert found.scale == 1.0
    assert found.aleatoric == pytest.approx(math.sqrt(np.mean(error**2) - 0.01), rel=1e-6)
    assert fit(0.01 * error, s).aleatoric == 0.0
    assert found.excess_kurtosis is None


def test_zeros_by_symmetry_do_not_sharpen_the_fit():
    error, s = synthetic(0.02, 1.0, n=3000)
    padded = fit(np.concatenate([error, np.zeros(3000)]), np.concatenate([s, np.zeros(3000)]))
    bare = fit(error, s)
    assert padded.aleatoric == pytest.approx(bare.aleatoric, rel=1e-3)
    assert padded.scale == pytest.approx(bare.scale, rel=1e-3)
    assert math.isfinite(padded.nll_after)
    perfect = fit(np.zeros(8), np.full(8, 0.1))
    assert (perfect.aleatoric, perfect.scale) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("error", "std"),
    [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([1.0], [-1.0]), ([1.0], [math.inf])],
)
def test_refuses_what_cannot_be_fitted(error, std):
    with pytest.raises(ValueError, match=r"residuals|finite"):
        fit(error, std)
    with pytest.raises(ValueError, match="aleatoric"):
        PropertyCalibration(-1.0)


def test_coverage_is_nominal_after_calibration(make_prediction):
    """Fit on some frames, count on others, for each property."""
    truth = {"noise": 0.04, "scale": 1.8, "spread": 0.05}
    calibration = calibrate(make_prediction(400, seed=1, **truth))
    test = make_prediction(800, seed=2, name="test", **truth)
    total = calibration.total_std(test)
    for name, error in (
        ("energy", test.energy_label - test.energy),
        ("forces", test.forces_error),
        ("stress", test.stress_error),
    ):
        item = getattr(calibration, name)
        assert item.scale == pytest.approx(1.8, rel=0.15)
        for level in (0.5, 0.9, 0.95):
            # 4 standard errors of a binomial share
            tolerance = 4 * math.sqrt(level * (1 - level) / error.size) + 0.01
            inside = np.abs(error) <= norm.ppf(0.5 + level / 2) * total[name]
            assert inside.mean() == pytest.approx(level, abs=tolerance)
            conformal = np.abs(error) <= item.conformal_quantile(level) * total[name]
            assert conformal.mean() == pytest.approx(level, abs=tolerance + 0.02)


def test_heavy_tails_are_reported():
    rng = np.random.default_rng(0)
    s = np.full(20_000, 0.1)
    gaussian = fit(0.1 * rng.normal(size=s.size), s)
    student = fit(0.1 * rng.standard_t(5, size=s.size), s)
    assert abs(gaussian.excess_kurtosis) < 0.2
    assert student.excess_kurtosis > 2


def test_zms_before_tells_too_wide_from_too_narrow():
    error, s = synthetic(0.0, 1.0)
    assert fit(error, s).zms_before == pytest.approx(1.0, rel=0.03)
    assert fit(error, 4 * s).zms_before == pytest.approx(1 / 16, rel=0.03)
    assert fit(error, s / 3).zms_before == pytest.approx(9, rel=0.03)


# ---- conformal -------------------------------------------------------------------------------


@given(n=st.integers(1, 60), level=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_conformal_is_the_corrected_order_statistic(n, level, seed):
    scores = np.random.default_rng(seed).exponential(size=n)
    rank = math.ceil((n + 1) * level - 1e-9)
    expected = math.inf if rank > n else np.sort(scores)[rank - 1]
    assert conformal_quantile(scores, level) == expected


def test_conformal_covers_in_small_samples():
    """Marginal coverage over many repetitions: at least the level, at most level + 1/(n+1)."""
    rng = np.random.default_rng(0)
    n, level, hits = 12, 0.8, []
    for _ in range(6000):
        scores = rng.exponential(size=n + 1)
        hits.append(scores[-1] <= conformal_quantile(scores[:-1], level))
    assert level - 0.02 <= np.mean(hits) <= level + 1 / (n + 1) + 0.02


def test_conformal_counts_frames_not_components():
    """Components of a frame share its difficulty; pooled quantiles then under-cover, ours do not."""
    rng = np.random.default_rng(1)
    frames, size, level = 10, 30, 0.9
    grouped, pooled = [], []
    owner = np.repeat(np.arange(frames), size)
    for _ in range(1500):
        difficulty = np.exp(rng.normal(size=frames + 1))
        scores = difficulty[:, None] * np.abs(rng.normal(size=(frames + 1, size)))
        known, new = scores[:-1].reshape(-1), scores[-1]
        grouped.append((new <= conformal_quantile(known, level, owner)).mean())
        pooled.append((new <= conformal_quantile(known, level)).mean())
    assert np.mean(grouped) >= level - 0.01
    assert np.mean(pooled) < np.mean(grouped) - 0.02
    assert conformal_quantile(np.ones(300), 0.9, np.repeat(np.arange(3), 100)) == math.inf


def test_conformal_refuses_a_level_outside_and_an_unknown_one():
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_quantile([1.0], 1.0)
    assert conformal_quantile([], 0.5) == math.inf
    item = fit([0.1] * 20, None)
    with pytest.raises(KeyError, match=r"0\.77"):
        item.conformal_quantile(0.77)


# ---- containers ------------------------------------------------------------------------------


def test_json_round_trip(make_prediction):
    calibration = calibrate(make_prediction(6))  # few frames: some conformal factors are infinite
    assert math.isinf(calibration.energy.conformal_quantile(0.99))
    text = json.dumps(calibration.to_dict(), allow_nan=False)
    assert Calibration.from_dict(json.loads(text)) == calibration
    assert set(calibration.energy.conformal) == set(LEVELS)


def test_missing_labels_leave_the_identity(make_prediction):
    p = make_prediction(10)
    p.stress_label[:] = np.nan
    p.forces_label[:5] = np.nan
    calibration = calibrate(p)
    assert calibration.stress == PropertyCalibration()
    assert calibration.forces.n_residuals == 3 * (p.numbers.size - 5)
    np.testing.assert_array_equal(calibration.total_std(p)["stress"], p.stress_std)
    identity = Calibration.identity().total_std(p)
    np.testing.assert_allclose(identity["energy"], p.energy_std)
    np.testing.assert_array_equal(identity["forces"], p.forces_std)


def test_energy_noise_is_per_atom(make_prediction):
    p = make_prediction(5)
    calibration = Calibration(energy=PropertyCalibration(0.002, 0.0))
    np.testing.assert_allclose(calibration.total_std(p)["energy"], 0.002 * p.n_atoms)


def test_constant_error_bars_of_a_model_without_spread(make_prediction):
    p = make_prediction(30, with_std=False)
    calibration = rmse_calibration(p)
    assert calibration.forces.aleatoric == pytest.approx(np.sqrt(np.mean(p.forces_error**2)))
    assert calibration.energy.aleatoric == pytest.approx(np.sqrt(np.mean(p.energy_error**2)))
    total = calibration.total_std(p)
    assert total["forces"].shape == p.forces.shape
    assert np.ptp(total["forces"]) == 0
    assert Calibration.identity().total_std(p) == {}
    fitted = calibrate(p)
    assert fitted.forces.scale == 0.0
    assert fitted.forces.aleatoric == pytest.approx(calibration.forces.aleatoric)


def test_few_frames_widen_the_bars_as_much_as_their_own_error():
    """Frames share one unknown width each: coverage of new frames is nominal only after widening."""
    rng = np.random.default_rng(0)
    frames, inside_raw, inside_wide = 8, [], []
    for _ in range(4000):
        # one residual per frame: components of a frame count once
        a = float(np.sqrt(np.mean(rng.normal(size=frames) ** 2)))
        raw = PropertyCalibration(a, n_residuals=frames, n_frames=frames)
        new = rng.normal()
        inside_raw.append(abs(new) < 1.645 * raw.aleatoric)
        inside_wide.append(abs(new) < 1.645 * raw.for_new_frames().aleatoric)
    assert np.mean(inside_raw) < 0.875
    assert 0.88 < np.mean(inside_wide) < 0.92


def test_widening_leaves_unfitted_properties_alone():
    assert Calibration.identity().for_new_frames() == Calibration.identity()


# ---- labels that are wrong -------------------------------------------------------------------


@pytest.mark.parametrize("size", [5.0, 50.0, 1e3])
def test_one_force_component_does_not_move_the_scale(make_prediction, size):
    """The fit is exactly that of the other frames, and says who was left out."""
    p = make_prediction(12, noise=0.02, scale=1.5)
    balance(p)
    clean = calibrate(p)
    assert not clean.forces.left_out
    others = calibrate(p.select([i for i in range(12) if i != 4]))
    atom = int(np.flatnonzero(p.structure == 4)[0])
    p.forces_label[atom, 1] += size
    found = calibrate(p)
    assert found.forces.left_out == ("seen.xyz#4",)
    assert replace(found.forces, left_out=()) == others.forces
    assert found.forces.scale == pytest.approx(clean.forces.scale, rel=0.2)
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    (signature,) = [
        s for s in find_diagnostics(metrics={}, calibration=found, history=[]) if "label" in s.name
    ]
    assert "seen.xyz#4" in signature.message
    constant = rmse_calibration(p)
    assert constant.forces.aleatoric < 0.3


def balance(p):
    """Forces of every frame that sum to zero, as those of a calculation do."""
    for values in (p.forces, p.forces_label):
        for i in range(p.n_structures):
            inside = p.structure == i
            values[inside] -= values[inside].mean(axis=0)


def test_one_energy_does_not_move_the_scale(make_prediction):
    p = make_prediction(12, noise=0.02)
    p.numbers[:] = 14
    kept = [i for i in range(12) if p.n_atoms[i] == p.n_atoms[0]] or [0]
    p = p.select((kept * 12)[:12])  # frames of the same atoms
    p.energy_label = p.energy + 0.004 * p.n_atoms * np.random.default_rng(0).normal(size=12)
    clean = calibrate(p).energy
    assert not clean.left_out
    p.energy_label[3] += 3.0 * p.n_atoms[3]
    found = calibrate(p).energy
    assert len(found.left_out) == 1
    assert found.n_residuals == 11
    assert found.aleatoric == pytest.approx(clean.aleatoric, rel=0.5)


def test_clean_frames_are_all_used_whatever_the_model_does(make_prediction):
    """A model that fails on one frame, forces that sum to zero there too: the error bars have to know."""
    p = make_prediction(12)
    balance(p)
    inside = p.structure == 2
    p.forces[inside] *= 5.0
    found = calibrate(p).forces
    assert (found.left_out, found.n_frames) == ((), 12)
    assert found.carried_by == "seen.xyz#2"
    (signature,) = one_frame_carries("forces", found)
    assert "one frame carries the scale of the error bars (seen.xyz#2)" in signature.message
    assert f"{found.carried_factor:.2g} times narrower" in signature.message


@pytest.mark.parametrize("frames", [4, 6, 12, 40])
def test_honest_errors_have_no_carrier(make_prediction, frames):
    for seed in range(40):
        calibration = calibrate(make_prediction(frames, seed=seed, noise=0.03))
        for name in PROPERTIES:
            item = getattr(calibration, name)
            assert (item.left_out, item.carried_by) == ((), ""), (seed, name)


def test_files_do_not_state_what_was_not_measured(make_prediction):
    p = make_prediction(8)
    p.stress_label[:] = np.nan
    calibration = calibrate(p)
    tree = json.loads(json.dumps(calibration.to_dict(), allow_nan=False))
    assert tree["stress"]["aleatoric"] is None
    assert tree["forces"]["aleatoric"] is not None
    assert Calibration.from_dict(tree) == calibration
    for name, item in tree.items():  # files of earlier versions hold a zero, and nothing of frames left out
        item["aleatoric"] = item["aleatoric"] or 0.0
        tree[name] = {k: v for k, v in item.items() if not k.startswith(("left", "carried"))}
    assert Calibration.from_dict(tree) == calibration


def test_what_was_not_measured_has_no_scores(make_prediction):
    p = make_prediction(8)
    known = calibrate(p)
    out = set_metrics(p, replace(known, energy=PropertyCalibration()))
    assert {"coverage90_energy", "energy_crps_mev_per_atom"}.isdisjoint(out)
    assert {"coverage90", "force_crps_mev_per_ang", "energy_mae_mev_per_atom"} <= out.keys()
