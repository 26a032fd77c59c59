"""The largest structure that fits into memory, from the memory that smaller ones take.

A structure is repeated until it takes a sizeable amount; memory grows with the number of atoms in proportion, as
neighbours do at one density, so the last two sizes say how many more would fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from ase import Atoms

from blip_ft.errors import BlipError
from blip_ft.system.memory_used import forget_peak, free_bytes, peak_bytes
from blip_ft.system.out_of_memory import is_out_of_memory, release

#: share of the free memory that is counted on: allocators leave gaps, and other programs need some
USABLE = 0.9
#: memory that tells sizes apart, as a share of what is free and in bytes; beyond either no larger one is tried
ENOUGH, ENOUGH_BYTES = 0.25, 1e9
#: seconds of a call after which no larger one is tried
PATIENCE = 20.0
#: Å between copies of a molecule
SPACING = 3.0


def largest_structure(
    call: Callable[[Atoms], object], atoms: Atoms, device: torch.device, *, free: float | None = None
) -> int:
    """Atoms of the largest structure that a call can be made with, at the density of one that it was made with.

    Args:
        call: to be made with a structure; must leave nothing behind.
        atoms: a structure that fits; it is repeated along its axes, a molecule in a lattice of copies.
        device: where the call is made.
        free: bytes to be used, by default those that are free now.

    Returns:
        Atoms, 10 % of the memory left unused. Not more than was tried where memory ran out on the way.

    Raises:
        BlipError: the system does not say how much memory is free.
    """
    release()
    forget_peak(device)
    before = peak_bytes(device)
    free = free_bytes(device) if free is None else free
    if free is None:
        raise BlipError(
            "this system does not say how much memory is free, and so not which structure is the largest",
            remedy="leave out --largest; a step that does not fit goes on in halves by itself",
        )
    sizes: list[int] = []
    peaks: list[float] = []
    grown = boxed(atoms)
    while True:
        release()
        forget_peak(device)
        started = time.monotonic()
        try:
            call(grown)
        except Exception as error:
            if not sizes or not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold the tensors
            return sizes[-1]
        sizes.append(len(grown))
        peaks.append(peak_bytes(device) - before)
        large = peaks[-1] > min(ENOUGH * free, ENOUGH_BYTES) or time.monotonic() - started > PATIENCE
        if large and len(sizes) > 1:
            break
        grown = doubled(grown)
    per_atom = max((peaks[-1] - peaks[-2]) / (sizes[-1] - sizes[-2]), peaks[-1] / sizes[-1] / 2)
    return max(sizes[-1], int(sizes[-1] + (USABLE * free - peaks[-1]) / per_atom))


def boxed(atoms: Atoms) -> Atoms:
    """The structure with a cell that it can be repeated in: along axes without one, with space around it."""
    out = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=dict(atoms.info))
    extent = np.ptp(out.positions, axis=0) + SPACING
    if not out.cell.rank:
        out.set_cell(np.diag(extent))
        return out
    cell = out.cell.complete().array
    for axis in range(3):
        if not out.pbc[axis]:  # an open axis may have any length, or none
            unit = cell[axis] / np.linalg.norm(cell[axis])
            cell[axis] = unit * (np.ptp(out.positions @ unit) + SPACING)
    out.set_cell(cell)
    return out


def doubled(atoms: Atoms) -> Atoms:
    """Twice the structure, along its shortest axis."""
    times = [1, 1, 1]
    times[int(np.argmin(atoms.cell.lengths()))] = 2
    out: Atoms = atoms.repeat(times)
    return out
