"""Which frames are the same structure.

Two frames are the same if their atoms coincide within 1e-6 Å, each with one of its own element,
whatever the order of the atoms and the periodic images they are written in, and their cells
agree, and so do charge and spin: two charge states of one geometry are two frames, while a frame that
says nothing is a neutral singlet. Labels do not count. Candidates are found by sorting a number that all of these leave
unchanged, so that thousands of frames cost no pairwise comparison; only candidates are compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import complete_cell, find_mic
from numpy.typing import NDArray

from blip_ft.backbones import electrons

TOLERANCE = 1e-6
"""Å"""

# Wave vectors of the sketch: integers, so that periodic images agree. One of them alone would
# miss nothing (equal structures always have equal sketches); more of them let fewer through.
_WAVES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 2, 3], [-3, 1, 2]], dtype=float)
# Where a direction is not periodic the "lattice vector" is arbitrary or 1 Å long; an irrational
# fraction keeps different coordinates from looking alike.
_OPEN = 0.2360679774997897


def sketch(atoms: Atoms) -> NDArray[np.float64]:
    """Numbers that are equal, to rounding, for two frames that are the same.

    Structure factors sum_i Z_i exp(2 pi i k . s_i) at a few k, with s the scaled positions; real
    and imaginary parts, shape (10,).
    """
    scaled = np.linalg.solve(complete_cell(atoms.cell).T, atoms.positions.T).T
    waves = np.where(atoms.pbc, _WAVES, _OPEN * _WAVES)
    factors = np.exp(2j * np.pi * scaled @ waves.T).T @ atoms.numbers
    return np.concatenate([factors.real, factors.imag])


def same_structure(a: Atoms, b: Atoms) -> bool:
    """True if two frames are the same within :data:`TOLERANCE`."""
    if len(a) != len(b) or not np.array_equal(a.pbc, b.pbc):
        return False
    if electrons.state_of(a.info) != electrons.state_of(b.info):
        return False
    if not np.allclose(a.cell.array, b.cell.array, rtol=0.0, atol=TOLERANCE):
        return False
    if np.array_equal(a.numbers, b.numbers):
        _, distances = find_mic(b.positions - a.positions, a.cell, a.pbc)
        if (distances < TOLERANCE).all():
            return True
    if not np.array_equal(np.sort(a.numbers), np.sort(b.numbers)):
        return False
    taken = np.zeros(len(b), dtype=bool)
    for number, position in zip(a.numbers, a.positions, strict=True):
        _, distances = find_mic(b.positions - position, a.cell, a.pbc)
        match = np.flatnonzero((distances < TOLERANCE) & (b.numbers == number) & ~taken)
        if not len(match):
            return False
        taken[match[0]] = True
    return True


def first_same(frames: Sequence[Atoms]) -> list[int]:
    """For each frame the index of the first frame that is the same structure (often its own)."""
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, atoms in enumerate(frames):
        state = electrons.state_of(atoms.info)
        kinds[(tuple(np.sort(atoms.numbers)), tuple(atoms.pbc), state)].append(index)
    first = list(range(len(frames)))
    for members in kinds.values():
        if len(members) > 1:
            _join(frames, members, first)
    return first


def _join(frames: Sequence[Atoms], members: list[int], first: list[int]) -> None:
    """Enter the same structures among frames of one composition into ``first``."""
    sketches = np.array([sketch(frames[i]) for i in members])
    margin = max(_margin(frames[i]) for i in members)
    order = np.argsort(sketches[:, 0])
    done: set[int] = set()
    for place, head in enumerate(order):
        if head in done:
            continue
        same = [members[head]]
        for other in order[place + 1 :]:
            if sketches[other, 0] - sketches[head, 0] > margin:
                break
            if other in done or np.abs(sketches[other] - sketches[head]).max() > margin:
                continue
            if same_structure(frames[members[head]], frames[members[other]]):
                done.add(other)
                same.append(members[other])
        for index in same:
            first[index] = min(same)


def _margin(atoms: Atoms) -> float:
    """Bound on the change of a sketch when every atom and lattice vector moves by the tolerance."""
    inverse = np.linalg.norm(np.linalg.inv(complete_cell(atoms.cell)), 2)
    reach = 1.0 + np.abs(atoms.positions).max(initial=0.0) * inverse
    wave = np.linalg.norm(_WAVES, axis=1).max()
    return float(2 * np.pi * wave * inverse * reach * 3 * TOLERANCE * atoms.numbers.sum())
