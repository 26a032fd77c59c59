import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm, rankdata, spearmanr

from blip_ft.errors import DataError
from blip_ft.potential.calibration import Calibration, PropertyCalibration
from blip_ft.uncertainty.calibration import rmse_calibration
from blip_ft.uncertainty.metrics import (
    Z90,
    basis,
    binned_errors,
    bootstrap_ci,
    coverage_curve,
    ence,
    gaussian_crps,
    metrics_table,
    miscalibration_area,
    partial_spearman,
    per_frame,
    set_metrics,
    single_sets,
    spearman,
)
from blip_ft.uncertainty.results import SetPrediction

ACCURACY = {
    "n_structures",
    "n_atoms",
    "energy_mae_mev_per_atom",
    "energy_rmse_mev_per_atom",
    "force_mae_mev_per_ang",
    "force_rmse_mev_per_ang",
    "stress_mae_gpa",
    "spearman_atom_null_force",
    "spearman_structure_null_energy",
    "n_energy_labels",
    "n_force_labels",
    "n_stress_labels",
    "n_ranked_atoms",
    "n_ranked_structures",
}
PROBABILISTIC = {
    "energy_crps_mev_per_atom",
    "force_crps_mev_per_ang",
    "force_nll",
    "coverage90",
    "coverage90_energy",
    "zms",
    "ence",
    "spread_skill",
    "miscalibration_area",
}
RANKINGS = {
    "spearman_atom",
    "spearman_structure",
    "spearman_atom_reference",
    "spearman_structure_reference",
    "partial_spearman_structure",
}


def tiny(**changes) -> SetPrediction:
    """Two frames of one and two atoms with errors that can be done by hand."""
    values = {
        "name": "seen",
        "n_atoms": [1, 2],
        "numbers": [8, 14, 8],
        "frames": ["a#0", "a#1"],
        "energy": [-1.0, -4.0],
        "forces": np.zeros((3, 3)),
        "stress": np.zeros((2, 6)),
        "energy_label": [-1.004, -3.996],
        "forces_label": [[0.3, 0, 0], [0, 0.6, 0], [0, 0, -0.9]],
        "stress_label": np.full((2, 6), np.nan),
    }
    return SetPrediction(**(values | changes))


# ---- accuracy --------------------------------------------------------------------------------


def test_accuracy_by_hand():
    out = set_metrics(tiny())
    assert out["energy_mae_mev_per_atom"] == pytest.approx((4 + 2) / 2)
    assert out["energy_rmse_mev_per_atom"] == pytest.approx(math.sqrt((16 + 4) / 2))
    assert out["force_mae_mev_per_ang"] == pytest.approx(1800 / 9)
    assert out["force_rmse_mev_per_ang"] == pytest.approx(1000 * math.sqrt((0.09 + 0.36 + 0.81) / 9))
    assert (out["n_structures"], out["n_atoms"]) == (2, 3)
    assert "stress_mae_gpa" not in out


def test_every_metric_knows_how_many_values_it_rests_on(make_prediction):
    p = make_prediction(6)
    p.energy_label[2:] = np.nan
    p.forces_label[p.structure > 3] = np.nan
    out = set_metrics(p)
    known = int((p.structure <= 3).sum())
    counts = {
        "energy_mae_mev_per_atom": 2,
        "coverage90_energy": 2,
        "force_mae_mev_per_ang": 3 * known,
        "zms": 3 * known,
        "stress_mae_gpa": 36,
        "spearman_atom": known,
        "spearman_structure": 4,
        "partial_spearman_structure": 4,
    }
    assert {key: basis(out, key) for key in counts} == counts
    assert basis({"n_atoms": 7}, "force_mae_mev_per_ang") is None, "files of earlier versions have no counts"


def test_stress_is_in_gpa_and_unpredicted_rows_do_not_count():
    label = np.full((2, 6), 0.0062415091)  # 1 GPa
    stress = np.zeros((2, 6))
    stress[1] = np.nan
    out = set_metrics(tiny(stress_label=label, stress=stress))
    assert out["stress_mae_gpa"] == pytest.approx(1.0, rel=1e-6)


def test_missing_labels_are_masked_not_counted():
    forces = np.array([[0.3, 0, 0], [np.nan] * 3, [np.nan] * 3])
    out = set_metrics(tiny(forces_label=forces, energy_label=[np.nan, -3.996]))
    assert out["force_mae_mev_per_ang"] == pytest.approx(100.0)
    assert out["energy_mae_mev_per_atom"] == pytest.approx(2.0)
    none = set_metrics(tiny(forces_label=np.full((3, 3), np.nan), energy_label=[np.nan, np.nan]))
    assert none == {"n_structures": 2, "n_atoms": 3}


def test_keys_by_kind_of_model(make_prediction):
    bayesian, plain = make_prediction(10), make_prediction(10, with_std=False)
    assert set(set_metrics(bayesian)) == ACCURACY | PROBABILISTIC | RANKINGS
    assert set(set_metrics(plain)) == ACCURACY
    assert set(set_metrics(plain, rmse_calibration(plain))) == ACCURACY | PROBABILISTIC
    json.dumps(set_metrics(bayesian), allow_nan=False)


# ---- scores ----------------------------------------------------------------------------------


@given(error=st.floats(-5, 5), std=st.floats(0.05, 5))
def test_crps_is_its_integral(error, std):
    lower, upper = min(error, 0) - 12 * std, max(error, 0) + 12 * std
    square = lambda x, step: (norm.cdf(x, scale=std) - step) ** 2
    expected = (
        quad(square, lower, error, (0,), epsabs=1e-10)[0] + quad(square, error, upper, (1,), epsabs=1e-10)[0]
    )
    assert gaussian_crps(error, std) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_crps_against_samples_and_units():
    rng = np.random.default_rng(0)
    x = 0.2 * rng.normal(size=200_000)
    expected = np.abs(x - 0.3).mean() - 0.5 * np.abs(x - rng.permutation(x)).mean()
    assert gaussian_crps(0.3, 0.2) == pytest.approx(expected, abs=2e-3)
    out = set_metrics(tiny(), Calibration.constant(forces=0.2, energy=0.003))
    errors = np.array([0.3, 0.6, 0.9, 0, 0, 0, 0, 0, 0])
    assert out["force_crps_mev_per_ang"] == pytest.approx(1e3 * gaussian_crps(errors, 0.2).mean())
    assert out["force_nll"] == pytest.approx(-norm.logpdf(errors, scale=0.2).mean())
    assert out["energy_crps_mev_per_atom"] == pytest.approx(
        1e3 * gaussian_crps(np.array([0.004, 0.002]), 0.003).mean()
    )


def test_coverage_by_hand():
    out = set_metrics(tiny(), Calibration.constant(forces=0.5, energy=0.0021))
    assert pytest.approx(1.645, abs=1e-3) == Z90
    assert out["coverage90"] == pytest.approx(8 / 9)  # 0.9 > 1.645 x 0.5
    assert out["coverage90_energy"] == pytest.approx(1 / 2)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0])
def test_scores_of_gaussian_errors(make_prediction, ratio):
    """Error bars ``ratio`` times the truth: closed forms of every score."""
    p = make_prediction(1500, scale=1 / ratio)
    out = set_metrics(p)
    s2 = np.mean(p.forces_std**2)
    rmse = np.sqrt(np.mean(p.forces_error**2))
    assert out["zms"] == pytest.approx(1 / ratio**2, rel=0.03)
    assert out["spread_skill"] == pytest.approx(math.sqrt(s2) / rmse)
    assert out["spread_skill"] == pytest.approx(ratio, rel=0.03)
    assert out["coverage90"] == pytest.approx(2 * norm.cdf(ratio * Z90) - 1, abs=0.01)
    assert out["ence"] == pytest.approx(abs(1 - 1 / ratio), abs=0.03)
    expected = quad(lambda p: abs(2 * norm.cdf(ratio * norm.ppf(0.5 + p / 2)) - 1 - p), 0, 1)[0]
    assert out["miscalibration_area"] == pytest.approx(expected, abs=0.01)


def test_calibration_turns_the_epistemic_std_into_the_total(make_prediction):
    p = make_prediction(10)
    calibration = Calibration(
        energy=PropertyCalibration(0.01, 3.0),
        forces=PropertyCalibration(0.03, 2.0),
        stress=PropertyCalibration(),
    )
    total = np.sqrt(0.03**2 + (2 * p.forces_std) ** 2)
    out = set_metrics(p, calibration)
    assert out["zms"] == pytest.approx(np.mean((p.forces_error / total) ** 2))
    energy = np.sqrt(0.01**2 + (3 * p.energy_std / p.n_atoms) ** 2)
    assert out["coverage90_energy"] == np.mean(np.abs(p.energy_error) <= Z90 * energy)
    # rank correlations are of the epistemic std and do not move
    assert out["spearman_atom"] == set_metrics(p)["spearman_atom"]


def test_no_spread_at_all_stays_finite():
    out = set_metrics(tiny(forces_std=np.zeros((3, 3)), energy_std=np.zeros(2)))
    assert all(v is None or math.isfinite(v) for v in out.values())
    assert out["coverage90"] == pytest.approx(6 / 9)


# ---- calibration curves ----------------------------------------------------------------------


@given(z=st.lists(st.floats(-4, 4), min_size=1, max_size=30))
def test_miscalibration_area_is_the_integral_of_the_curve(z):
    z = np.array(z)
    levels = (np.arange(200_000) + 0.5) / 200_000
    expected = np.abs(coverage_curve(z, np.ones_like(z), levels) - levels).mean()
    assert miscalibration_area(z, np.ones_like(z)) == pytest.approx(expected, abs=1e-5)


def test_miscalibration_area_ends():
    assert miscalibration_area(np.zeros(5), np.ones(5)) == pytest.approx(0.5)
    assert miscalibration_area(np.full(5, 1e9), np.ones(5)) == pytest.approx(0.5)


def test_coverage_curve_counts():
    z = norm.ppf(0.5 + np.array([0.1, 0.3, 0.5, 0.7]) / 2)
    np.testing.assert_allclose(coverage_curve(z, np.ones(4), [0.05, 0.2, 0.4, 0.99]), [0, 0.25, 0.5, 1])


def test_bins_hold_equal_counts_and_keep_ties_together():
    rng = np.random.default_rng(0)
    std = rng.uniform(1, 2, size=1000)
    rmv, rmse, count = binned_errors(std, std)
    assert count.tolist() == [100] * 10
    np.testing.assert_allclose(rmv, rmse)
    assert (np.diff(rmv) > 0).all()
    rmv, rmse, count = binned_errors(np.arange(100.0), np.full(100, 3.0))
    assert (rmv.tolist(), count.tolist()) == ([3.0], [100])
    assert rmse[0] == pytest.approx(np.sqrt(np.mean(np.arange(100.0) ** 2)))
    assert binned_errors(np.ones(25), std[:25])[2].size == 2
    assert binned_errors(np.zeros(0), np.zeros(0))[2].size == 0


def test_ence_by_hand():
    std = np.repeat([1.0, 2.0], 50)
    error = np.repeat([1.5, 1.0], 50)
    assert ence(error, std, n_bins=2) == pytest.approx((0.5 / 1 + 1.0 / 2) / 2)


# ---- rank correlations -----------------------------------------------------------------------


def test_spearman_is_scipys_and_knows_its_limits():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(size=30)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    b[4] = np.nan
    keep = np.arange(30) != 4
    assert spearman(a, b) == pytest.approx(spearmanr(a[keep], b[keep]).statistic)
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_partial_spearman_is_the_correlation_of_rank_residuals():
    rng = np.random.default_rng(1)
    given_ = rng.normal(size=200)
    a, b = given_ + rng.normal(size=200), given_**3 + rng.normal(size=200)
    ranks = [rankdata(v) for v in (a, b, given_)]
    design = np.stack([np.ones(200), ranks[2]], axis=1)
    rest = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2]]
    assert partial_spearman(a, b, given_) == pytest.approx(np.corrcoef(*rest)[0, 1], abs=1e-10)


def test_partial_spearman_removes_what_the_third_explains():
    rng = np.random.default_rng(2)
    cause = rng.normal(size=4000)
    a, b = cause + rng.normal(size=4000), cause + rng.normal(size=4000)
    assert spearman(a, b) > 0.4
    assert abs(partial_spearman(a, b, cause)) < 0.06
    assert partial_spearman(cause, b, np.exp(cause)) is None  # the same ranks: nothing is left
    assert partial_spearman(a[:3], b[:3], cause[:3]) is None


def test_rankings_by_their_definition(make_prediction):
    p = make_prediction(25)
    out = set_metrics(p)
    atom = np.linalg.norm(p.forces_error, axis=1)
    split = np.cumsum(p.n_atoms)[:-1]
    error = [x.mean() for x in np.split(atom, split)]
    spread = [x.mean() for x in np.split(p.forces_std_norm, split)]
    energy = p.energy / p.n_atoms
    assert out["spearman_atom"] == pytest.approx(spearmanr(p.forces_std_norm, atom).statistic)
    assert out["spearman_structure"] == pytest.approx(spearmanr(spread, error).statistic)
    assert out["spearman_structure_null_energy"] == pytest.approx(spearmanr(energy, error).statistic)
    assert out["spearman_atom_null_force"] == pytest.approx(
        spearmanr(np.linalg.norm(p.forces, axis=1), atom).statistic
    )
    assert out["partial_spearman_structure"] == pytest.approx(partial_spearman(spread, error, energy))


def test_rankings_of_the_out_of_distribution_score(make_prediction):
    p = make_prediction(25)
    assert not [k for k in set_metrics(p) if "ood" in k]
    atom = np.linalg.norm(p.forces_error, axis=1)
    p.ood_score = np.exp(np.random.default_rng(3).normal(size=atom.size)) + 5 * atom
    out = set_metrics(p)
    split = np.cumsum(p.n_atoms)[:-1]
    error = [x.mean() for x in np.split(atom, split)]
    largest = [x.max() for x in np.split(p.ood_score, split)]
    assert out["spearman_atom_ood"] == pytest.approx(spearmanr(p.ood_score, atom).statistic)
    assert out["spearman_structure_ood"] == pytest.approx(spearmanr(largest, error).statistic)
    energy = p.energy / p.n_atoms
    assert out["partial_spearman_structure_ood"] == pytest.approx(partial_spearman(largest, error, energy))
    assert out["ood_score_median"] == pytest.approx(np.median(p.ood_score))
    # an unknown element is the farthest of all; a median that is infinite is no number
    worst = int(np.argmax(p.ood_score))
    p.ood_score[worst] = np.inf
    assert set_metrics(p)["spearman_atom_ood"] == pytest.approx(out["spearman_atom_ood"])
    p.ood_score[:] = np.inf
    out = set_metrics(p)
    assert out["ood_score_median"] is None
    assert out["spearman_atom_ood"] is None


def test_reference_is_reached_by_honest_error_bars(make_prediction):
    p = make_prediction(600)
    out = set_metrics(p)
    assert out["spearman_atom"] == pytest.approx(out["spearman_atom_reference"], abs=0.03)
    assert out["spearman_structure"] == pytest.approx(out["spearman_structure_reference"], abs=0.06)
    assert 0.2 < out["spearman_atom_reference"] < 0.8
    assert set_metrics(p, seed=0) == set_metrics(p, seed=0)
    assert (
        set_metrics(p, seed=0)["spearman_atom_reference"] != set_metrics(p, seed=1)["spearman_atom_reference"]
    )


def test_rankings_ignore_atoms_and_frames_without_labels(make_prediction):
    p = make_prediction(8)
    p.forces_label[p.structure >= 6] = np.nan
    kept = set_metrics(p.select(range(6)))
    masked = set_metrics(p)
    for key in ("spearman_atom", "spearman_structure", "partial_spearman_structure"):
        assert masked[key] == pytest.approx(kept[key])


def test_fewer_than_three_frames_have_no_structure_ranking(make_prediction):
    out = set_metrics(make_prediction(2))
    assert out["spearman_structure"] is None
    assert out["spearman_structure_null_energy"] is None
    assert out["partial_spearman_structure"] is None
    assert out["spearman_structure_reference"] is None
    assert out["spearman_atom"] is not None


# ---- tables ----------------------------------------------------------------------------------


def test_table_pools_unseen_and_all(make_prediction):
    sets = {n: make_prediction(5 + i, seed=i, name=n) for i, n in enumerate(("seen", "hot", "dense"))}
    table = metrics_table(sets)
    assert list(table) == ["seen", "hot", "dense", "unseen", "all"]
    assert table["unseen"]["n_structures"] == 6 + 7
    assert table["all"]["n_structures"] == 5 + 6 + 7
    pooled = np.concatenate([np.abs(sets[n].forces_error) for n in ("hot", "dense")])
    assert table["unseen"]["force_mae_mev_per_ang"] == pytest.approx(1e3 * pooled.mean())
    assert table["hot"] == set_metrics(sets["hot"])
    assert "unseen" not in metrics_table({"seen": sets["seen"]})
    assert metrics_table({}) == {}


def test_table_refuses_names_that_stand_for_pools(make_prediction):
    p = make_prediction(3)
    assert set(metrics_table({"seen": p, "unseen": p})) == {"seen", "unseen", "all"}
    for names in (["all"], ["unseen", "hot"]):
        with pytest.raises(DataError, match=names[0]):
            metrics_table(dict.fromkeys(names, p))


def test_single_sets_leave_out_pools_only():
    assert single_sets(["hot", "seen", "dense", "unseen", "all"]) == ["seen", "hot", "dense"]
    assert single_sets(["seen", "unseen", "all"]) == ["seen", "unseen"]
    assert single_sets(["unseen", "all"]) == ["unseen"]
    assert single_sets(["seen", "all"]) == ["seen"]


def test_per_frame_values_average_to_the_metrics(make_prediction):
    p = make_prediction(12)
    values, out = per_frame(p, Calibration.identity()), set_metrics(p)
    for key in ("energy_mae_mev_per_atom", "energy_crps_mev_per_atom"):
        assert values[key].mean() == pytest.approx(out[key])
    for key in ("force_mae_mev_per_ang", "force_crps_mev_per_ang"):
        assert np.average(values[key], weights=p.n_atoms) == pytest.approx(out[key])
    rho = spearmanr(values["force_uncertainty"], values["force_error"]).statistic
    assert rho == pytest.approx(out["spearman_structure"])
    assert "force_uncertainty" not in per_frame(make_prediction(3, with_std=False))


def test_bootstrap_is_seeded_and_has_the_right_width():
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 2.0, size=400)
    low, high = bootstrap_ci(values)
    assert (low, high) == bootstrap_ci(values, seed=0) != bootstrap_ci(values, seed=1)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.15)
    weights = rng.integers(1, 9, size=400)
    low, high = bootstrap_ci(values, weights)
    assert low < np.average(values, weights=weights) < high
    values[7] = np.nan
    assert all(map(math.isfinite, bootstrap_ci(values)))
    assert bootstrap_ci([1.0]) is None


def test_bootstrap_of_a_difference_is_paired():
    """The same frames are hard for both models: only the paired interval sees the gain."""
    rng = np.random.default_rng(1)
    hard = 10 * rng.exponential(size=60)
    a, b = hard + rng.normal(size=60), hard + 1 + rng.normal(size=60)
    low, high = bootstrap_ci(b - a)
    assert 0 < low < high < 2
    assert bootstrap_ci(a)[1] > bootstrap_ci(b)[0]
