"""Structures that every adapter must be able to describe, and the vendors' calculators of a contract's models."""

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.spacegroup import crystal

from blip_ft.backbones.protocol import Backbone


@pytest.fixture(scope="class")
def native_stock(native: Backbone) -> Any:
    """The vendor's calculator on the weights of the class's ``native``, in the vendor's own precision."""
    return native.stock_calculator()


@pytest.fixture(scope="class")
def stock(backbone: Backbone) -> Any:
    """The vendor's calculator on the weights of the class's ``backbone``, in float64."""
    return backbone.stock_calculator()


@pytest.fixture(scope="session")
def quartz() -> Atoms:
    """Alpha quartz, 9 atoms, rattled and sheared, so that no symmetry is left."""
    atoms = crystal(
        ["Si", "O"],
        [(0.4697, 0.0, 2 / 3), (0.4135, 0.2669, 0.7858)],
        spacegroup=154,
        cellpar=[4.9134, 4.9134, 5.4052, 90, 90, 120],
    )
    strain = np.array([[0.02, 0.01, -0.01], [0.0, -0.03, 0.02], [0.0, 0.0, 0.01]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    atoms.rattle(0.08, seed=1)
    return Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=True)


@pytest.fixture(scope="session")
def carbide() -> Atoms:
    """Silicon carbide, 2 atoms in a primitive cell that is smaller than any cutoff."""
    atoms = bulk("SiC", "zincblende", a=4.36)
    atoms.rattle(0.1, seed=2)
    return atoms


@pytest.fixture(scope="session")
def ethanol() -> Atoms:
    """A molecule without a cell."""
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=3)
    return atoms


@pytest.fixture(scope="session")
def boxed_atom() -> Atoms:
    """One atom in a large periodic box: no edges."""
    return Atoms("O", positions=[(1.0, 2.0, 3.0)], cell=[20.0, 21.0, 22.0], pbc=True)


@pytest.fixture(scope="session")
def periodic_atom() -> Atoms:
    """One atom per cell: all its neighbours are its own images."""
    return Atoms("Si", cell=[[0.0, 1.9, 2.0], [1.95, 0.0, 1.9], [1.9, 2.0, 0.0]], pbc=True)


@pytest.fixture(scope="session")
def slab() -> Atoms:
    """Two layers of carbide, periodic in two directions, with an open third one of no length."""
    atoms = bulk("SiC", "zincblende", a=4.36, cubic=True)
    atoms.rattle(0.05, seed=4)
    cell = atoms.cell.array.copy()
    cell[2] = 0.0
    return Atoms(atoms.numbers, positions=atoms.positions, cell=cell, pbc=[True, True, False])


@pytest.fixture(scope="session")
def structures(
    quartz: Atoms,
    carbide: Atoms,
    ethanol: Atoms,
    boxed_atom: Atoms,
    periodic_atom: Atoms,
    slab: Atoms,
) -> dict[str, Atoms]:
    """All of them by name; sizes, boundary conditions and elements are mixed."""
    return {
        "quartz": quartz,
        "carbide": carbide,
        "ethanol": ethanol,
        "boxed_atom": boxed_atom,
        "periodic_atom": periodic_atom,
        "slab": slab,
    }
