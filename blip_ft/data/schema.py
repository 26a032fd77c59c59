"""The written schema of a frame, and how labels are found in what people have.

========== ============== ========= ===================================================
column     shape          unit      meaning
========== ============== ========= ===================================================
numbers    (n,)                     atomic numbers
positions  (n, 3)         Å
cell       (3, 3)         Å         rows are the lattice vectors; zeros without a cell
pbc        (3,)                     periodic along each lattice vector
energy     ()             eV        total energy, or None
forces     (n, 3)         eV/Å      or None
stress     (6,)           eV/Å^3    ASE sign (positive = tensile) and Voigt order
                                    xx yy zz yz xz xy, or None
group      text                     trajectory, phase, ... the frame belongs to, or ""
split      text                     split the source itself names, or ""
source     text                     file or set, as the user wrote it
frame      ()                       number of the frame in that file, from 0
========== ============== ========= ===================================================

A label is looked for under the names of :data:`LABELS`, or under the one name that ``fields``
gives. Two names with different values in one frame, or different names in different frames, are
refused: nobody should train on a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from datasets import Features, Sequence, Value
from numpy.typing import NDArray

from blip_ft.errors import DataError, nearest

#: part of the cache key: raise it when a source must be read anew
SCHEMA_VERSION = 1

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
        "group": Value("string"),
        "split": Value("string"),
        "source": Value("string"),
        "frame": Value("int64"),
    }
)

_PREFIXES = ("", "REF_", "ref_", "dft_", "DFT_")
#: names under which a label is looked for when ``fields`` does not name it
LABELS: dict[str, tuple[str, ...]] = {
    "energy": (*(p + "energy" for p in _PREFIXES), "Energy", "total_energy", "potential_energy"),
    "forces": (*(p + "forces" for p in _PREFIXES), *(p + "force" for p in _PREFIXES), "atomic_forces"),
    "stress": (*(p + "stress" for p in _PREFIXES), "cauchy_stress"),
}
#: the first of these that a frame has names its group
GROUPS = ("trajectory", "trajectory_id", "traj", "run", "phase", "framework", "config_type", "group")
#: keys of ``data.fields``
FIELDS = (*LABELS, "group", "split")
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
#: two candidates for a label count as equal within this (eV, eV/Å, eV/Å^3)
_EQUAL = 1e-6


@dataclass
class RawFrame:
    """A frame as a reader found it, before labels are looked for.

    Attributes:
        numbers: (n,) atomic numbers.
        positions: (n, 3), unit of the source.
        cell: (3, 3), unit of the source, zeros without a cell.
        pbc: (3,).
        values: everything else: ASE results, info, arrays, columns.
        source: file or set, as the user wrote it.
        frame: number in that file, from 0.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    values: dict[str, Any]
    source: str
    frame: int

    def error(self, problem: str, *, field: str | None = None, remedy: str = "") -> DataError:
        """A :class:`DataError` that names this frame."""
        return DataError(problem, file=self.source, frame=self.frame, field=field, remedy=remedy)


def canonical_split(name: str) -> str:
    """``valid``, ``val``, ... to ``validation`` and so on; other names as they are."""
    lower = name.lower()
    return _SPLIT_ALIASES.get(lower, lower if lower in _ROLES else name)


@dataclass
class Mapper:
    """Turns the frames of one source into rows of the schema.

    Attributes:
        fields: explicit names (``data.fields``): only these are looked at then.
        factors: factor of each quantity to eV, Å, eV/Å, eV/Å^3 (:func:`blip_ft.data.units.factors`).
        require_labels: refuse a frame that has neither energy nor forces.
    """

    fields: Mapping[str, str]
    factors: Mapping[str, float]
    require_labels: bool = True
    #: names that held each label in every frame so far
    _names: dict[str, set[str]] = field(default_factory=dict)
    _missing: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for key in self.fields:
            if key not in FIELDS:
                raise DataError(
                    f"there is no field '{key}' to name", field="data.fields", remedy=nearest(key, FIELDS)
                )
        self._missing = set(self.fields)

    def row(self, raw: RawFrame) -> dict[str, Any]:
        """One row of the schema.

        Raises:
            DataError: no atoms, NaN, wrong shape, no labels, or two candidates for one label.
        """
        _check_geometry(raw)
        self._missing -= {key for key, name in self.fields.items() if name in raw.values}
        energy = self._label(raw, "energy")
        forces = self._label(raw, "forces")
        stress = self._label(raw, "stress")
        if self.require_labels and energy is None and forces is None:
            raise raw.error(
                "the frame has neither energy nor forces",
                field="energy, forces",
                remedy="label the frame or remove it; if its labels have other names, give them in "
                f"data.fields (this frame has: {', '.join(sorted(raw.values)) or 'nothing'})",
            )
        return {
            "numbers": raw.numbers,
            "positions": raw.positions * self.factors["length"],
            "cell": raw.cell * self.factors["length"],
            "pbc": raw.pbc,
            "energy": None if energy is None else float(energy),
            "forces": forces,
            "stress": stress,
            "group": self._text(raw, "group", GROUPS),
            "split": self.split(raw),
            "source": raw.source,
            "frame": raw.frame,
        }

    def split(self, raw: RawFrame) -> str:
        """The split that the source itself names for this frame, or ``""``."""
        return canonical_split(self._text(raw, "split", ("split",)))

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

    # ---- one label -----------------------------------------------------------------------
    def _label(self, raw: RawFrame, label: str) -> NDArray[np.float64] | None:
        names = (self.fields[label],) if label in self.fields else LABELS[label]
        found = {
            n: _SHAPERS[label](raw, n) * self.factors[label] for n in names if raw.values.get(n) is not None
        }
        if not found:
            return None
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
        return value

    def _text(self, raw: RawFrame, key: str, names: tuple[str, ...]) -> str:
        for name in (self.fields[key],) if key in self.fields else names:
            value = raw.values.get(name)
            if value is not None and np.ndim(value) == 0:
                return str(value)
        return ""


def _check_geometry(raw: RawFrame) -> None:
    n = len(raw.numbers)
    if n == 0:
        raise raw.error("the frame has no atoms", remedy="remove it")
    for name, value, shape in (
        ("positions", raw.positions, (n, 3)),
        ("cell", raw.cell, (3, 3)),
        ("pbc", raw.pbc, (3,)),
    ):
        if value.shape != shape:
            raise raw.error(
                f"shape {value.shape}, expected {shape}", field=name, remedy="mend or remove the frame"
            )
        if not np.isfinite(value).all():
            raise raw.error("NaN or infinite value", field=name, remedy="mend or remove the frame")
    known = (raw.numbers >= 1) & (raw.numbers < len(chemical_symbols))
    if not known.all():
        raise raw.error(
            f"{raw.numbers[~known][0]} is not an atomic number",
            field="numbers",
            remedy="give chemical elements from 1 (H) on",
        )
    periodic = raw.cell[raw.pbc]
    if len(periodic) and np.linalg.matrix_rank(periodic, tol=1e-6) < len(periodic):
        raise raw.error(
            "the frame is periodic but the lattice vectors do not span a cell",
            field="cell",
            remedy="give the lattice, or set pbc to F F F for a molecule",
        )


# ---- shapes ------------------------------------------------------------------------------------


def _numeric(raw: RawFrame, name: str) -> NDArray[np.float64]:
    value = raw.values[name]
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise raw.error(
            f"not a number or an even table of numbers: {error}",
            field=name,
            remedy="mend the label, or name another one in data.fields",
        ) from error
    if not np.isfinite(array).all():
        raise raw.error(
            "the label is NaN or infinite",
            field=name,
            remedy="remove the label (it is then left out of the loss) or the frame",
        )
    return array


def _energy(raw: RawFrame, name: str) -> NDArray[np.float64]:
    value = _numeric(raw, name)
    if value.size != 1:
        raise _shape_error(raw, name, value, "one number")
    return value.reshape(())


def _forces(raw: RawFrame, name: str) -> NDArray[np.float64]:
    value = _numeric(raw, name)
    if value.shape != (len(raw.numbers), 3):
        raise _shape_error(raw, name, value, f"({len(raw.numbers)}, 3)")
    return value


def _stress(raw: RawFrame, name: str) -> NDArray[np.float64]:
    value = _numeric(raw, name)
    if value.size == 6 and value.ndim <= 2:
        return value.reshape(6)
    if value.shape not in ((9,), (3, 3), (1, 9)):
        raise _shape_error(raw, name, value, "(6,) or (3, 3)")
    full = value.reshape(3, 3)
    if np.abs(full - full.T).max() > 1e-2 * np.abs(full).max() + 1e-8:
        raise raw.error("the stress is not symmetric", field=name, remedy="mend or remove the label")
    return voigt(full)


_SHAPERS = {"energy": _energy, "forces": _forces, "stress": _stress}


def _shape_error(raw: RawFrame, name: str, value: NDArray[np.float64], expected: str) -> DataError:
    return raw.error(
        f"shape {value.shape}, expected {expected}",
        field=name,
        remedy="mend the label, or name another one in data.fields",
    )


def voigt(stress: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) to (6,) in Voigt order xx yy zz yz xz xy, off-diagonal pairs averaged."""
    s = 0.5 * (stress + stress.T)
    return np.array([s[0, 0], s[1, 1], s[2, 2], s[1, 2], s[0, 2], s[0, 1]])


def to_numbers(species: Any) -> NDArray[np.int64]:
    """Atomic numbers from numbers or chemical symbols.

    Raises:
        ValueError: a symbol is no chemical element, or the values are neither.
    """
    array = np.asarray(species)
    if array.dtype.kind in "UO" and all(isinstance(s, str) for s in array.ravel()):
        unknown = [s for s in array.ravel().tolist() if s not in atomic_numbers]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is not a chemical element")
        return np.array([atomic_numbers[s] for s in array.ravel().tolist()], dtype=np.int64)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError("atomic numbers must be integers or chemical symbols")
    return array.reshape(-1).astype(np.int64)
