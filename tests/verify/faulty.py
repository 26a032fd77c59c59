"""Calculators with planted faults."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.morse import MorsePotential

from blip_ft.data.neighbours import pairs_within

KINDS = ("hole", "virial", "forces", "heat", "nan")


class Faulty(Calculator):
    """Another calculator with a fault.

    Args:
        base: the other one.
        kind: ``hole``: a Gaussian well of some eV in every pair at a short distance; ``virial``: the stress has the
            wrong sign; ``forces``: they are 1 % too large; ``heat``: they push along the velocities; ``nan``: energies
            of close atoms are not numbers.
        at: Å, of the hole.
        depth: eV, of the hole.
    """

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, base: Calculator, kind: str, *, at: float = 1.0, depth: float = 60.0) -> None:
        super().__init__()
        self.base, self.kind, self.at, self.depth = base, kind, at, depth

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        frame: Atoms = atoms.copy()
        frame.calc = self.base
        energy, forces = frame.get_potential_energy(), frame.get_forces().copy()
        stress = frame.get_stress() if frame.pbc.all() else None
        i, _, distance, vector = pairs_within(frame, 3.0)
        if self.kind == "hole":
            width = 0.1
            well = -self.depth * np.exp(-(((distance - self.at) / width) ** 2))
            energy += well.sum() / 2
            slope = -2 * (distance - self.at) / width**2 * well
            np.add.at(forces, i, (slope / distance)[:, None] * vector)
        elif self.kind == "virial" and stress is not None:
            stress = -stress
        elif self.kind == "forces":
            forces *= 1.01
        elif self.kind == "heat" and atoms.has("momenta"):
            forces += 0.2 * atoms.get_velocities()
        elif self.kind == "nan" and (distance < 0.7).any():
            energy = np.nan
        self.results = {"energy": float(energy), "free_energy": float(energy), "forces": forces}
        if stress is not None:
            self.results["stress"] = stress


def good() -> MorsePotential:
    """A crystal of copper atoms that nothing is wrong with."""
    return MorsePotential(epsilon=0.4, rho0=4.0, r0=2.55, rcut1=2.0, rcut2=2.6)


def holed() -> Faulty:
    """For ``calculator:MODULE:FUNCTION``."""
    return Faulty(good(), "hole", at=1.4)


def copper() -> Atoms:
    """A crystal, rattled and strained."""
    atoms = bulk("Cu", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=0)
    return atoms
