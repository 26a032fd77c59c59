"""Layouts that people's tables come in: under which names structures stand, and in which units.

A layout is recognised by columns that only it has. What it says about units holds where the
recipe (``data.units``) says nothing. Sources:

================  =========================================================================
MatPES            https://matpes.ai/dataset and its training notebook: pymatgen structures,
                  stress in kbar, VASP sign, Voigt order of ASE
MPtrj             https://doi.org/10.6084/m9.figshare.23713842: the same with other names
ColabFit          https://huggingface.co/colabfit: ``atomic_forces``, ``cauchy_stress``, in
                  older exports a column with the unit of each
LeMat, OPTIMADE   https://huggingface.co/LeMaterial: ``cartesian_site_positions``, ...
OMat24, OMol25    fairchem's records: ``pos``, ``atomic_numbers``; eV, Å
MACE              ``REF_energy``, ``REF_forces``, ``REF_stress``, ``REF_virials``
Si-ZEO22          ``.npz`` of one framework: ``symbols``, ``cells``, ``energies``
rMD17, MD17       ``.npz``: ``nuclear_charges`` or ``z``; kcal/mol
================  =========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: names of the columns that make a structure; the first that a row has is taken
STRUCTURE: dict[str, tuple[str, ...]] = {
    "numbers": (
        "numbers",
        "atomic_numbers",
        "species_at_sites",
        "nuclear_charges",
        "z",
        "species",
        "symbols",
        "elements",
    ),
    "positions": ("positions", "pos", "coordinates", "coords", "cartesian_site_positions", "R"),
    "cell": ("cell", "lattice", "lattice_vectors", "cells"),
    "pbc": ("pbc", "dimension_types"),
}


@dataclass(frozen=True)
class Layout:
    """A known layout.

    Attributes:
        name: for messages.
        all_of: columns that it always has.
        any_of: columns of which it has at least one.
        units: of quantities that are not in eV and Å, as in ``data.units``.
        unit_columns: columns that hold the unit of a quantity.
    """

    name: str
    all_of: frozenset[str] = frozenset()
    any_of: frozenset[str] = frozenset()
    units: Mapping[str, str] = field(default_factory=dict)
    unit_columns: Mapping[str, str] = field(default_factory=dict)

    def fits(self, names: set[str]) -> bool:
        """Whether a row with these columns is of this layout."""
        return self.all_of <= names and (not self.any_of or bool(self.any_of & names))


PLAIN = Layout("plain")
#: columns that tell a table written by this package
OWN = frozenset({"numbers", "positions", "weight", "atom_weight", "mapping"})
_KCAL = {"energy": "kcal/mol", "forces": "kcal/mol/Ang"}
_COLABFIT_UNITS = {
    "energy": "energy_unit",
    "forces": "atomic_forces_unit",
    "stress": "cauchy_stress_unit",
}
#: in the order in which they are tried
LAYOUTS = (
    Layout("blip_ft", OWN),
    Layout("MatPES", frozenset({"matpes_id", "structure"}), units={"stress": "-1 * kbar"}),
    Layout("MPtrj", frozenset({"structure", "uncorrected_total_energy"}), units={"stress": "-1 * kbar"}),
    Layout(
        "ColabFit",
        any_of=frozenset({"atomic_forces", "cauchy_stress"}),
        all_of=frozenset({"atomic_numbers", "positions"}),
        unit_columns=_COLABFIT_UNITS,
    ),
    Layout("OPTIMADE", frozenset({"species_at_sites", "cartesian_site_positions"})),
    Layout("fairchem", frozenset({"pos", "atomic_numbers"})),
    Layout("rMD17", frozenset({"nuclear_charges", "coords", "energies"}), units=_KCAL),
    Layout("MD17", frozenset({"z", "R", "E", "F"}), units=_KCAL, unit_columns={"energy": "e_unit"}),
    Layout("Si-ZEO22", frozenset({"symbols", "cells", "energies", "positions"})),
    Layout("MACE", any_of=frozenset({"REF_energy", "REF_forces", "REF_stress", "REF_virials"})),
)


def recognise(names: set[str]) -> Layout:
    """The first layout that fits; :data:`PLAIN` if none does."""
    return next((layout for layout in LAYOUTS if layout.fits(names)), PLAIN)


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested records under dotted names (``provenance.original_mp_id``); structures stay whole."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping) and not _is_pymatgen(value):
            # the parts of an ``atoms`` record are the structure itself
            flat |= flatten(value, "" if not prefix and key == "atoms" else f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_pymatgen(value: Mapping[str, Any]) -> bool:
    return "lattice" in value and "sites" in value


def from_pymatgen(structure: Any) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64], list[bool]]:
    """Symbols, positions (n, 3) Å, cell (3, 3) Å and pbc of a serialised pymatgen ``Structure``.

    It is read as plain data: nothing of pymatgen is imported or run.

    Raises:
        ValueError: a site that is shared by several species, or a record of another form.
    """
    if isinstance(structure, str):
        structure = json.loads(structure)
    try:
        lattice, sites = structure["lattice"], structure["sites"]
        cell = np.asarray(lattice["matrix"], dtype=np.float64)
        symbols, positions = [], []
        for site in sites:
            species = site["species"]
            if len(species) != 1 or abs(float(species[0].get("occu", 1.0)) - 1.0) > 1e-8:
                raise ValueError("a site is shared by several species or partly empty")
            symbols.append(str(species[0]["element"]).rstrip("+-0123456789"))
            xyz = site.get("xyz")
            positions.append(np.asarray(xyz if xyz is not None else np.asarray(site["abc"]) @ cell))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a pymatgen structure: {type(error).__name__} {error}") from error
    pbc = [bool(b) for b in (lattice.get("pbc") or (True, True, True))]
    return symbols, np.asarray(positions, dtype=np.float64).reshape(-1, 3), cell, pbc


def pymatgen_charge(structure: Any) -> float | None:
    """Total charge of a serialised pymatgen ``Structure``; 0, which it has where nobody has set one, is none."""
    if isinstance(structure, str):
        try:
            structure = json.loads(structure)
        except json.JSONDecodeError:
            return None
    charge = structure.get("charge") if isinstance(structure, Mapping) else None
    return charge or None


def parsed(value: Any) -> Any:
    """A table of numbers that was stored as text (``"[[0, 1], ...]"``) as a list; others as they are."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
