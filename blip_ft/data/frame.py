"""One frame of the schema: as a structure of ASE, and its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.backbones import electrons

#: one row of the schema (:data:`blip_ft.data.read.schema.FEATURES`)
FrameRow = dict[str, Any]
#: columns that make a frame's key, beside charge and spin
KEY_COLUMNS = ("numbers", "positions", "cell")


def to_atoms(row: Mapping[str, Any], *, labels: bool = True) -> Atoms:
    """The structure of one row of the schema, with its charge and spin in ``info`` where it has them.

    Args:
        row: one row.
        labels: put the labels that exist into a ``SinglePointCalculator``.
    """
    atoms = Atoms(numbers=row["numbers"], positions=row["positions"], cell=row["cell"], pbc=row["pbc"])
    atoms.info = {k: electrons.plain(row[k]) for k in electrons.KEYS if row.get(k) is not None}
    if labels:
        results = {k: row[k] for k in ("energy", "forces", "stress") if row[k] is not None}
        if results:
            arrays = {k: v if k == "energy" else np.asarray(v, dtype=float) for k, v in results.items()}
            atoms.calc = SinglePointCalculator(atoms, **arrays)
    return atoms


def content_key(
    numbers: Any, positions: Any, cell: Any, charge: float | None = None, spin: float | None = None
) -> int:
    """Identity of a structure: a 63-bit hash of numbers, positions and cell to 1e-6 Å, charge and spin.

    It does not depend on the file, its format, or the place in it, so that noise keyed by it
    does not either. It does depend on the order of the atoms and on translations. A neutral singlet has
    the key of a structure that says nothing of charge and spin.
    """
    digest = hashlib.blake2b(np.asarray(numbers, dtype="<i8").tobytes(), digest_size=8)
    digest.update(grid(positions, 1e-6).tobytes())
    digest.update(grid(cell, 1e-6).tobytes())
    digest.update(electrons.state_bytes(charge, spin))
    return int.from_bytes(digest.digest(), "little") >> 1


def row_key(row: Mapping[str, Any]) -> int:
    """:func:`content_key` of one row of the schema."""
    return content_key(*(row[k] for k in KEY_COLUMNS), *(row.get(k) for k in electrons.KEYS))


def atoms_key(atoms: Atoms) -> int:
    """:func:`content_key` of a structure with charge and spin in ``info``."""
    known = electrons.given(atoms.info)
    return content_key(
        atoms.numbers, atoms.positions, atoms.cell.array, known.get("charge"), known.get("spin")
    )


def fingerprint(dataset: datasets.Dataset) -> str:
    """SHA-256 of structures (with charge and spin) and labels in their order, whatever file they came from.

    Numbers count to 1e-6 (Å, eV, eV/Å, eV/Å^3), so that a set has one fingerprint in text and
    binary formats.
    """
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(np.asarray(row["numbers"], dtype="<i8").tobytes())
        for column in ("positions", "cell", "energy", "forces", "stress"):
            digest.update(b"-" if row[column] is None else grid(row[column], 1e-6).tobytes())
        digest.update(bytes(row["pbc"]))
        digest.update(electrons.state_bytes(row.get("charge"), row.get("spin")))
    return digest.hexdigest()


def grid(values: Any, step: float) -> Any:
    """Integers ``values/step``, shifted so that decimal numbers stay away from the rounding edge.

    Without the shift 1.0000005 is rounded up or down by its last bit, and two readers disagree.
    """
    shifted = np.asarray(values, dtype=np.float64) / step + 0.3183098861837907
    return np.floor(shifted).astype("<i8")
