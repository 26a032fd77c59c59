"""How many structures one call of the model predicts: as many as are small, one that is large.

A call holds its intermediate tensors while it differentiates, some MB for every atom: CHGNet in float64 takes 3.7 ms
per atom on one core with 64, 128 or 400 atoms in a call, and 0.2, 0.3 or 1.5 GB. So the bound is on atoms, and beyond
it larger calls buy nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from blip_ft.system.side_by_side import width

T = TypeVar("T")

#: structures of one call, at most
STRUCTURES = 16
#: atoms of one call for each thread that works on a part of it, and at least twice so many
ATOMS_PER_THREAD = 64
#: atoms of one call on a GPU, whose operations are too short below
ATOMS_ON_GPU = 2048


def default_atoms(device: torch.device | str) -> int:
    """Atoms of one call on a device."""
    if torch.device(device).type != "cpu":
        return ATOMS_ON_GPU
    return ATOMS_PER_THREAD * max(2, width(device))


def bounded(
    items: Iterable[T], size: Callable[[T], int], *, structures: int, atoms: int
) -> Iterator[list[T]]:
    """Consecutive batches of at most so many structures and atoms; a structure with more comes alone.

    Args:
        items: read no further than the batch needs, and one more.
        size: atoms of an item.
        structures: at most in a batch.
        atoms: at most in a batch of more than one structure.
    """
    batch: list[T] = []
    filled = 0
    for item in items:
        n = size(item)
        if batch and (len(batch) == structures or filled + n > atoms):
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += n
    if batch:
        yield batch


def ranges(sizes: Sequence[int], *, structures: int, atoms: int) -> list[range]:
    """:func:`bounded` for structures that are known beforehand: their numbers.

    Args:
        sizes: atoms of each.
        structures: at most in a batch.
        atoms: at most in a batch of more than one structure.
    """
    batches = bounded(range(len(sizes)), sizes.__getitem__, structures=structures, atoms=atoms)
    return [range(batch[0], batch[-1] + 1) for batch in batches]
