"""Unlabelled structures that a user might simulate: his own, or perturbed training frames.

A posterior only spreads along directions that some structure excites. Training frames near
equilibrium do not excite what matters in another phase or under pressure, so the directions are
also taken from these context frames. They need no labels. ``data.context`` names structures of the
user; beside them stand strained, sheared and rattled training frames (``posterior.perturbed_share``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ase import Atoms

from blip_ft.backbones import electrons
from blip_ft.backbones.protocol import Backbone
from blip_ft.config import DataConfig
from blip_ft.data.frame import to_atoms

#: user's structures that are taken per training frame, and at least; each costs as much as a
#: training frame
MOST, AT_LEAST = 1.0, 32

#: linear strain, uniform in this range
STRAIN = (-0.12, 0.08)
#: std of the diagonal components of a random symmetric strain; the others have 1/sqrt(2) of it
SHEAR = 0.06
#: std of the displacements, uniform in this range, Å
RATTLE = (0.05, 0.3)
#: closest approach allowed, as a share of the closest approach before, to keep energies finite
CLOSEST = 0.6


def load_context(
    config: DataConfig, backbone: Backbone, n_train: int, say: Callable[[str], object]
) -> list[Atoms]:
    """The user's unlabelled structures; none where the recipe names none.

    Args:
        config: the recipe's ``data``.
        backbone: must know their elements.
        n_train: training frames; of more structures than that (or 32) an even selection is taken, as
            the posterior's matrix grows with their number.
        say: is told how many were taken.

    Raises:
        DataError: they cannot be read, or hold an element that the model does not know.
    """
    if config.context is None:
        return []
    from blip_ft.data.split.splits import load_role

    rows = load_role(config, config.context, labels=False)
    most = max(AT_LEAST, round(MOST * n_train))
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int))
    frames = []
    for row in rows.select(chosen.tolist()):
        frames.append(to_atoms(row, labels=False))
        backbone.check(frames[-1], file=row["source"], frame=row["frame"])
    say(f"context: {len(frames)} of {len(rows)} unlabelled structures")
    return frames


def perturbed(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """A strained, sheared and rattled copy without labels, of the same charge and spin.

    Structures without a cell are scaled about their centre instead. A displacement that brings two
    atoms closer than ``CLOSEST`` of the closest approach before is halved until it does not.
    """
    bare = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.info = electrons.own(atoms.info)
    e = rng.normal(0.0, SHEAR, (3, 3))
    deformation = np.eye(3) * (1 + rng.uniform(*STRAIN)) + (e + e.T) / 2
    displacement = rng.normal(0.0, rng.uniform(*RATTLE), bare.positions.shape)
    limit = CLOSEST * _closest(bare)
    while True:
        out: Atoms = bare.copy()
        if bare.pbc.any() and bare.cell.rank == 3:
            out.set_cell(bare.cell.array @ deformation, scale_atoms=True)
        else:
            centre = bare.positions.mean(axis=0)
            out.positions = centre + (bare.positions - centre) @ deformation
        out.positions += displacement
        if _closest(out) >= limit or np.abs(displacement).max(initial=0.0) < 1e-3:
            return out
        displacement *= 0.5
        deformation = 0.5 * (deformation + np.eye(3))


def make_context(frames: Sequence[Atoms], count: int, seed: int) -> list[Atoms]:
    """``count`` perturbed copies of frames drawn without replacement as far as they reach."""
    if count == 0:
        return []
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(frames)) for _ in range(-(-count // len(frames)))])
    return [perturbed(frames[int(i)], rng) for i in order[:count]]


def _closest(atoms: Atoms) -> float:
    """Shortest distance between two atoms, images included, Å; infinite for a lone atom."""
    from ase.neighborlist import neighbor_list

    distances = neighbor_list("d", atoms, 3.0)
    return float(distances.min()) if len(distances) else 3.0
