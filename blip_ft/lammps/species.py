"""Which element an atom type of LAMMPS is: by the names that are given, by its label, or by its mass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ase.data import atomic_masses, atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from blip_ft.errors import BlipError, nearest
from blip_ft.lammps.wheel import silent

#: how far a mass in an input may be from that of the element, u: inputs round
TOLERANCE = 0.2
#: how much farther the next element has to be
CLEAR = 4.0
#: masses that are alike to so much are no evidence against either, u
EXACT = 1e-3
SYMBOLS = chemical_symbols[1:]
_MASSES = atomic_masses[1:]


class Species:
    """Elements of the atom types of an instance.

    Args:
        lmp: the instance; its box exists.
        given: a symbol for each type, or ``None`` for labels and masses.
        known: atomic numbers that the model knows.
        model: name of the model, for errors.

    Raises:
        BlipError: names that are no symbols, or not one for each type.
    """

    def __init__(self, lmp: Any, given: Sequence[str] | None, known: Iterable[int], model: str) -> None:
        self._known, self._model = frozenset(known), model
        self._given = None if given is None else list(given)
        self._elements: dict[int, int] = {}
        self._masses: bytes | None = None
        if self._given is None:
            return
        for name in self._given:
            if name not in SYMBOLS:
                raise BlipError(
                    f"'{name}' is no element: {nearest(name, SYMBOLS)}",
                    field="elements",
                    remedy="use symbols: Si O",
                )
        n = int(lmp.extract_setting("ntypes"))
        if len(self._given) != n:
            raise BlipError(
                f"{len(self._given)} elements ({' '.join(self._given)}) for {n} atom types",
                field="elements",
                remedy="name one for each type, in the order of the types",
            )

    def numbers(self, lmp: Any, types: NDArray[np.int32]) -> NDArray[np.int64]:
        """Atomic numbers of atoms.

        Args:
            lmp: the instance.
            types: (n,) of the atoms, from 1.

        Returns:
            (n,)

        Raises:
            BlipError: a type whose element cannot be told, contradicts its mass, or is unknown to the model.
        """
        masses = lmp.numpy.extract_atom("mass")
        stamp = b"" if masses is None else masses.tobytes()
        if stamp != self._masses:  # also the first time
            self._masses, self._elements = stamp, {}
        present = np.unique(types).tolist()
        if new := [t for t in present if t not in self._elements]:
            labels = {} if self._given is not None else _labels(lmp)
            for t in new:
                self._elements[t] = self._element(t, None if masses is None else float(masses[t]), labels)
        table = np.zeros(max(present, default=0) + 1, dtype=np.int64)
        for t in present:
            table[t] = self._elements[t]
        return table[types]

    def _element(self, kind: int, mass: float | None, labels: dict[int, str]) -> int:
        """Atomic number of one type."""
        name = self._given[kind - 1] if self._given is not None else labels.get(kind)
        near = [] if mass is None else by_mass(mass)
        if name is None:
            name = self._by_mass(kind, mass, near)
        elif (
            mass and near and name not in near and abs(mass - atomic_masses[atomic_numbers[name]]) > TOLERANCE
        ):
            raise BlipError(
                f"atom type {kind} is to be {name} and has the mass of {' or '.join(near)} ({mass:g})",
                field="elements",
                remedy="name the elements in the order of the types, or mend the mass of the type",
            )
        number = int(atomic_numbers[name])
        if number not in self._known:
            raise BlipError(
                f"atom type {kind} is {name}, which is unknown to the {self._model} model",
                field="elements",
                remedy="choose a model that was trained on this element, or name the right elements, one for each type",
            )
        return number

    def _by_mass(self, kind: int, mass: float | None, near: list[str]) -> str:
        if not mass:
            raise BlipError(
                f"atom type {kind} has neither a label nor a mass",
                field="elements",
                remedy="name the elements, one for each type, or give the masses before the potential",
            )
        if len(near) != 1:
            what = f"may be {' or '.join(near)}" if near else "is none of an element"
            raise BlipError(
                f"the mass {mass:g} of atom type {kind} {what}",
                field="elements",
                remedy="name the elements, one for each type",
            )
        return near[0]


def by_mass(mass: float) -> list[str]:
    """Symbols of the elements that a mass (u) may mean: one, several where it is not clear, or none."""
    distance = np.abs(_MASSES - mass)
    order = np.argsort(distance, kind="stable")
    limit = max(float(distance[order[0]]), EXACT) * CLEAR
    return [SYMBOLS[i] for i in order if distance[i] <= TOLERANCE and distance[i] < limit]


def _labels(lmp: Any) -> dict[int, str]:
    """Types whose label is the symbol of an element; other labels say nothing."""
    try:
        with silent(lmp):
            here = [s for s in SYMBOLS if lmp.eval(f"is_typelabel(atom,{s})")]
            return {int(lmp.eval(f"label2type(atom,{s})")): s for s in here}
    except Exception as error:  # LAMMPS raises no other
        if "without a labelmap" not in str(error):
            raise
        return {}
