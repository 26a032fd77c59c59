"""The structure that a simulation starts from: read, repeated, and refused where dynamics would make no sense."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms, FixCartesian
from ase.data import chemical_symbols, covalent_radii
from ase.neighborlist import neighbor_list

from blip_ft.backbones.protocol import Backbone
from blip_ft.data.read.plan import plan
from blip_ft.data.read.raw import check_geometry
from blip_ft.data.read.sources import unchecked_frames
from blip_ft.errors import DataError
from blip_ft.simulate.options import Dynamics

#: atoms closer than this share of the sum of their covalent radii lie on top of each other
OVERLAP = 0.5


def read_start(source: str, repeat: Sequence[int] = (1, 1, 1)) -> Atoms:
    """The one structure of a source, without its results.

    Args:
        source: as for predictions: a file, set, with ``@selector``.
        repeat: so many copies of the cell in each direction.

    Raises:
        DataError: missing or damaged, or not one structure; a repeated direction that is not periodic.
    """
    frames = list(
        islice((f for r in plan(source, labels=False) for f in unchecked_frames(r, broken=False)), 2)
    )
    if len(frames) != 1:
        raise DataError(
            "holds no structure"
            if not frames
            else "holds several structures, and a simulation starts from one",
            file=source,
            remedy="choose one: add @N:N+1 to the name, for the first @0:1"
            if frames
            else "give another file",
        )
    (raw,) = frames
    check_geometry(raw)
    if raw.atoms is None:
        atoms = Atoms(numbers=raw.numbers, positions=raw.positions, cell=raw.cell, pbc=raw.pbc)
    else:
        atoms = raw.atoms.copy()
    if any(n != 1 and not p for n, p in zip(repeat, atoms.pbc, strict=True)):
        raise DataError(
            "a direction that is not periodic cannot be repeated",
            file=source,
            field="--repeat",
            remedy="give 1 there",
        )
    return atoms * tuple(repeat) if tuple(repeat) != (1, 1, 1) else atoms


def check_start(
    atoms: Atoms, dynamics: Dynamics, backbone: Backbone, *, file: str, thin_cell: bool = False
) -> None:
    """Refuse a structure that the model cannot describe or that dynamics cannot be run with.

    Args:
        atoms: the structure.
        dynamics: what is to be run.
        backbone: of the model.
        file: for messages.
        thin_cell: allow cells in which atoms see their own images.

    Raises:
        DataError: names the reason and the remedy.
    """
    backbone.check(atoms, file=file)
    if len(atoms) < 2:
        raise DataError(
            "one atom has nothing to move against", file=file, remedy="--repeat 2 2 2, or another structure"
        )
    _check_overlap(atoms, file)
    if dynamics.ensemble == "npt" and not atoms.pbc.all():
        raise DataError(
            "constant pressure needs a structure that is periodic in all directions: others have no stress",
            file=file,
            field="--ensemble",
            remedy="--ensemble nvt for a slab or molecule",
        )
    cutoff, thickness = backbone.cutoff, _thickness(atoms)
    if not thin_cell and min(thickness) < cutoff:
        needed = [max(1, int(np.ceil(cutoff / t))) for t in thickness]
        raise DataError(
            f"the cell is {min(thickness):.2f} Å thick and the model looks {cutoff:.2f} Å far: atoms would move in "
            "step with their own images",
            file=file,
            field="cell",
            remedy=f"--repeat {' '.join(map(str, needed))}, or --thin-cell if that is meant",
        )
    if atoms.constraints:
        if not all(isinstance(c, FixAtoms | FixCartesian) for c in atoms.constraints):
            raise DataError(
                "only fixed atoms are kept as constraints",
                file=file,
                field="constraints",
                remedy="remove the others",
            )
        if dynamics.ensemble == "npt" or (dynamics.ensemble, dynamics.thermostat) == ("nvt", "nose-hoover"):
            raise DataError(
                "fixed atoms need nve or Langevin dynamics",
                file=file,
                field="constraints",
                remedy="--ensemble nvt --thermostat langevin",
            )
    if dynamics.temperature is None and not atoms.get_momenta().any():
        raise DataError(
            "the structure has no momenta, and there is no temperature to draw them from",
            file=file,
            field="--temperature",
            remedy="add --temperature 300",
        )


def with_velocities(atoms: Atoms, dynamics: Dynamics) -> None:
    """Give a structure without momenta those of its temperature, in place.

    Maxwell-Boltzmann, without motion of the whole, scaled to the temperature exactly. Of fixed components none.
    """
    if atoms.get_momenta().any():
        return
    assert dynamics.temperature is not None
    free, masses = free_components(atoms), atoms.get_masses()[:, None]
    rng = np.random.default_rng([dynamics.seed, 0])
    momenta = rng.standard_normal((len(atoms), 3)) * np.sqrt(masses) * free
    if free.all():
        momenta -= masses * momenta.sum(axis=0) / masses.sum()
    kinetic = float((momenta**2 / masses).sum() / 2)
    wanted = degrees_of_freedom(atoms) * units.kB * dynamics.temperature / 2
    atoms.set_momenta(momenta * np.sqrt(wanted / kinetic), apply_constraint=False)


def free_components(atoms: Atoms) -> np.ndarray:
    """(n, 3) whether a component may move."""
    free = np.ones((len(atoms), 3), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            free[constraint.get_indices()] = False
        elif isinstance(constraint, FixCartesian):
            free[constraint.get_indices()] &= ~np.asarray(constraint.mask, dtype=bool)
    return free


def degrees_of_freedom(atoms: Atoms) -> int:
    """Components that may move, less the three of the whole where nothing is fixed."""
    free = free_components(atoms)
    return int(free.sum()) - (3 if free.all() else 0)


def digest(atoms: Atoms) -> str:
    """What identifies a start."""
    parts = (
        atoms.numbers,
        atoms.positions,
        atoms.cell.array,
        atoms.pbc,
        atoms.get_momenta(),
        atoms.get_masses(),
    )
    sha = hashlib.sha256()
    for part in (*parts, free_components(atoms)):
        sha.update(np.ascontiguousarray(part).tobytes())
    sha.update(repr(sorted((k, repr(v)) for k, v in atoms.info.items() if k in ("charge", "spin"))).encode())
    return sha.hexdigest()


def _check_overlap(atoms: Atoms, file: str) -> None:
    """Raise where atoms lie on top of each other."""
    radii = covalent_radii[atoms.numbers]
    i, j, d = neighbor_list("ijd", atoms, list(OVERLAP * radii))
    if len(i):
        worst = int(np.argmin(d))
        a, b = int(i[worst]), int(j[worst])
        pair = f"{chemical_symbols[atoms.numbers[a]]} and {chemical_symbols[atoms.numbers[b]]}"
        raise DataError(
            f"atoms {a} and {b} ({pair}) are {d[worst]:.2f} Å apart",
            file=file,
            field="positions",
            remedy="remove one, or relax the structure; wrong units or a wrong cell look like this too",
        )


def _thickness(atoms: Atoms) -> list[float]:
    """Distances of opposite faces of the cell, Å; infinite where not periodic."""
    cell = atoms.cell.complete()
    heights = cell.volume / np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
    return [float(h) if p else np.inf for h, p in zip(heights, atoms.pbc, strict=True)]
