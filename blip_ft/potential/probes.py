"""Made-up structures on which two forms of one model are compared, where there are no frames at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

if TYPE_CHECKING:
    from blip_ft.potential.bayesian import BayesianPotential


def probe_structures(elements: Sequence[int]) -> list[Atoms]:
    """A sheared, rattled crystal with every element at least once, and a free cluster cut from it.

    Neighbours are about 1.2 covalent bond lengths apart. Made up, because a model folder holds no
    frames and the comparison needs none that make sense.
    """
    side = max(2, int(np.ceil(len(elements) ** (1 / 3) - 1e-9)))
    numbers = np.resize(np.asarray(elements), side**3)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    spacing = 2.4 * float(np.max(covalent_radii[numbers]))
    rng = np.random.default_rng(0)
    shear = np.array([[1.0, 0.05, -0.03], [0.0, 0.97, 0.04], [0.0, 0.0, 1.02]])
    positions = spacing * grid @ shear + rng.normal(0, 0.04 * spacing, (side**3, 3))
    crystal = Atoms(numbers, positions=positions, cell=spacing * side * shear, pbc=True)
    cluster = Atoms(numbers[:5], positions=positions[:5])
    return [crystal, cluster]


def probes_of(potential: BayesianPotential, most: int | None = None) -> list[Atoms]:
    """:func:`probe_structures` of the elements that a potential was trained on, as far as it knows them.

    Args:
        potential: not changed.
        most: number of elements, at most.

    Returns:
        Structures that have the charge and spin of the model's options, or 0 and 1 where it wants them and has none.
    """
    elements = sorted(potential.references)[:most] or sorted(potential.backbone.elements)[: most or 8]
    system = {"charge": 0, "spin": 1}
    chosen = potential.backbone.choices()
    frames = probe_structures(elements)
    for atoms in frames:
        atoms.info.update(
            {k: v if chosen[k] is None else chosen[k] for k, v in system.items() if k in chosen}
        )
    return frames
