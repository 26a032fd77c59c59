from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from blip_ft.data.read.schema import (
    FEATURES,
    GROUPS,
    LABELS,
    Mapper,
    RawFrame,
    canonical_split,
    to_numbers,
    voigt,
)
from blip_ft.data.read.units import factors
from blip_ft.errors import DataError

FORCES = np.arange(6.0).reshape(2, 3)
STRESS = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])
VOIGT = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def raw(frame: int = 3, **values: Any) -> RawFrame:
    return RawFrame(
        numbers=np.array([14, 8]),
        positions=np.array([[0.0, 0.0, 0.0], [1.6, 0.0, 0.0]]),
        cell=5.0 * np.eye(3),
        pbc=np.array([True, True, True]),
        values=values,
        source="set.xyz",
        frame=frame,
    )


def mapper(
    fields: dict[str, str] | None = None, units: dict[str, str] | None = None, **options: Any
) -> Mapper:
    return Mapper(fields or {}, factors(units), **options)


# ---- finding labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LABELS["energy"])
def test_every_known_name_of_energy(name: str) -> None:
    assert mapper().row(raw(**{name: -1.5}))["energy"] == -1.5


@pytest.mark.parametrize("name", LABELS["forces"])
def test_every_known_name_of_forces(name: str) -> None:
    np.testing.assert_array_equal(mapper().row(raw(**{name: FORCES.tolist()}))["forces"], FORCES)


@pytest.mark.parametrize("name", LABELS["stress"])
@pytest.mark.parametrize("value", [STRESS, STRESS.ravel(), STRESS.reshape(1, 9), np.array(VOIGT), [VOIGT]])
def test_stress_in_every_shape_becomes_voigt(name: str, value: Any) -> None:
    row = mapper().row(raw(energy=0.0, **{name: value}))
    np.testing.assert_array_equal(row["stress"], VOIGT)


def test_row_has_the_columns_of_the_schema() -> None:
    row = mapper().row(raw(energy=1.0, forces=FORCES, stress=VOIGT, trajectory="run-1", split="train"))
    assert list(row) == list(FEATURES)
    assert (row["group"], row["split"], row["source"], row["frame"]) == ("run-1", "train", "set.xyz", 3)


@pytest.mark.parametrize("label", ["energy", "forces"])
def test_one_of_energy_and_forces_is_enough(label: str) -> None:
    row = mapper().row(raw(**{label: {"energy": 2.0, "forces": FORCES}[label]}))
    other = {"energy": "forces", "forces": "energy"}[label]
    assert row[label] is not None
    assert row[other] is None
    assert row["stress"] is None


def test_units_apply_to_labels_and_lengths() -> None:
    units = {"energy": "Hartree", "length": "Bohr", "forces": "Hartree/Bohr", "stress": "-GPa"}
    row = mapper(units=units).row(raw(energy=1.0, forces=FORCES, stress=VOIGT))
    assert row["energy"] == pytest.approx(27.2114, rel=1e-5)
    np.testing.assert_allclose(row["forces"], 51.4221 * FORCES, rtol=1e-5)
    np.testing.assert_allclose(row["stress"], -np.array(VOIGT) / 160.21766, rtol=1e-6)
    np.testing.assert_allclose(row["cell"], 5 * 0.529177 * np.eye(3), rtol=1e-5)
    np.testing.assert_allclose(row["positions"][1], [1.6 * 0.529177, 0, 0], rtol=1e-5)


# ---- two candidates ----------------------------------------------------------------------------


def test_two_equal_candidates_are_taken() -> None:
    row = mapper().row(raw(energy=-1.0, REF_energy=-1.0, forces=FORCES, REF_forces=FORCES))
    assert row["energy"] == -1.0


def test_stress_candidates_are_compared_in_one_shape() -> None:
    row = mapper().row(raw(energy=0.0, stress=VOIGT, REF_stress=STRESS))
    np.testing.assert_array_equal(row["stress"], VOIGT)


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("energy", {"energy": -1.0, "REF_energy": -1.1}),
        ("forces", {"forces": FORCES, "dft_forces": FORCES + 0.1}),
        ("stress", {"energy": 0.0, "stress": VOIGT, "REF_stress": -STRESS}),
    ],
)
def test_two_different_candidates_are_refused(label: str, values: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"set\.xyz, frame 3, field '{label}'.*could both be the {label}"):
        mapper().row(raw(**values))


def test_explicit_field_settles_it() -> None:
    row = mapper({"energy": "REF_energy"}).row(raw(energy=-1.0, REF_energy=-1.1))
    assert row["energy"] == -1.1


def test_a_name_that_changes_between_frames_is_refused() -> None:
    m = mapper()
    m.row(raw(0, energy=-1.0))
    with pytest.raises(DataError, match=r"frame 1.*'REF_energy' here and 'energy' in earlier frames"):
        m.row(raw(1, REF_energy=-1.0))


def test_a_name_may_be_missing_where_another_agrees_throughout() -> None:
    m = mapper()
    m.row(raw(0, energy=-1.0, REF_energy=-1.0))
    m.row(raw(1, REF_energy=-2.0))
    with pytest.raises(DataError, match="earlier frames"):
        m.row(raw(2, energy=-1.0))


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({}, "energy, forces", "neither energy nor forces"),
        ({"stress": VOIGT}, "energy, forces", "neither energy nor forces"),
        ({"energy": float("nan")}, "energy", "NaN or infinite"),
        ({"energy": float("inf")}, "energy", "NaN or infinite"),
        ({"REF_forces": np.full((2, 3), np.nan)}, "REF_forces", "NaN or infinite"),
        ({"energy": 1.0, "stress": [1, 2, 3, 4, 5, np.inf]}, "stress", "NaN or infinite"),
        ({"energy": [1.0, 2.0]}, "energy", r"shape \(2,\), expected one number"),
        ({"forces": np.zeros((3, 3))}, "forces", r"shape \(3, 3\), expected \(2, 3\)"),
        ({"forces": np.zeros((3, 2))}, "forces", r"shape \(3, 2\), expected \(2, 3\)"),
        ({"forces": np.zeros(6)}, "forces", r"shape \(6,\)"),
        ({"forces": [[1.0, 2.0], [3.0]]}, "forces", "even table"),
        ({"energy": "minus one"}, "energy", "not a number"),
        ({"energy": 1.0, "stress": np.zeros(5)}, "stress", r"expected \(6,\) or \(3, 3\)"),
        ({"energy": 1.0, "stress": np.arange(9.0)}, "stress", "not symmetric"),
    ],
)
def test_bad_labels(values: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        mapper().row(raw(**values))
    error = caught.value
    assert (error.file, error.frame, error.field) == ("set.xyz", 3, field)
    assert error.remedy


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"numbers": np.array([], dtype=int), "positions": np.zeros((0, 3))}, None, "no atoms"),
        ({"numbers": np.array([0, 8])}, "numbers", "0 is not an atomic number"),
        ({"numbers": np.array([8, 500])}, "numbers", "500 is not an atomic number"),
        ({"positions": np.zeros((3, 3))}, "positions", r"shape \(3, 3\), expected \(2, 3\)"),
        ({"positions": np.array([[0, 0, np.nan], [0, 0, 1]])}, "positions", "NaN"),
        ({"cell": np.zeros((3, 3))}, "cell", "do not span"),
        ({"cell": np.ones((3, 3))}, "cell", "do not span"),
        ({"cell": np.full((3, 3), np.inf)}, "cell", "NaN or infinite"),
        ({"cell": np.eye(2)}, "cell", r"shape \(2, 2\)"),
    ],
)
def test_bad_geometry(change: dict[str, Any], field: str | None, words: str) -> None:
    frame = raw(energy=1.0)
    for name, value in change.items():
        setattr(frame, name, value)
    with pytest.raises(DataError, match=words) as caught:
        mapper().row(frame)
    assert (caught.value.file, caught.value.frame, caught.value.field) == ("set.xyz", 3, field)


def test_a_slab_needs_only_its_periodic_vectors() -> None:
    frame = raw(energy=1.0)
    frame.pbc, frame.cell = np.array([True, True, False]), np.diag([4.0, 4.0, 0.0])
    assert mapper().row(frame)["energy"] == 1.0


def test_labels_are_optional_where_only_structures_are_wanted() -> None:
    row = mapper(require_labels=False).row(raw())
    assert row["energy"] is None
    assert row["forces"] is None


def test_unknown_field_key_gets_a_suggestion() -> None:
    with pytest.raises(DataError, match="did you mean 'energy'"):
        mapper({"enrgy": "E"})


def test_a_field_that_occurs_nowhere_is_refused_at_the_end() -> None:
    m = mapper({"forces": "my_force"})
    m.row(raw(energy=1.0, my_forces=FORCES))
    with pytest.raises(DataError, match=r"no frame has 'my_force'.*\n.*did you mean 'my_forces'"):
        m.finish("set.xyz", {"energy", "my_forces"})


def test_a_field_that_some_frames_lack_is_a_missing_label() -> None:
    m = mapper({"forces": "f"})
    assert m.row(raw(energy=1.0))["forces"] is None
    assert m.row(raw(energy=1.0, f=FORCES))["forces"] is not None
    m.finish("set.xyz", {"energy", "f"})


# ---- groups, splits, shapes --------------------------------------------------------------------


def test_first_known_key_names_the_group() -> None:
    everything = {name: f"<{name}>" for name in GROUPS}
    for i, name in enumerate(GROUPS):
        values = {k: everything[k] for k in GROUPS[i:]}
        assert mapper().row(raw(energy=0.0, **values))["group"] == f"<{name}>"


def test_numbers_name_groups_too_and_arrays_do_not() -> None:
    assert mapper().row(raw(energy=0.0, run=7))["group"] == "7"
    assert mapper().row(raw(energy=0.0, run=np.array([1, 2]), phase="quartz"))["group"] == "quartz"


def test_explicit_group_and_split() -> None:
    m = mapper({"group": "my_key", "split": "fold"})
    row = m.row(raw(energy=0.0, trajectory="no", split="test", my_key="yes", fold="val"))
    assert (row["group"], row["split"]) == ("yes", "validation")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("valid", "validation"),
        ("Val", "validation"),
        ("TRAIN", "train"),
        ("calib", "calibration"),
        ("Test", "test"),
        ("hot_Quartz", "hot_Quartz"),
        ("", ""),
    ],
)
def test_split_names(name: str, expected: str) -> None:
    assert canonical_split(name) == expected


@given(arrays(np.float64, (3, 3), elements=st.floats(-10, 10)))
def test_voigt_order(matrix: np.ndarray) -> None:
    symmetric = matrix + matrix.T
    v = voigt(symmetric)
    for k, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        assert v[k] == symmetric[i, j]


def test_numbers_from_symbols_and_numbers() -> None:
    np.testing.assert_array_equal(to_numbers(["Si", "O", "O"]), [14, 8, 8])
    np.testing.assert_array_equal(to_numbers([14, 8]), [14, 8])
    for bad in (["Si", "Xx"], [1.5, 2.0], [[None]]):
        with pytest.raises(ValueError, match=r"chemical|atomic"):
            to_numbers(bad)
