"""Units of labels and lengths: from what a source says to eV, Å, eV/Å and eV/Å^3.

A unit is a product or quotient of names and numbers, for instance ``kcal/mol``, ``Hartree/Bohr``,
``eV/Ang^3`` or ``-1 * kbar`` (the sign of VASP's stress). Names are those of :mod:`ase.units`, in
any case, and a few spellings that people use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ase import units

from blip_ft.errors import DataError, nearest

#: what each key of ``data.units`` must be: powers of (energy, length)
DIMENSIONS: dict[str, tuple[int, int]] = {
    "energy": (1, 0),
    "length": (0, 1),
    "forces": (1, -1),
    "stress": (1, -3),
    "virial": (1, 0),
}
_EXAMPLES = {
    "energy": "eV, kcal/mol or Hartree",
    "length": "Ang or Bohr",
    "forces": "eV/Ang, kcal/mol/Ang or Hartree/Bohr",
    "stress": "eV/Ang^3, GPa or -1 * kbar",
    "virial": "eV, or -1 * eV where it has the sign of the stress",
}

_ENERGY, _LENGTH, _PRESSURE, _NUMBER = (1, 0), (0, 1), (1, -3), (0, 0)
#: lower-case name -> (value in eV and Å, powers of energy and length)
_UNITS: dict[str, tuple[float, tuple[int, int]]] = {
    "ev": (1.0, _ENERGY),
    "mev": (1e-3, _ENERGY),
    "hartree": (units.Hartree, _ENERGY),
    "ha": (units.Hartree, _ENERGY),
    "eh": (units.Hartree, _ENERGY),
    "rydberg": (units.Rydberg, _ENERGY),
    "ry": (units.Rydberg, _ENERGY),
    "kcal": (units.kcal, _ENERGY),
    "kj": (units.kJ, _ENERGY),
    "joule": (units.J, _ENERGY),
    "j": (units.J, _ENERGY),
    "mol": (units.mol, _NUMBER),
    "å": (1.0, _LENGTH),
    "a": (1.0, _LENGTH),
    "ang": (1.0, _LENGTH),
    "angstrom": (1.0, _LENGTH),
    "bohr": (units.Bohr, _LENGTH),
    "nm": (units.nm, _LENGTH),
    "m": (units.m, _LENGTH),
    "gpa": (units.GPa, _PRESSURE),
    "pa": (units.Pascal, _PRESSURE),
    "pascal": (units.Pascal, _PRESSURE),
    "bar": (units.bar, _PRESSURE),
    "kbar": (1e3 * units.bar, _PRESSURE),
}
#: what is so many times larger or smaller than eV and Å is no unit of labels by itself
_LARGEST = 1e13
#: how names are usually written
_SPELT = {
    "ev": "eV",
    "mev": "meV",
    "hartree": "Hartree",
    "ha": "Ha",
    "ry": "Ry",
    "kj": "kJ",
    "ang": "Ang",
    "bohr": "Bohr",
}
_TOKEN = re.compile(
    r"\s*(?:(?P<op>[*/])|(?P<number>[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
    r"|(?P<minus>-)|(?P<name>[^\W\d_]+)\s*(?:(?:\^|\*\*)\s*(?P<power>-?\d+))?)\s*"
)


def conversion(text: str, quantity: str) -> float:
    """Factor that turns a number in the unit ``text`` into eV, Å, eV/Å or eV/Å^3.

    Args:
        text: the unit, see the module's description.
        quantity: a key of :data:`DIMENSIONS`.

    Raises:
        DataError: unknown unit, bad expression, or a unit of something else.
    """
    factor, power = 1.0, [0, 0]
    divide, position, expect = False, 0, True
    names: list[str] = []
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or (match["op"] is not None and expect):
            raise _unreadable(text, quantity)
        position = match.end()
        if match["op"] is not None:
            divide, expect = match["op"] == "/", True
            continue
        if match["minus"] is not None:
            factor = -factor
            continue
        if match["number"] is not None:
            value, dimension, exponent = float(match["number"]), _NUMBER, 1
        else:
            value, dimension = _lookup(match["name"], quantity)
            names.append(match["name"].lower())
            exponent = int(match["power"] or 1)
        if value == 0.0:
            raise _unreadable(text, quantity)
        sign = -1 if divide else 1
        factor *= value ** (sign * exponent)
        power = [p + sign * exponent * d for p, d in zip(power, dimension, strict=True)]
        divide, expect = False, False
    if expect:
        raise _unreadable(text, quantity)
    if tuple(power) != DIMENSIONS[quantity]:
        raise DataError(
            f"'{text}' is not a unit of {quantity}",
            field=f"data.units.{quantity}",
            remedy=f"give a unit such as {_EXAMPLES[quantity]}",
        )
    if abs(factor) > _LARGEST and {"kcal", "kj"} & set(names):
        raise DataError(
            f"'{text}' makes {factor:.0e} eV of 1: no label is in it",
            field=f"data.units.{quantity}",
            remedy=f"energies of structures are given per mole: {_EXAMPLES[quantity]}",
        )
    return factor


def factors(given: Mapping[str, str] | None) -> dict[str, float]:
    """Factors of all quantities; those not given are in eV, Å, eV/Å, eV/Å^3 already.

    Raises:
        DataError: unknown quantity, or a bad unit.
    """
    given = given or {}
    for key in given:
        if key not in DIMENSIONS:
            raise DataError(
                f"there is no unit '{key}' to set", field="data.units", remedy=nearest(key, DIMENSIONS)
            )
    return {q: conversion(given[q], q) if q in given else 1.0 for q in DIMENSIONS}


def _lookup(name: str, quantity: str) -> tuple[float, tuple[int, int]]:
    if name.lower() in _UNITS and name not in ("MeV", "MEV"):  # 10^6 eV, not the milli of the table
        return _UNITS[name.lower()]
    raise DataError(
        f"unknown unit '{name}'", field=f"data.units.{quantity}", remedy=_suggestion(name, quantity)
    )


def _suggestion(name: str, quantity: str) -> str:
    """A unit of this quantity that a name may stand for: ``kcalmol`` is no misspelt ``kcal``, which is 6e23
    times more.
    """
    for parts in _divided(name.lower()):
        text = "/".join(_SPELT.get(part, part) for part in parts)
        for candidate in (text, f"{text}^3"):
            try:
                factor = conversion(candidate, quantity)
            except DataError:
                continue
            if 1 / _LARGEST < abs(factor) < _LARGEST:
                return f"did you mean '{candidate}'?"
    # only what a source may be in: one kcal or J is 1e19 eV and more
    likely = [n for n, (value, _) in _UNITS.items() if 1 / _LARGEST < value < _LARGEST]
    return nearest(name.lower(), likely)


def _divided(name: str) -> Iterator[tuple[str, ...]]:
    """All ways to write a name as several known ones."""
    for end in range(1, len(name)):
        head, rest = name[:end], name[end:]
        if head in _UNITS:
            if rest in _UNITS:
                yield head, rest
            for more in _divided(rest):
                yield head, *more


def _unreadable(text: str, quantity: str) -> DataError:
    return DataError(
        f"cannot read the unit '{text}'",
        field=f"data.units.{quantity}",
        remedy=f"give a unit such as {_EXAMPLES[quantity]}",
    )
