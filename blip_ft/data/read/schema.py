"""The written schema of a frame, and how labels are found in what people have.

=========== ============== ========= ==================================================
column      shape          unit      meaning
=========== ============== ========= ==================================================
numbers     (n,)                     atomic numbers
positions   (n, 3)         Å
cell        (3, 3)         Å         rows are the lattice vectors; zeros without a cell
pbc         (3,)                     periodic along each lattice vector
energy      ()             eV        total energy, or None
forces      (n, 3)         eV/Å      or None
stress      (6,)           eV/Å^3    ASE sign (positive = tensile) and Voigt order
                                     xx yy zz yz xz xy, or None
weight      ()                       factor of the frame's log likelihood
atom_weight (n,)                     factor of each atom's force terms, or None
charge      ()             e         total charge, or None
spin        ()                       spin multiplicity 2S + 1, or None
group       text                     trajectory, phase, ... it belongs to, or ""
theory      text                     level of theory, head, ... of its labels, or ""
split       text                     split the source itself names, or ""
source      text                     file or set, as the user wrote it
frame       ()                       number of the frame in that file, from 0
mapping     text                     layout, the name each label was found under, and what
                                     :mod:`blip_ft.data.read.unused` remembers
=========== ============== ========= ==================================================

A label is looked for under the names of :data:`LABELS`, or under the one name that ``fields``
gives. Two names with different values in one frame, or different names in different frames, are
refused: nobody should train on a guess. Virials are turned into stresses, stress = -virial / volume
(the sign of MACE, GAP and ASE's ``virial``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Features, Sequence, Value
from numpy.typing import NDArray

from blip_ft.backbones import electrons
from blip_ft.data.read.layouts import STRUCTURE
from blip_ft.data.read.raw import (
    RawFrame,
    check_geometry,
    number,
    numeric,
    shape_error,
    stress,
    to_numbers,
    vectors,
    voigt,
)
from blip_ft.data.read.units import conversion
from blip_ft.data.read.unused import candidates, line_for, marks, sounds_like
from blip_ft.errors import DataError, nearest

__all__ = ["FEATURES", "Mapper", "RawFrame", "canonical_split", "to_numbers", "voigt"]

#: part of the cache key: raise it when a source must be read anew
SCHEMA_VERSION = 5

_VECTORS = Sequence(Sequence(Value("float64")))
FEATURES = Features(
    {
        "numbers": Sequence(Value("int64")),
        "positions": _VECTORS,
        "cell": _VECTORS,
        "pbc": Sequence(Value("bool")),
        "energy": Value("float64"),
        "forces": _VECTORS,
        "stress": Sequence(Value("float64")),
        "weight": Value("float64"),
        "atom_weight": Sequence(Value("float64")),
        "charge": Value("float64"),
        "spin": Value("float64"),
        "group": Value("string"),
        "theory": Value("string"),
        "split": Value("string"),
        "source": Value("string"),
        "frame": Value("int64"),
        "mapping": Value("string"),
    }
)

_PREFIXES = ("", "REF_", "ref_", "dft_", "DFT_")
#: names under which a label is looked for when ``fields`` does not name it
LABELS: dict[str, tuple[str, ...]] = {
    "energy": (
        *(p + "energy" for p in _PREFIXES),
        "Energy",
        "total_energy",
        "potential_energy",
        "uncorrected_total_energy",
        "corrected_total_energy",
    ),
    "forces": (*(p + "forces" for p in _PREFIXES), *(p + "force" for p in _PREFIXES), "atomic_forces"),
    "stress": (*(p + "stress" for p in _PREFIXES), "cauchy_stress", "stress_tensor"),
}
#: labels that are turned into one of the above, and their known names
DERIVED: dict[str, tuple[str, ...]] = {"virial": ("REF_virials", "REF_virial"), "energy_per_atom": ()}
#: known names of weights
WEIGHTS = {"weight": ("config_weight",), "atom_weight": ("atom_weight",)}
#: weights of single labels in MACE's files: 0 leaves the label out
LABEL_WEIGHTS = {
    "config_energy_weight": "energy",
    "config_forces_weight": "forces",
    "config_stress_weight": "stress",
    "config_virials_weight": "stress",
}
#: the first of these that a frame has names its group
GROUPS = (
    "trajectory",
    "trajectory_id",
    "traj",
    "run",
    "phase",
    "framework",
    "config_type",
    "group",
    "mp_id",
    "material_id",
    "provenance.original_mp_id",
)
#: the first of these that a frame has names the level of theory of its labels; ``config_type`` too, where it is
#: not the group
THEORIES = (
    "theory",
    "level_of_theory",
    "theory_level",
    "functional",
    "xc_functional",
    "dft_functional",
    "xc",
    "dft_level",
    "level",
    "head",
    "modal",
    "modality",
    "data_modality",
    "method",
    "settings",
    "code",
    "dataset",
    "dataset_name",
)
#: keys of ``data.fields``
FIELDS = (*LABELS, *DERIVED, *WEIGHTS, *electrons.KEYS, "group", "theory", "split", *STRUCTURE)
#: names that mean something else
_KNOWN = frozenset(
    {
        *(n for names in WEIGHTS.values() for n in names),
        *LABEL_WEIGHTS,
        *GROUPS,
        *THEORIES,
        *(n for names in electrons.NAMES.values() for n in names),
        "split",
    }
)
#: order of six stress components in the source -> places of xx yy zz yz xz xy in it
STRESS_ORDERS = {"ase": (0, 1, 2, 3, 4, 5), "vasp": (0, 1, 2, 4, 5, 3)}
_SPLIT_ALIASES = {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "cal": "calibration",
    "calib": "calibration",
    "testing": "test",
}
_ROLES = frozenset(_SPLIT_ALIASES.values())
#: eV, eV/Å, eV/Å^3 and Å: all-electron energies of large cells stay far below
LARGEST = 1e12
#: two candidates for a label count as equal within this (eV, eV/Å, eV/Å^3)
_EQUAL = 1e-6


def _check_sizes(raw: RawFrame, values: Mapping[str, NDArray[np.float64] | None]) -> None:
    """Refuse numbers that no structure has, and whose squares single precision cannot hold.

    Raises:
        DataError: one is larger than :data:`LARGEST`.
    """
    for name, value in values.items():
        if value is not None and value.size and not float(np.abs(value).max()) <= LARGEST:
            raise raw.error(
                f"a number of {float(np.abs(value).max()):.3g}, which no structure has",
                field=name,
                remedy="mend it or remove the frame; is it the mark of a missing value, or in another unit?",
            )


def canonical_split(name: str) -> str:
    """``valid``, ``val``, ... to ``validation`` and so on; other names as they are."""
    lower = name.lower()
    return _SPLIT_ALIASES.get(lower, lower if lower in _ROLES else name)


@dataclass
class Mapper:
    """Turns the frames of one source into rows of the schema.

    Attributes:
        fields: explicit names (``data.fields``): only these are looked at then.
        factors: factor of each quantity to eV, Å, eV/Å, eV/Å^3 (:func:`blip_ft.data.read.units.factors`).
        require_labels: refuse a frame that has neither energy nor forces.
        given: quantities whose unit the user gave: what a layout says about them does not count.
        stress_order: order of six stress components, a key of :data:`STRESS_ORDERS`.
        energy_offset: what is taken off every total energy, in the source's own unit.
    """

    fields: Mapping[str, str]
    factors: Mapping[str, float]
    require_labels: bool = True
    given: frozenset[str] = frozenset()
    stress_order: str = "ase"
    energy_offset: float = 0.0
    #: names that held each label in every frame so far
    _names: dict[str, set[str]] = field(default_factory=dict)
    _missing: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for key in self.fields:
            if key not in FIELDS:
                raise DataError(
                    f"there is no field '{key}' to name", field="data.fields", remedy=nearest(key, FIELDS)
                )
        if self.stress_order not in STRESS_ORDERS:
            raise DataError(
                f"there is no order of stress components '{self.stress_order}'",
                field="data.stress_order",
                remedy=nearest(self.stress_order, STRESS_ORDERS),
            )
        self._missing = set(self.fields)

    def row(self, raw: RawFrame) -> dict[str, Any]:
        """One row of the schema.

        Raises:
            DataError: no atoms, NaN, wrong shape, no labels, or two candidates for one label.
        """
        check_geometry(raw)
        if raw.clash:
            raise raw.error(
                f"'{raw.clash}' occurs twice with different values (info, arrays or calculator)",
                field=raw.clash,
                remedy="remove one of them from the file",
            )
        self._missing -= {k for k, name in self.fields.items() if name in raw.values or name in raw.used}
        scale, units = self._units(raw)
        labels: dict[str, NDArray[np.float64] | None] = {}
        found: dict[str, str] = {}
        for label in LABELS:
            labels[label], found[label] = self._label(raw, label, scale)
        self._derive(raw, labels, found, scale)
        self._leave_out(raw, labels)
        energy, forces = labels["energy"], labels["forces"]
        if energy is not None:
            energy = energy - self.energy_offset * scale["energy"]
        if self.require_labels and energy is None and forces is None and raw.converged:
            likely = [
                (k, n) for k in ("energy", "forces") for n in candidates(raw, k, ()) if sounds_like(k, n)
            ]
            hint = f", for instance {line_for(*likely[0])}" if likely else ""
            raise raw.error(
                "the frame has neither energy nor forces",
                field="energy, forces",
                remedy=f"label the frame or remove it; if its labels have other names, give them in data.fields{hint} "
                f"(this frame has: {', '.join(sorted(raw.values)) or 'nothing'})",
            )
        positions, cell = raw.positions * scale["length"], raw.cell * scale["length"]
        sizes = {"positions": positions, "cell": cell, "energy": energy, "forces": forces}
        _check_sizes(raw, sizes | {"stress": labels["stress"]})
        group, group_name = self._text(raw, "group", GROUPS)
        theory, theory_name = self._text(raw, "theory", _theories(group_name))
        charge, charge_name = self._electrons(raw, "charge")
        spin, spin_name = self._electrons(raw, "spin")
        names = {
            "charge": charge_name,
            "spin": spin_name,
            "group": group_name,
            "theory": theory_name if theory else "",
        }
        weight, atom_weight = self._weight(raw, "weight"), self._weight(raw, "atom_weight")
        lacking = [label for label, value in labels.items() if value is None]
        used = {text.partition(" ")[0] for text in found.values()} | {group_name} | _KNOWN
        return {
            "numbers": raw.numbers,
            "positions": positions,
            "cell": cell,
            "pbc": raw.pbc,
            "energy": None if energy is None else float(energy),
            "forces": forces,
            "stress": labels["stress"],
            "weight": 1.0 if weight is None else float(weight),
            "atom_weight": atom_weight,
            "charge": charge,
            "spin": spin,
            "group": group,
            "theory": theory,
            "split": self.split(raw),
            "source": raw.source,
            "frame": raw.frame,
            "mapping": _mapping(raw.layout.name, found | names, units) + marks(raw, lacking, used),
        }

    def split(self, raw: RawFrame) -> str:
        """The split that the source itself names for this frame, or ``""``."""
        return canonical_split(self._text(raw, "split", ("split",))[0])

    def finish(self, source: str, available: set[str]) -> None:
        """After the last frame: every name in ``fields`` must have been found somewhere.

        Args:
            source: what to name in the error.
            available: all names that the frames had.

        Raises:
            DataError: a name in ``fields`` occurs in no frame.
        """
        for key in sorted(self._missing):
            raise DataError(
                f"no frame has '{self.fields[key]}', which data.fields names for {key}",
                file=source,
                field=f"data.fields.{key}",
                remedy=nearest(self.fields[key], available) if available else "the frames have no labels",
            )

    # ---- units ---------------------------------------------------------------------------
    def _units(self, raw: RawFrame) -> tuple[Mapping[str, float], dict[str, str]]:
        """Factors for this frame, and the units that its layout brought, for the mapping."""
        layout = raw.layout
        own = {q: u for q, u in layout.units.items() if q not in self.given}
        for quantity, column in layout.unit_columns.items():
            unit = raw.values.get(column)
            if quantity not in self.given and isinstance(unit, str) and unit.strip():
                own[quantity] = unit
        if not own:
            return self.factors, {}
        try:
            brought = {q: conversion(u, q) for q, u in own.items()}
        except DataError as error:
            raise raw.error(
                f"the {layout.name} layout gives a unit that is not known: {error.problem}",
                field=error.field,
                remedy="say the unit in data.units, which then counts",
            ) from error
        return {**self.factors, **brought}, own

    # ---- one label -----------------------------------------------------------------------
    def _label(
        self, raw: RawFrame, label: str, scale: Mapping[str, float]
    ) -> tuple[NDArray[np.float64] | None, str]:
        """A label and the name it was found under."""
        names = (self.fields[label],) if label in self.fields else LABELS[label]
        if label not in self.fields and any(
            key in self.fields and _DERIVES[key] == label and raw.values.get(self.fields[key]) is not None
            for key in DERIVED
        ):
            return None, ""  # the recipe says where it comes from
        found = {
            n: self._shaped(raw, label, n) * scale[label] for n in names if raw.values.get(n) is not None
        }
        if not found:
            return None, ""
        (first, value), *others = found.items()
        for name, other in others:
            if not np.allclose(value, other, rtol=0.0, atol=_EQUAL):
                raise raw.error(
                    f"'{first}' and '{name}' could both be the {label} and differ",
                    field=label,
                    remedy=f"say which one to take: data.fields: {{{label}: {name}}}",
                )
        common = self._names.get(label, set(found)) & set(found)
        if not common:
            before = ", ".join(sorted(self._names[label]))
            raise raw.error(
                f"the {label} is called '{first}' here and '{before}' in earlier frames",
                field=label,
                remedy=f"rename it, or say which one to take: data.fields: {{{label}: {first}}}",
            )
        self._names[label] = common
        return value, next(n for n in names if n in common)

    def _shaped(self, raw: RawFrame, label: str, name: str) -> NDArray[np.float64]:
        if label == "stress":
            if label not in self.fields and bool(raw.values.get("cauchy_stress_volume_normalized")):
                raise raw.error(
                    "the stress is marked as normalised by volume: stress or virial, nobody can tell",
                    field=name,
                    remedy=f"say which it is: data.fields: {{stress: {name}}} or {{virial: {name}}}",
                )
            return stress(raw, name, STRESS_ORDERS[self.stress_order])
        return (number if label == "energy" else vectors)(raw, name)

    def _derive(
        self,
        raw: RawFrame,
        labels: dict[str, NDArray[np.float64] | None],
        found: dict[str, str],
        scale: Mapping[str, float],
    ) -> None:
        """Stress from a virial, total energy from one per atom, where the label itself is not there."""
        for key, label in _DERIVES.items():
            names = (self.fields[key],) if key in self.fields else DERIVED[key]
            name = next((n for n in names if raw.values.get(n) is not None), None)
            if name is None or labels[label] is not None:
                continue
            if key == "energy_per_atom":
                labels[label] = number(raw, name) * (scale["energy"] * len(raw.numbers))
            elif raw.pbc.all():
                volume = abs(np.linalg.det(raw.cell * scale["length"]))
                virial = stress(raw, name, STRESS_ORDERS[self.stress_order])
                labels[label] = virial * (-scale.get("virial", 1.0) / volume)
            found[label] = f"{name} ({key})"

    def _leave_out(self, raw: RawFrame, labels: dict[str, NDArray[np.float64] | None]) -> None:
        """Labels whose own weight in the file is 0."""
        for name, label in LABEL_WEIGHTS.items():
            value = raw.values.get(name)
            if value is None:
                continue
            weight = float(number(raw, name))
            if weight == 0.0:
                labels[label] = None
            elif weight != 1.0:
                raise raw.error(
                    f"a weight of {weight:g} for one kind of label: only 0 (left out) and 1 are known",
                    field=name,
                    remedy="weigh the whole frame (config_weight), or set objective.*_std for all frames",
                )

    def _weight(self, raw: RawFrame, key: str) -> NDArray[np.float64] | None:
        """Weight of the frame () or of its atoms (n,); ``None`` where there is none."""
        names = (self.fields[key],) if key in self.fields else WEIGHTS[key]
        name = next((n for n in names if raw.values.get(n) is not None), None)
        if name is None:
            return None
        value = number(raw, name) if key == "weight" else numeric(raw, name)
        if key == "atom_weight" and value.shape != (len(raw.numbers),):
            raise shape_error(raw, name, value, f"({len(raw.numbers)},)")
        if (value < 0).any() or (key == "weight" and value == 0):
            raise raw.error(
                "a weight must be positive" if key == "weight" else "weights must not be negative",
                field=name,
                remedy="remove the frame if it shall not count",
            )
        return value

    def _electrons(self, raw: RawFrame, key: str) -> tuple[float | None, str]:
        """Total charge or spin, and the name it was found under.

        A value for each atom under one of the known names is something else.
        """
        named, n = key in self.fields, len(raw.numbers)
        found: dict[str, float] = {}
        for name in (self.fields[key],) if named else electrons.NAMES[key]:
            value = raw.values.get(name)
            if value is None or (not named and np.ndim(value) > 0 and (np.size(value) != 1 or n == 1)):
                continue
            try:
                found[name] = electrons.as_number(value)
            except ValueError as error:
                raise raw.error(f"the {key} is {error}", field=name, remedy=electrons.REMEDY) from error
        if len(set(found.values())) > 1:
            first, other = list(found)[:2]
            raise raw.error(
                f"'{first}' and '{other}' could both be the {key} and differ",
                field=key,
                remedy=f"say which one to take: data.fields: {{{key}: {first}}}",
            )
        return next(((value, name) for name, value in found.items()), (None, ""))

    def _text(self, raw: RawFrame, key: str, names: tuple[str, ...]) -> tuple[str, str]:
        """A text and the name it was found under."""
        for name in (self.fields[key],) if key in self.fields else names:
            value = raw.values.get(name)
            if value is not None and np.ndim(value) == 0:
                return str(value), name
        return "", ""


def _theories(group_name: str) -> tuple[str, ...]:
    """Names of the level of theory in a frame whose group was found under ``group_name``."""
    return tuple(n for n in (*THEORIES, "config_type") if n != group_name)


#: label that a derived one stands for
_DERIVES = {"virial": "stress", "energy_per_atom": "energy"}


def _mapping(layout: str, found: Mapping[str, str], units: Mapping[str, str]) -> str:
    """``layout: label <- name [unit], ...``."""
    parts = [
        f"{label} <- {name}{f' [{units[label]}]' if label in units else ''}"
        for label, name in found.items()
        if name
    ]
    return f"{layout}: {', '.join(parts) or 'no labels'}"
