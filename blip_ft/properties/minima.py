"""Minima of the mean model and of each draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from rich.console import Console

from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.properties.estimate import Estimate
from blip_ft.properties.members import Members, checked, members_of, over_draws

#: eV/Å, largest force at a minimum of the mean model; that of a draw is smaller by the draws' amplitude
FMAX = 1e-3
#: steps of one minimisation
STEPS = 1000


@dataclass(frozen=True)
class Relaxed:
    """A structure at its minimum.

    Attributes:
        atoms: minimum of the mean model, without calculator.
        energy: eV.
        cell: (3, 3) lattice vectors, Å.
        cell_lengths_and_angles: (6,) Å and degrees.
        volume: Å^3; 0 without a cell.
        positions: (n, 3) Å. Where nothing fixes a translation or rotation, it is part of them.
    """

    atoms: Atoms
    energy: Estimate
    cell: Estimate
    cell_lengths_and_angles: Estimate
    volume: Estimate
    positions: Estimate


def relax(
    potential: BayesianPotential | Members,
    atoms: Atoms,
    *,
    cell: bool | None = None,
    n_draws: int | None = None,
    fmax: float = FMAX,
    console: Console | None = None,
) -> Relaxed:
    """Energy, cell and positions at the minimum, each draw at its own.

    Args:
        potential: with a posterior.
        atoms: where to start.
        cell: relax the cell too; by default where the structure is periodic in all directions.
        n_draws: K; by default those of the model.
        fmax: eV/Å, largest force at the minimum of the mean model.
        console: for progress; by default standard error.

    Raises:
        BlipError: no posterior, no stress, a structure that the model cannot describe, no minimum.
    """
    members = members_of(potential, n_draws)
    free = bool(atoms.pbc.all()) if cell is None else cell
    begin = checked(members, atoms, cell=free)

    def work(calculator: Calculator, start: Atoms | None) -> tuple[dict[str, Any], Atoms]:
        end = minimum(
            members, calculator, begin if start is None else start, cell=free, fmax=fmax, draw=start
        )
        return {
            "energy": end.get_potential_energy(),
            "cell": end.cell.array,
            "cell_lengths_and_angles": end.cell.cellpar(),
            "volume": abs(np.linalg.det(end.cell.array)),
            "positions": end.positions,
        }, end

    units = {
        "energy": "eV",
        "cell": "Å",
        "cell_lengths_and_angles": "Å, degrees",
        "volume": "Å^3",
        "positions": "Å",
    }
    found, end = over_draws(members, work, units, "relaxing", console)
    end.calc = None
    return Relaxed(end, **found)


def minimum(
    members: Members,
    calculator: Calculator,
    start: Atoms,
    *,
    cell: bool,
    fmax: float,
    draw: object | None,
) -> Atoms:
    """A copy at its minimum, with the calculator.

    Args:
        members: whose calculator it is.
        calculator: of the mean model or a draw.
        start: where to start.
        cell: relax the cell too.
        fmax: eV/Å, of the mean model.
        draw: anything but ``None`` for a draw: differences of draws are divided by their amplitude, so they are
            converged that much further.

    Raises:
        BlipError: not found in :data:`STEPS` steps.
    """
    moving: Atoms = start.copy()
    moving.calc = calculator
    wanted = fmax if draw is None else fmax * members.amplitude
    free: Any = FrechetCellFilter(moving) if cell else moving
    optimizer = BFGS(free, logfile=None)
    if not optimizer.run(fmax=wanted, steps=STEPS):
        force = float(np.abs(moving.get_forces()).max())
        raise BlipError(
            f"no minimum after {STEPS} steps: a force of {force:.1e} eV/Å is left of {start.get_chemical_formula()}",
            remedy="start nearer to a minimum, or allow a larger fmax",
        )
    return moving
