"""Steps of DIEP's energy where two sides of a triplet become equally long (docs/adapters.md).

    python benchmarks/diep_steps.py

Three atoms with a side of 2 Å and one that grows through 2 Å, 100 degrees between; quartz (9 atoms, rattled, seed 1)
along a straight path of 0.1 Å rms in a random direction (seed 0), in 200 pieces. A step is what the energy has moved
beyond the work of the forces.
Model fold1, as it is shipped, in float64.
"""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from cost import quartz

from blip_ft.backbones.protocol import Backbone
from blip_ft.backbones.registry import get_adapter

PIECES, LENGTH = 200, 0.1


def evaluated(model: Backbone, frames: list[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Energies (B,) and forces (B, n, 3) of structures of one size."""
    with torch.no_grad():
        out = model(model.batch(frames), stress=False)
    assert out.forces is not None
    return out.energy.numpy(), out.forces.numpy().reshape(len(frames), -1, 3)


def steps(model: Backbone, frames: list[Atoms]) -> np.ndarray:
    """(B - 1,) eV, what trapezoids of the forces leave of the energy's differences."""
    parts = [evaluated(model, frames[i : i + 25]) for i in range(0, len(frames), 25)]
    energy, forces = (np.concatenate(p) for p in zip(*parts, strict=True))
    moved = np.diff([a.positions for a in frames], axis=0)
    return np.diff(energy) + ((forces[1:] + forces[:-1]) / 2 * moved).sum((1, 2))


def three(symbols: str, distance: float) -> Atoms:
    """The first atom 2 Å from the second and ``distance`` from the third."""
    angle = np.deg2rad(100)
    third = (distance * np.cos(angle), distance * np.sin(angle), 0)
    return Atoms(symbols, positions=[(0, 0, 0), (2, 0, 0), third])


def main() -> None:
    """Measure and print."""
    model = get_adapter("diep").load("fold1").double()
    for symbols in ("OIrW", "OSiH", "OSiSi"):
        pair = [three(symbols, 2 - 2e-6), three(symbols, 2 + 2e-6)]
        _, forces = evaluated(model, pair)
        energy, force = 1e3 * steps(model, pair)[0], np.abs(np.diff(forces, axis=0)).max()
        print(f"{symbols}: energy {energy:.3f} meV, force {force:.3f} eV/Å")
    start = quartz(2)[1]
    way = np.random.default_rng(0).normal(size=start.positions.shape)
    way *= LENGTH / np.sqrt((way**2).sum(1).mean())
    path = [start.copy() for _ in range(PIECES + 1)]
    for i, atoms in enumerate(path):
        atoms.positions += way * i / PIECES
    found = np.abs(steps(model, path))
    found = found[found > 1e-5]
    print(
        f"quartz: {len(found)} steps above 0.01 meV, largest {1e3 * found.max():.2f}, sum {1e3 * found.sum():.2f} meV"
    )


if __name__ == "__main__":
    main()
