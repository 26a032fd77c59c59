"""Forces and stress against finite differences of the energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from blip_ft.verify.models import evaluated
from blip_ft.verify.verdict import Check, at_most

#: Å: lengths of a displacement of all atoms together, and of a strain of all components together. The better of two
#: counts: short ones drown in the rounding of float32, long ones may cross a cutoff where an energy jumps (CHGNet's
#: at 3 Å), which is a matter of the energy's conservation
DISPLACEMENTS, STRAINS = (0.02, 0.002), (0.002, 0.0002)
#: random directions of each kind
DIRECTIONS = 3
#: eV/Å. Good fits are off by some 0.01: forces that are off by as much from their own energy are no derivative of it
FORCES_GOOD, FORCES_LIMIT = 1e-3, 1e-2
#: GPa. 0.1 is a volume that is off by 0.1 % in a hard solid, by 1 % in a soft one
VIRIAL_GOOD, VIRIAL_LIMIT = 0.01, 0.1
#: linear compression of the frame whose virial is compared, so that no stress vanishes
COMPRESSION = 0.04


def check_forces(calculator: Calculator, atoms: Atoms) -> Check:
    """Largest difference along random directions of all atoms, eV/Å."""
    rng, frame = np.random.default_rng(0), evaluated(atoms, calculator)
    forces = frame.get_forces().copy()
    worst = 0.0
    for _ in range(DIRECTIONS):
        u = rng.normal(size=forces.shape)
        u /= np.linalg.norm(u)

        def energy(step: float, u: NDArray[np.float64] = u) -> float:
            moved = evaluated(atoms, calculator)
            moved.positions += step * u
            return float(moved.get_potential_energy())

        worst = _largest(worst, _off(energy, DISPLACEMENTS, -float((forces * u).sum())))
    return at_most("forces", worst, good=FORCES_GOOD, limit=FORCES_LIMIT, unit="eV/Å")


def check_virial(calculator: Calculator, atoms: Atoms) -> Check | None:
    """Largest difference along random strains, GPa; ``None`` for a model without stress.

    Args:
        calculator: of the model.
        atoms: periodic in all directions.
    """
    squeezed = evaluated(atoms, calculator)
    squeezed.set_cell(atoms.cell * (1 - COMPRESSION), scale_atoms=True)
    try:
        stress = voigt_6_to_full_3x3_stress(squeezed.get_stress())
    except (PropertyNotImplementedError, NotImplementedError):
        return None
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(DIRECTIONS):
        u = rng.normal(size=(3, 3))
        u += u.T
        u /= np.linalg.norm(u)

        def energy(step: float, u: NDArray[np.float64] = u) -> float:
            strained = squeezed.copy()
            strained.calc = calculator
            strained.set_cell(squeezed.cell.array @ (np.eye(3) + step * u), scale_atoms=True)
            return float(strained.get_potential_energy())

        volume = squeezed.get_volume()
        off = _off(energy, STRAINS, volume * float((stress * u).sum()))
        worst = _largest(worst, off / volume / units.GPa)
    return at_most("virial", worst, good=VIRIAL_GOOD, limit=VIRIAL_LIMIT, unit="GPa")


def _largest(a: float, b: float) -> float:
    """The larger one; not a number stays so."""
    return float(np.maximum(a, b))


def _off(function: Callable[[float], float], steps: Sequence[float], expected: float) -> float:
    """How far the derivative at 0 is from what is expected, by the step that is best; not a number if any is none."""
    found = [abs(_slope(function, step) - expected) for step in steps]
    return float(np.min(found))


def _slope(function: Callable[[float], float], step: float) -> float:
    """Derivative at 0, of fourth order in the step."""
    inner, outer = (function(k * step) - function(-k * step) for k in (1, 2))
    return (8 * inner - outer) / (12 * step)
