"""A frame as a reader found it, and the shapes that its values must have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from blip_ft.data.read.layouts import PLAIN, Layout, parsed
from blip_ft.errors import DataError

#: share of a stress that its off-diagonal pairs may differ by
SYMMETRIC = 1e-2
_ASYMMETRIC = (
    "another tensor (a derivative by the lattice vectors) or a broken line? take the stress, or "
    "remove the label"
)
#: larger numbers are no labels: a stress of 10 TPa in Pa has 1e13
LARGEST = 1e15


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
        layout: of the table or file.
        used: columns that hold the structure.
        atoms: the frame as its library gave it, info and arrays included, where that is ASE.
        clash: a name that holds two different values; only labels are hurt by that.
        converged: False where the file says that the calculation did not converge.
        broken: why there is no structure, where the reader was asked to go on behind a frame that it cannot read.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    values: dict[str, Any]
    source: str
    frame: int
    layout: Layout = PLAIN
    used: frozenset[str] = frozenset()
    atoms: Atoms | None = None
    clash: str = ""
    converged: bool = True
    broken: DataError | None = None

    def error(self, problem: str, *, field: str | None = None, remedy: str = "") -> DataError:
        """A :class:`DataError` that names this frame."""
        return DataError(problem, file=self.source, frame=self.frame, field=field, remedy=remedy)


def check_geometry(raw: RawFrame) -> None:
    """Refuse a frame without atoms, with NaN, wrong shapes, or a cell without volume."""
    if raw.broken is not None:
        raise raw.broken
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


def numeric(raw: RawFrame, name: str) -> NDArray[np.float64]:
    """The value as finite float64 numbers."""
    value = parsed(raw.values[name])
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
            remedy="did the calculation finish? remove the label (it is then left out of the loss) or the frame",
        )
    if np.abs(array).max(initial=0.0) > LARGEST:
        raise raw.error(
            f"a value of {np.abs(array).max():.0e} is no label in any unit",
            field=name,
            remedy="a mark for a missing value, or a damaged file? remove the label or the frame",
        )
    return array


def number(raw: RawFrame, name: str) -> NDArray[np.float64]:
    """One number, ()."""
    value = numeric(raw, name)
    if value.size != 1:
        raise shape_error(raw, name, value, "one number")
    return value.reshape(())


def vectors(raw: RawFrame, name: str) -> NDArray[np.float64]:
    """A vector of each atom, (n, 3)."""
    value = numeric(raw, name)
    if value.shape != (len(raw.numbers), 3):
        raise shape_error(raw, name, value, f"({len(raw.numbers)}, 3)")
    return value


def stress(raw: RawFrame, name: str, order: Sequence[int] = range(6)) -> NDArray[np.float64]:
    """A symmetric tensor as (6,) in Voigt order; ``order`` holds the places of its components in six."""
    value = numeric(raw, name)
    if value.size == 6 and value.ndim <= 2:
        return np.asarray(value.reshape(6)[list(order)])
    if value.shape not in ((9,), (3, 3), (1, 9), (1, 3, 3)):
        raise shape_error(raw, name, value, "(6,) or (3, 3)")
    full = value.reshape(3, 3)
    if np.abs(full - full.T).max() > SYMMETRIC * np.abs(full).max() + 1e-8:
        raise raw.error("the stress is not symmetric", field=name, remedy=_ASYMMETRIC)
    return voigt(full)


def shape_error(raw: RawFrame, name: str, value: NDArray[np.float64], expected: str) -> DataError:
    """The error for a label of another shape."""
    return raw.error(
        f"shape {value.shape}, expected {expected}",
        field=name,
        remedy="mend the label, or name another one in data.fields",
    )


def voigt(stress: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) to (6,) in Voigt order xx yy zz yz xz xy, off-diagonal pairs averaged."""
    s = 0.5 * (stress + stress.T)
    return np.array([s[0, 0], s[1, 1], s[2, 2], s[1, 2], s[0, 2], s[0, 1]])


class UnknownSymbolError(ValueError):
    """A text that is no chemical symbol."""

    def __init__(self, symbol: str) -> None:
        super().__init__(f"'{symbol}' is not a chemical element")
        self.symbol = symbol


def to_numbers(species: Any) -> NDArray[np.int64]:
    """Atomic numbers from numbers or chemical symbols.

    Raises:
        ValueError: a symbol is no chemical element, or the values are neither.
    """
    array = np.asarray(species)
    if array.dtype.kind in "UO" and all(isinstance(s, str) for s in array.ravel()):
        unknown = [s for s in array.ravel().tolist() if s not in atomic_numbers]
        if unknown:
            raise UnknownSymbolError(unknown[0])
        return np.array([atomic_numbers[s] for s in array.ravel().tolist()], dtype=np.int64)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError("atomic numbers must be integers or chemical symbols")
    return array.reshape(-1).astype(np.int64)
