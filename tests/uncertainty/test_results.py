from dataclasses import fields, replace

import numpy as np
import pytest

from blip_ft.errors import CheckpointError
from blip_ft.uncertainty.results import SetPrediction


def same(a: SetPrediction, b: SetPrediction) -> bool:
    return all(
        (getattr(a, f.name) is None and getattr(b, f.name) is None)
        or np.array_equal(getattr(a, f.name), getattr(b, f.name), equal_nan=f.name not in ("name", "frames"))
        for f in fields(SetPrediction)
    )


@pytest.mark.parametrize("with_std", [True, False])
def test_file_returns_what_was_saved(tmp_path, make_prediction, with_std):
    p = make_prediction(5, with_std=with_std)
    p.forces_label[3] = np.nan
    p.save(tmp_path / "p.npz")
    assert same(SetPrediction.load(tmp_path / "p.npz"), p)
    assert [f.name for f in tmp_path.iterdir()] == ["p.npz"]


def test_damaged_missing_and_foreign_files_are_errors_that_name_the_file(tmp_path, make_prediction):
    path = tmp_path / "p.npz"
    make_prediction(5).save(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"p\.npz"):
            SetPrediction.load(path)
    np.savez(path, energy=np.zeros(3))
    with pytest.raises(CheckpointError, match="damaged"):
        SetPrediction.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        SetPrediction.load(tmp_path / "absent.npz")


def test_failed_write_leaves_nothing(tmp_path, make_prediction):
    (tmp_path / "p.npz").mkdir()  # the final rename cannot replace a folder
    with pytest.raises(OSError, match=r"p\.npz"):
        make_prediction(3).save(tmp_path / "p.npz")
    assert [f.name for f in tmp_path.iterdir()] == ["p.npz"]


def test_select_and_concatenate_are_inverse(make_prediction):
    p = make_prediction(6)
    again = SetPrediction.concatenate([p.select([0, 1]), p.select([2]), p.select([3, 4, 5])], p.name)
    assert same(again, p)
    twice = p.select([4, 4])
    assert twice.n_structures == 2
    assert np.array_equal(twice.forces, np.concatenate([p.forces[p.structure == 4]] * 2))
    assert p.select([]).n_structures == 0


def test_mixed_stds_and_wrong_shapes_are_refused(make_prediction):
    with pytest.raises(ValueError, match="energy_std is missing in some parts"):
        SetPrediction.concatenate([make_prediction(2), make_prediction(2, with_std=False)], "both")
    p = make_prediction(2)
    with pytest.raises(ValueError, match=r"stress has shape \(2, 3, 3\)"):
        replace(p, stress=np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="1 frame names for 2 frames"):
        replace(p, frames=["x#0"])


def test_errors_are_label_minus_prediction_and_energies_per_atom(make_prediction):
    p = make_prediction(4)
    p.energy_label = p.energy + 0.5 * p.n_atoms
    np.testing.assert_allclose(p.energy_error, 0.5, rtol=1e-12)
    p.forces_label = p.forces - 2.0
    np.testing.assert_allclose(p.forces_error, -2.0, rtol=1e-12)
    p.stress_label = p.stress + 1.0
    np.testing.assert_allclose(p.stress_error, 1.0, rtol=1e-12)


def test_norm_std_is_the_root_of_the_trace(make_prediction):
    p = make_prediction(4)
    np.testing.assert_allclose(p.forces_std_norm**2, (p.forces_std**2).sum(axis=1))
    assert make_prediction(4, with_std=False).forces_std_norm is None


def test_mean_over_atoms_skips_missing_ones(make_prediction):
    p = make_prediction(3)
    values = np.arange(p.numbers.size, dtype=float)
    expected = [values[p.structure == i].mean() for i in range(3)]
    np.testing.assert_allclose(p.mean_over_atoms(values), expected)
    values[p.structure == 1] = np.nan
    first = np.flatnonzero(p.structure == 0)[0]
    values[first] = np.nan
    got = p.mean_over_atoms(values)
    assert np.isnan(got[1])
    assert got[0] == pytest.approx(np.nanmean(values[p.structure == 0]))


def test_scores_go_with_their_atoms(make_prediction, tmp_path):
    p = make_prediction(5)
    p.ood_score = np.arange(float(p.numbers.size))
    p.ood_score[-1] = np.inf
    part = p.select([3, 1])
    expected = [p.ood_score[p.structure == i] for i in (3, 1)]
    np.testing.assert_array_equal(part.ood_score, np.concatenate(expected))
    np.testing.assert_array_equal(part.max_over_atoms(part.ood_score), [x.max() for x in expected])
    p.save(tmp_path / "p.npz")
    np.testing.assert_array_equal(SetPrediction.load(tmp_path / "p.npz").ood_score, p.ood_score)
    with pytest.raises(ValueError, match="ood_score"):
        SetPrediction.concatenate([p, make_prediction(2)], "both")
