"""Holes at short distance: dimers of every pair of elements, and a crystal that is squeezed and stretched.

Pretrained models know few structures with atoms that touch, and where nothing was learned the energy may fall again.
Of 190 pairs of 19 elements SevenNet-0 has such an attraction inside 60 % of the bond length in 177, CHGNet in 184. So
what counts is the wall in front of it, which two atoms have to climb. Its median is 31 and 23 eV; one pair in ten
has less than 11 and 15 eV.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from numpy.typing import NDArray

from blip_ft.verify.models import Verified
from blip_ft.verify.verdict import ORDER, Check, Result

Floats = NDArray[np.float64]

#: Å, ends and step of the distances of a dimer
NEAR, FAR, STEP = 0.5, 3.0, 0.025
#: of the sum of the covalent radii, inside which nothing attracts
INSIDE = 0.6
#: eV: the strongest bond (CO) sets 11.2 free, and one pair in ten of the shipped models has a lower wall
WALL = 15.0
#: eV: two atoms that are bound by more sit in a hole
STRONGEST = 15.0
#: eV: what breaking a strong single bond takes; for models whose pretrained model has the same hole
LEAST_WALL = 5.0
#: eV: a wall that only a collision cascade climbs; it does not matter that the pretrained model's was higher
ENOUGH = 50.0
#: largest linear strain, and number of steps to either side
STRAIN, STEPS = 0.3, 12
#: eV/atom: mean kinetic energy at 7700 K, and what a solid has beyond some 100 GPa
CRYSTAL_WALL = 1.0
#: eV, below which a fall of the energy is not called one: of a pair, and per atom of a crystal
FALL, CRYSTAL_FALL = 1e-2, 1e-2


def check_dimers(
    model: Verified, elements: Sequence[int], info: Mapping[str, object], pretrained: Sequence[Check] | None
) -> list[Check]:
    """One check for each pair: the wall, eV, in front of the first attraction inside 60 % of the bond length.

    Without an attraction the value is the energy at the shortest distance. Zero is the lowest energy outside 60 %.

    Args:
        model: what is verified.
        elements: atomic numbers.
        info: charge and spin of a dimer, where the model takes them.
        pretrained: the same checks of the pretrained model, if that is known: a hole that it has too fails below
            :data:`LEAST_WALL`, a wall that is less than half as high below :data:`ENOUGH`.
    """
    before = {c.name: c.value for c in pretrained or ()}
    pairs = list(itertools.combinations_with_replacement(sorted(set(elements)), 2))
    grids = {pair: _distances(pair) for pair in pairs}
    frames = [
        Atoms(pair, positions=[(0, 0, 0), (r, 0, 0)], info=dict(info)) for pair in pairs for r in grids[pair]
    ]
    energies = np.split(model.energies_of(frames), np.cumsum([len(grids[p]) for p in pairs])[:-1])
    out = []
    for pair, energy in zip(pairs, energies, strict=True):
        name = "dimer_" + "-".join(chemical_symbols[z] for z in pair)
        limit = WALL
        if pretrained is not None:
            limit = max(LEAST_WALL, min(ENOUGH, (before.get(name) or 0.0) / 2))
        bond = float(covalent_radii[list(pair)].sum())
        wall = _wall(name, grids[pair], energy, INSIDE * bond, limit=limit, fall=FALL, unit="eV")
        out.append(_bound(wall, grids[pair], energy, INSIDE * bond) or wall)
    return out


def _bound(check: Check, r: Floats, energy: Floats, inside: float) -> Check | None:
    """A failure where two atoms beyond ``inside`` are bound more strongly than any are: a hole."""
    outside = r > inside
    depth, at = float(energy[-1] - energy[outside].min()), float(r[outside][np.argmin(energy[outside])])
    if check.value is None or depth <= STRONGEST:
        return None
    return Check(check.name, "fail", 0.0, check.limit, check.unit, f"bound by {depth:.0f} eV at {at:.2f} Å")


def _distances(pair: tuple[int, int]) -> Floats:
    """Å; from nearer than usual where the bond is short."""
    first = min(NEAR, 0.5 * float(covalent_radii[list(pair)].sum()))
    return np.append(np.arange(first, FAR, STEP), FAR)


def check_scan(model: Verified, frames: Sequence[Atoms]) -> Check | None:
    """The lowest wall, eV/atom, of crystals scaled to linear strains of -30 to +30 % with their atoms.

    The energy has to rise from its minimum to both sides. ``None`` without periodic frames.
    """
    checks = []
    for atoms in (a for a in frames if a.pbc.all()):
        strains = np.linspace(-STRAIN, STRAIN, 2 * STEPS + 1)
        scaled = [atoms.copy() for _ in strains]
        for frame, strain in zip(scaled, strains, strict=True):
            frame.set_cell(atoms.cell * (1 + strain), scale_atoms=True)
        energy = model.energies_of(scaled) / len(atoms)
        lowest = float(strains[int(np.argmin(np.where(np.abs(strains) <= STRAIN / 2, energy, np.inf)))])
        inward = _wall(
            "hydrostatic_scan",
            strains,
            energy,
            lowest,
            limit=CRYSTAL_WALL,
            fall=CRYSTAL_FALL,
            unit="eV/atom",
        )
        outward = _wall(
            "hydrostatic_scan",
            -strains[::-1],
            energy[::-1],
            -lowest,
            limit=0.0,
            fall=CRYSTAL_FALL,
            unit="eV/atom",
        )
        worse = outward.result != "pass" and inward.result == "pass"
        checks.append(Check(**{**vars(inward), "result": "warn", "note": outward.note}) if worse else inward)
    if not checks:
        return None
    return min(checks, key=lambda c: (-ORDER.index(c.result), -np.inf if c.value is None else c.value))


def _wall(
    name: str, x: Floats, energy: Floats, inside: float, *, limit: float, fall: float, unit: str
) -> Check:
    """Going down in x from ``inside``: how high the energy gets before it falls, above its minimum beyond.

    Args:
        name: of the check.
        x: ascending.
        energy: of each.
        inside: from here down the energy has to rise.
        limit: least height.
        fall: a fall by less does not count.
        unit: of the energy.
    """
    if not np.isfinite(energy).all():
        return Check(name, "fail", None, limit, unit, "energies that are not finite")
    inner = x <= inside + 1e-9
    floor = float(energy[~inner].min(initial=float(energy[inner][-1])))
    climbing = energy[inner][::-1] - floor  # from `inside` down
    highest = np.maximum.accumulate(climbing)
    falls = np.flatnonzero(highest - climbing > fall)
    if not len(falls):
        return Check(name, "pass", float(highest[-1]), limit, unit)
    height = float(highest[falls[0]])
    where = float(x[inner][::-1][int(np.argmax(climbing[: falls[0]]))])
    result: Result = "fail" if height < limit else "warn"
    at = f"{where:.2f} Å" if unit == "eV" else f"a strain of {100 * abs(where):.0f} %"
    return Check(name, result, height, limit, unit, f"the energy falls beyond {at}")
