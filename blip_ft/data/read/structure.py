"""A frame as a reader found it, as a structure of ASE with all that the source says beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms

from blip_ft.data.read.raw import RawFrame


def structure(raw: RawFrame) -> Atoms:
    """The structure of a frame with whatever else it has: columns of a table become info and arrays."""
    if raw.atoms is not None:
        return raw.atoms
    atoms = Atoms(numbers=raw.numbers, positions=raw.positions, cell=raw.cell, pbc=raw.pbc)
    for name, value in raw.values.items():
        array = np.asarray(value) if isinstance(value, list | np.ndarray) and _is_even(value) else None
        if array is not None and _per_atom(array, len(atoms)) and name not in atoms.arrays:
            atoms.new_array(name, array)
        elif value is not None:
            atoms.info[name] = value
    return atoms


def _per_atom(array: np.ndarray, n: int) -> bool:
    return array.ndim in (1, 2) and len(array) == n and array.dtype.kind in "biufU"


def _is_even(value: Any) -> bool:
    try:
        np.asarray(value)
    except ValueError:  # rows of different lengths
        return False
    return True
