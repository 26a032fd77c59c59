"""Frequencies of phonons, by phonopy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from rich.console import Console

from blip_ft.errors import DataError, MissingBackendError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.properties.estimate import Estimate, Floats
from blip_ft.properties.members import Members, checked, members_of, over_draws
from blip_ft.properties.minima import FMAX, minimum


@dataclass(frozen=True)
class Phonons:
    """Harmonic frequencies at some wave vectors.

    Attributes:
        q_points: (m, 3) wave vectors in reciprocal lattice vectors.
        frequencies: (m, 3 n) THz, ascending; imaginary ones are negative.
        atoms: minimum of the mean model.
    """

    q_points: Floats
    frequencies: Estimate
    atoms: Atoms


def phonons(
    potential: BayesianPotential | Members,
    atoms: Atoms,
    *,
    supercell: tuple[int, int, int] = (2, 2, 2),
    q_points: Sequence[Sequence[float]] = ((0.0, 0.0, 0.0), (0.5, 0.0, 0.0)),
    displacement: float = 0.01,
    n_draws: int | None = None,
    fmax: float = FMAX,
    console: Console | None = None,
) -> Phonons:
    """Frequencies of the cell as given (not reduced to a primitive one), each draw at its own minimum and cell.

    Args:
        potential: with a posterior.
        atoms: the cell, near its minimum.
        supercell: repetitions in which forces are computed.
        q_points: wave vectors in reciprocal lattice vectors.
        displacement: Å.
        n_draws: K; by default those of the model.
        fmax: eV/Å, largest force at a minimum of the mean model.
        console: for progress; by default standard error.

    Raises:
        ImportError: phonopy is not installed.
        BlipError: as :func:`blip_ft.properties.relax`.
    """
    try:
        from phonopy import Phonopy
        from phonopy.structure.atoms import PhonopyAtoms
    except ImportError as error:
        raise MissingBackendError(
            "phonons need the package 'phonopy', which is not installed",
            remedy="pip install 'blip-ft[phonopy]'",
        ) from error
    wanted = np.asarray(q_points, dtype=float)
    if wanted.ndim != 2 or wanted.shape[1] != 3:
        raise DataError(f"wave vectors of shape {wanted.shape}, not (m, 3)", field="q_points")
    members = members_of(potential, n_draws)
    begin = checked(members, atoms, cell=True)

    def work(calculator: Calculator, start: Atoms | None) -> tuple[dict[str, Any], Atoms]:
        best = minimum(members, calculator, start or begin, cell=True, fmax=fmax, draw=start)
        cell = PhonopyAtoms(
            numbers=best.numbers, cell=best.cell.array, scaled_positions=best.get_scaled_positions()
        )
        # symmetry of a minimum that is converged to a force is not exact: every atom is moved for all draws alike
        model: Any = Phonopy(cell, np.diag(supercell), primitive_matrix="P", is_symmetry=False)
        model.generate_displacements(distance=displacement, is_plusminus=True)
        forces = []
        for moved in model.supercells_with_displacements:
            frame = Atoms(
                moved.numbers,
                scaled_positions=moved.scaled_positions,
                cell=moved.cell,
                pbc=True,
                info=best.info,
            )
            frame.calc = calculator
            forces.append(frame.get_forces())
        model.forces = np.array(forces)
        model.produce_force_constants()
        model.symmetrize_force_constants()
        model.run_qpoints(wanted)
        return {"frequencies": np.array(model.qpoints.frequencies)}, best

    found, best = over_draws(members, work, {"frequencies": "THz"}, "phonons", console)
    best.calc = None
    return Phonons(wanted, found["frequencies"], best)
