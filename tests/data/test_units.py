import math
import re

import pytest
from ase import units as u
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.read.units import DIMENSIONS, conversion, factors
from blip_ft.errors import DataError

ENERGIES = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": 0.0433641,
    "kJ/mol": 0.0103643,
    "Hartree": 27.2113845,
    "Ry": 13.6056923,
}
LENGTHS = {"Ang": 1.0, "Å": 1.0, "Bohr": 0.5291772, "nm": 10.0}


@pytest.mark.parametrize(
    ("text", "quantity", "expected"),
    [
        ("eV", "energy", 1.0),
        ("kcal/mol", "energy", u.kcal / u.mol),
        ("kcal mol^-1", "energy", u.kcal / u.mol),
        ("hartree", "energy", 27.211386),
        ("Ha", "energy", 27.211386),
        ("Bohr", "length", 0.529177),
        ("kcal/mol/Å", "forces", 1 / 23.0605),
        ("Hartree/Bohr", "forces", 51.42207),
        ("Ry/Bohr", "forces", 25.71104),
        ("meV/Ang", "forces", 1e-3),
        ("eV/Ang^3", "stress", 1.0),
        ("eV/A**3", "stress", 1.0),
        ("GPa", "stress", 1 / 160.21766),
        ("kbar", "stress", 1 / 1602.1766),
        ("-1 * kbar", "stress", -1 / 1602.1766),
        ("-kbar", "stress", -1 / 1602.1766),
        ("0.1*GPa", "stress", 1 / 1602.1766),
        ("Hartree/Bohr^3", "stress", 183.6315),
    ],
)
def test_known_units(text: str, quantity: str, expected: float) -> None:
    assert conversion(text, quantity) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", ["", " ", "/", "eV/", "*eV", "eV//Ang", "0*eV", "eV^", "eV $ Ang", "2*/eV"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"data\.units\.energy"):
        conversion(text, "energy")


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(DataError, match="did you mean 'hartree'"):
        conversion("hartre", "energy")


def test_mega_electron_volt_is_not_read_as_milli() -> None:
    with pytest.raises(DataError, match="unknown unit 'MeV'"):
        conversion("MeV", "energy")


def test_unit_of_another_quantity_is_refused_with_an_example() -> None:
    with pytest.raises(DataError, match=r"'kcal/mol' is not a unit of forces.*\n.*kcal/mol/Ang"):
        conversion("kcal/mol", "forces")


def test_unknown_quantity_is_refused() -> None:
    with pytest.raises(DataError, match="did you mean 'forces'"):
        factors({"force": "eV/Ang"})


def test_what_is_not_given_is_left_alone() -> None:
    assert factors(None) == dict.fromkeys(DIMENSIONS, 1.0)
    assert factors({"stress": "GPa"})["forces"] == 1.0


@given(
    energy=st.sampled_from(sorted(ENERGIES)),
    length=st.sampled_from(sorted(LENGTHS)),
    scale=st.floats(1e-3, 1e3).map(lambda x: float(f"{x:.4g}")),
    power=st.sampled_from([0, 1, 3]),
)
def test_products_multiply(energy: str, length: str, scale: float, power: int) -> None:
    quantity = {0: "energy", 1: "forces", 3: "stress"}[power]
    text = f"{scale:.4g} * {energy}" + (f"/{length}^{power}" if power else "")
    expected = scale * ENERGIES[energy] / LENGTHS[length] ** power
    assert math.isclose(conversion(text, quantity), expected, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("text", "quantity", "suggestion"),
    [
        ("kcalmol", "energy", "kcal/mol"),
        ("KCALMOL", "energy", "kcal/mol"),
        ("kjmol", "energy", "kJ/mol"),
        ("kcalmolang", "forces", "kcal/mol/Ang"),
        ("evang", "forces", "eV/Ang"),
        ("hartreebohr", "forces", "Hartree/Bohr"),
        ("evang3", "stress", "eV/Ang^3"),
    ],
)
def test_units_without_their_signs(text: str, quantity: str, suggestion: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"did you mean '{suggestion}'?")):
        conversion(text, quantity)


@pytest.mark.parametrize(("text", "quantity"), [("kcal", "energy"), ("kJ", "energy"), ("kcal/Ang", "forces")])
def test_energies_are_per_mole(text: str, quantity: str) -> None:
    """One kcal is 2.6e22 eV: nobody means it."""
    with pytest.raises(DataError, match=r"per mole: .*kcal/mol"):
        conversion(text, quantity)
    assert conversion("1.66053906717e-24 * kcal", "energy") == pytest.approx(u.kcal / u.mol, rel=1e-6)


def test_no_suggestion_is_many_powers_of_ten_off() -> None:
    with pytest.raises(DataError) as error:
        conversion("kcak", "energy")
    assert "did you mean 'kcal'" not in str(error.value)
