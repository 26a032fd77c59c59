from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.check.likely_units import CANDIDATES, Comparison, cosine, likely_unit, slope
from blip_ft.data.read.units import conversion

ALL = [(quantity, unit) for quantity, units in CANDIDATES.items() for unit in units]


def predictions(seed: int = 0, n: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def compared(factor: float, *, softness: float = 1.0, noise: float = 0.1) -> Comparison:
    """Labels that are ``factor`` times what they should be, against a model that is not perfect."""
    model = predictions()
    truth = softness * model + noise * predictions(1)
    return Comparison(factor * truth, model)


def test_slope_and_correlation_of_known_vectors() -> None:
    model, label = np.array([1.0, 2.0]), np.array([2.0, 1.0])
    assert slope(label, model) == pytest.approx(4 / 5)
    assert cosine(label, model) == pytest.approx(4 / 5)
    assert cosine(3 * model, model) == pytest.approx(1)
    assert slope(-2 * model, model) == pytest.approx(-2)
    assert np.isnan(slope(label, 0 * model))
    assert cosine(label, 0 * model) == 0


@pytest.mark.parametrize(("quantity", "unit"), ALL)
@pytest.mark.parametrize("softness", [0.9, 1.0, 1.1])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_unit_is_named_with_what_to_write(quantity: str, unit: str, softness: float, sign: int) -> None:
    found = likely_unit(quantity, compared(sign / conversion(unit, quantity), softness=softness))
    assert found is not None
    assert unit in found.text
    assert ("wrong sign" in found.text) == (sign < 0)
    assert "wrong way" not in found.text.split(";")[0]
    if softness == 1.0:
        assert found.text.startswith(unit)
        # The remedy undoes it: what it tells to write turns these labels into eV and Å.
        written = found.remedy.partition(f"{quantity}: ")[2].rstrip("}")
        assert conversion(written, quantity) == pytest.approx(sign * conversion(unit, quantity))


@pytest.mark.parametrize(("quantity", "unit"), ALL)
def test_conversion_the_wrong_way_is_named(quantity: str, unit: str) -> None:
    found = likely_unit(quantity, compared(conversion(unit, quantity)))
    assert found is not None
    assert f"{unit} converted the wrong way" in found.text


def test_kcal_per_mol_comes_before_what_nobody_does() -> None:
    found = likely_unit("forces", compared(23.06, softness=1.12))  # nearer to Ry/Bohr turned round
    assert found is not None
    assert found.text.startswith("kcal/mol/Ang, not eV/Å")


@pytest.mark.parametrize("quantity", sorted(CANDIDATES))
def test_gradients(quantity: str) -> None:
    found = likely_unit(quantity, compared(-1.0))
    assert found is not None
    assert found.sign_only
    assert "wrong sign" in found.text
    assert "-1 * eV" in found.remedy
    assert found.correlation < -0.9


@given(quantity=st.sampled_from(sorted(CANDIDATES)), factor=st.floats(0.4, 2.5))
def test_no_unit_explains_a_slope_near_one(quantity: str, factor: float) -> None:
    assert likely_unit(quantity, compared(factor)) is None


@given(
    quantity=st.sampled_from(sorted(CANDIDATES)),
    exponent=st.one_of(st.floats(-4, -0.5), st.floats(0.5, 4)),
    sign=st.sampled_from([1, -1]),
)
def test_a_unit_is_named_if_and_only_if_one_is_within_a_fifth(
    quantity: str, exponent: float, sign: int
) -> None:
    value = 10**exponent
    factors = [conversion(unit, quantity) for unit in CANDIDATES[quantity]]
    expected = [f for factor in factors for f in (factor, 1 / factor)]
    nearest = min(max(value / f, f / value) for f in expected)
    found = likely_unit(quantity, compared(sign * value, noise=0.0))
    assert (found is not None) == (nearest <= 1.2)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_no_slope_no_unit(value: float) -> None:
    model = predictions()
    labels = np.zeros_like(model) if value == 0.0 else model
    assert likely_unit("forces", Comparison(labels, model * (0.0 if np.isnan(value) else 1.0))) is None


def stresses(convert: object) -> Comparison:
    """Cells of several volumes; ``convert(stress, volume)`` gives the labels."""
    volumes = np.repeat([113.0, 170.0, 240.0], 100)
    model = 0.01 * predictions()
    labels = convert(model + 5e-4 * predictions(1), volumes)  # type: ignore[operator]
    return Comparison(labels, model, model * volumes)


@pytest.mark.parametrize("sign", [1, -1])
def test_virials_are_told_from_stresses_in_gpa_by_the_volumes(sign: int) -> None:
    found = likely_unit("stress", stresses(lambda s, v: sign * s * v))
    assert found is not None
    assert f"virials in eV ({'-' if sign < 0 else ''}stress times volume)" in found.text
    found = likely_unit("stress", stresses(lambda s, v: sign * s * 160.2177))
    assert found is not None
    assert found.text.startswith("GPa")
    assert likely_unit("stress", stresses(lambda s, v: s)) is None


def hydrostatic(n: int = 16, seed: int = 0) -> np.ndarray:
    """Mostly hydrostatic, as real ones are: the shear hardly shows in one slope over all components."""
    rng = np.random.default_rng(seed)
    return np.hstack([rng.normal(0, 0.05, (n, 1)) + rng.normal(0, 0.01, (n, 3)), rng.normal(0, 0.01, (n, 3))])


def test_order_of_vasp_is_named() -> None:
    model = hydrostatic()
    label = model[:, [0, 1, 2, 5, 3, 4]] * 1.05
    assert cosine(label.ravel(), model.ravel()) > 0.8, "one slope over all six does not show it"
    found = likely_unit("stress", Comparison(label.ravel(), model.ravel()))
    assert found is not None
    assert found.remedy == "set data.stress_order: vasp"
    assert found.correlation > 0.99


@pytest.mark.parametrize(
    "label", [hydrostatic(), hydrostatic() + 0.5 * hydrostatic(seed=1), hydrostatic(2)[:, [0, 1, 2, 5, 3, 4]]]
)
def test_right_order_noise_and_few_frames_raise_no_suspicion(label: np.ndarray) -> None:
    model = hydrostatic()[: len(label)]
    assert likely_unit("stress", Comparison(label.ravel(), model.ravel())) is None


def test_another_order_is_spelt_out() -> None:
    model = hydrostatic()
    found = likely_unit("stress", Comparison(model[:, [0, 1, 2, 5, 4, 3]].ravel(), model.ravel()))
    assert found is not None
    assert found.text == "stresses with their shear components in the order xy xz yz"
