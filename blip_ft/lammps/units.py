"""LAMMPS's unit styles: what eV and eV/Å are in them. Lengths are in Å in all that are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ase import units

from blip_ft.errors import BlipError


@dataclass(frozen=True)
class Units:
    """A unit style.

    Attributes:
        name: as LAMMPS has it.
        energy: of 1 eV.
        energy_unit: in words.
    """

    name: str
    energy: float
    energy_unit: str

    @property
    def force_unit(self) -> str:
        """Of forces and their stds."""
        return f"{self.energy_unit}/Å"


STYLES = {
    style.name: style
    for style in (
        Units("metal", 1.0, "eV"),
        Units("real", units.mol / units.kcal, "kcal/mol"),
    )
}


def units_of(lmp: Any) -> Units:
    """The unit style of an instance.

    Raises:
        BlipError: one without Å, or without energies that a potential has.
    """
    name = lmp.extract_global("units")
    if name not in STYLES:
        raise BlipError(
            f"LAMMPS has units {name}",
            field="units",
            remedy=f"write 'units {' or '.join(STYLES)}' in the input",
        )
    return STYLES[name]
