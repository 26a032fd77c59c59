from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.references import fit_references, given_references, refit_references
from blip_ft.errors import DataError

SIO2 = [14, 8, 8]
WATER = [8, 1, 1]


def test_one_composition_has_rank_one_and_the_shift_of_least_norm() -> None:
    frames = [SIO2 * 3, SIO2 * 4, SIO2 * 2]
    residual = [-337.0 * len(z) for z in frames]
    references = fit_references(frames, residual)
    assert references.rank == 1
    assert references.elements == (8, 14)
    # c minimises |c| under (c_Si + 2 c_O)/3 = -337: c is parallel to (1, 2)
    assert references.shift == pytest.approx({8: 2 * -337 * 3 / 5, 14: -337 * 3 / 5})
    assert references.rms_before == pytest.approx(337)
    assert references.rms_after == pytest.approx(0, abs=1e-9)
    (null,) = references.null_space
    assert 2 * null[8] + null[14] == pytest.approx(0)
    assert null[8] ** 2 + null[14] ** 2 == pytest.approx(1)
    assert references.energy(SIO2 * 7) == pytest.approx(-337 * 21)
    assert references.energy(np.array([14])) == pytest.approx(references.shift[14])


def test_full_rank_recovers_the_energies_of_the_elements() -> None:
    truth = {1: -13.6, 8: -432.1, 14: -105.9}
    frames = [SIO2, WATER, [8, 8], [1, 1], SIO2 + WATER]
    references = fit_references(frames, [sum(truth[z] for z in zs) for zs in frames])
    assert references.shift == pytest.approx(truth)
    assert references.rank == 3
    assert references.null_space == []
    assert references.warn_outside_span([14, 14, 1]) is None


counts = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=8)


@given(counts=counts, seed=st.integers(0, 100))
def test_against_the_pseudoinverse(counts: list[tuple[int, int, int]], seed: int) -> None:
    elements = (1, 8, 14)
    frames = [[z for z, n in zip(elements, row, strict=True) for _ in range(n)] for row in counts]
    residual = np.random.default_rng(seed).normal(-5, 2, len(frames))
    references = fit_references(frames, residual)
    seen = [z for z in elements if any(z in f for f in frames)]
    n = np.array([[f.count(z) for z in seen] for f in frames], dtype=float)
    atoms = n.sum(axis=1, keepdims=True)
    expected = np.linalg.pinv(n / atoms, rcond=1e-12) @ (residual / atoms[:, 0])
    np.testing.assert_allclose([references.shift[z] for z in seen], expected, atol=1e-8)
    assert references.rank == np.linalg.matrix_rank(n)
    assert len(references.null_space) == len(seen) - references.rank
    for null in references.null_space:
        v = np.array([null[z] for z in seen])
        np.testing.assert_allclose(n @ v, 0, atol=1e-9)
        assert v @ expected == pytest.approx(0, abs=1e-8), "least norm: nothing along the null space"
    assert references.rms_after <= references.rms_before + 1e-12
    for f in frames:
        assert references.warn_outside_span(f) is None


@given(noise=st.floats(0.1, 1.0), seed=st.integers(0, 50))
def test_residual_per_atom_is_what_is_minimised(noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = [SIO2 * int(k) for k in rng.integers(1, 30, 12)]
    n = np.array([len(f) for f in frames])
    residual = -3.0 * n + noise * n * rng.normal(size=12)
    references = fit_references(frames, residual)
    per_atom = np.array([references.energy(f) for f in frames]) / n
    np.testing.assert_allclose(per_atom, np.mean(residual / n), rtol=1e-9)
    assert references.rms_after == pytest.approx(np.std(residual / n))


def test_frames_without_energy_are_left_out() -> None:
    full = fit_references([SIO2, SIO2 * 2], [-9.0, -18.0])
    partial = fit_references([SIO2, WATER, SIO2 * 2], [-9.0, np.nan, -18.0])
    assert partial == full
    assert partial.n_frames == 2
    assert 1 not in partial.shift


def test_compositions_outside_the_span_are_named() -> None:
    references = fit_references([SIO2, SIO2 * 2], [-9.0, -18.0])
    assert references.warn_outside_span(SIO2 * 5) is None
    assert "Si1O1" in (references.warn_outside_span([14, 8]) or "").replace("O1Si1", "Si1O1")
    assert "have no H" in (references.warn_outside_span(WATER) or "")
    assert references.energy(WATER) == pytest.approx(references.shift[8])


def test_description_names_rank_shift_and_null_space() -> None:
    text = fit_references([SIO2, SIO2 * 2], [-9.0, -18.0]).describe()
    assert "2 frames, rank 1 of 2: O -3.6000 eV, Si -1.8000 eV" in text
    assert "3000.0 -> 0.0 meV/atom" in text
    assert "not determined by the training compositions" in text


def test_no_energies_at_all() -> None:
    with pytest.raises(DataError, match=r"no training frame has an energy.*\n.*data\.references to keep"):
        fit_references([SIO2], [np.nan])
    with pytest.raises(DataError, match="no training frame has an energy"):
        fit_references([], [])


def test_infinite_residual() -> None:
    with pytest.raises(DataError, match="frame 1, field 'energy'"):
        fit_references([SIO2, SIO2], [0.0, np.inf])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 structures but 1"):
        fit_references([SIO2, SIO2], [0.0])


def test_many_frames_need_little_memory() -> None:
    references = fit_references([SIO2] * 20000, np.full(20000, -9.0))  # U alone would be 3.2 GB
    assert references.rank == 1


# ---- other choices -----------------------------------------------------------------------------

ALONE = {8: -1.9, 14: -0.8}


def test_refitted_energies_keep_nothing_of_the_pretrained_ones_in_the_null_space() -> None:
    frames = [SIO2 * 3, SIO2 * 4]
    residual = np.array([-337.0 * len(z) for z in frames])
    shift, refit = fit_references(frames, residual), refit_references(frames, residual, ALONE)
    assert refit.mode == "refit"
    assert refit.rms_after == pytest.approx(0, abs=1e-9)
    for frame in (SIO2, SIO2 * 5):
        assert refit.energy(frame) == pytest.approx(shift.energy(frame))  # the same inside the span
    atomic = np.array([refit.shift[z] + ALONE[z] for z in (8, 14)])
    assert atomic @ [1, -2] == pytest.approx(0)  # no component where the compositions are silent
    assert np.array([shift.shift[z] for z in (8, 14)]) @ [1, -2] == pytest.approx(0)
    assert refit.null_space[0] == pytest.approx(shift.null_space[0])


def test_full_rank_leaves_no_choice() -> None:
    frames = [SIO2, WATER, [8, 8], [1, 1]]
    residual = np.random.default_rng(0).normal(size=4)
    shift = fit_references(frames, residual)
    refit = refit_references(frames, residual, {1: -3.0, **ALONE})
    assert refit.shift == pytest.approx(shift.shift)


def test_given_energies_are_those_of_lone_atoms_afterwards() -> None:
    truth = {8: -432.1, 14: -105.9}
    frames = [SIO2, SIO2 * 2]
    binding = -20.0
    labels = np.array([(sum(truth[z] for z in f) + binding * len(f) / 3) for f in frames])
    model = np.array([(sum(ALONE[z] for z in f) + binding * len(f) / 3) for f in frames])
    found = given_references(frames, labels - model, ALONE, truth)
    assert found.shift == pytest.approx({z: truth[z] - ALONE[z] for z in truth})
    assert found.rms_after == pytest.approx(0, abs=1e-9)
    assert found.null_space == []
    assert found.warn_outside_span([14]) is None
    assert "given energies of isolated atoms" in found.describe()
    with pytest.raises(DataError, match="isolated atom of Si"):
        given_references(frames, labels - model, ALONE, {8: -432.1})


def mixed(n: int = 20, seed: int = 0) -> tuple[list[list[int]], np.ndarray]:
    """Two compositions, residuals of -110 and -70 eV per Si and O with noise of 20 meV/atom."""
    rng = np.random.default_rng(seed)
    numbers = [[14, 8, 8] * (1 + i % 3) if i % 2 else [14, 8] for i in range(n)]
    exact = [sum(-110.0 if z == 14 else -70.0 for z in zs) for zs in numbers]
    return numbers, np.array(exact) + 0.02 * np.array([len(z) for z in numbers]) * rng.normal(size=n)


@pytest.mark.parametrize("error", [40.0, -500.0, 1e6])
def test_one_energy_does_not_move_the_references(error: float) -> None:
    numbers, residual = mixed()
    clean = fit_references(numbers, residual)
    assert clean.left_out == ()
    residual[7] += error
    found = fit_references(numbers, residual)
    assert found.left_out == (7,)
    assert found.n_frames == 19
    rest = [i for i in range(20) if i != 7]
    expected = fit_references([numbers[i] for i in rest], residual[rest])
    assert found.shift == expected.shift, "exactly what the other frames give"
    assert "1 energies that are wrong beyond doubt" in found.describe()
    missing = np.insert(residual, 0, np.nan)
    assert fit_references([[14], *numbers], missing).left_out == (8,), "numbered as they were given"


def test_the_only_frame_of_an_element_is_not_far() -> None:
    """Its energy alone determines that element, however large: all-electron totals, say."""
    numbers, residual = mixed()
    found = fit_references([*numbers, [14, 8, 26]], [*residual, -34_000.0])
    assert found.left_out == ()
    assert found.rank == 3
    numbers, residual = mixed()
    pure = fit_references([*numbers, [8, 8]], [*residual, -140.0])
    assert pure.left_out == ()


def test_two_levels_of_theory_are_no_exception() -> None:
    numbers, residual = mixed()
    residual[:5] += 30.0
    assert fit_references(numbers, residual).left_out == ()
