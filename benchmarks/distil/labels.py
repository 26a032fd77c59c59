"""Label SiO2 frames by SevenNet-0, the teacher of the small models that tests use in place of foundations.

    python benchmarks/distil/labels.py OUT.extxyz        # environment b, about a minute

Training frames are strained and rattled crystals (quartz, cristobalite, tridymite, stishovite),
named ``train``; the frames that the student is judged on are those of the embedded set
``sio2_polymorphs``, under the names of its splits. Labels are the teacher's, never the set's own:
energy in eV, forces in eV/Å, stress in eV/Å^3.
"""

from __future__ import annotations

import sys

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.spacegroup import crystal

from blip_ft.adapters.sevennet.backbone import SevenNetBackbone
from blip_ft.data.read.sources import load_source

CRYSTALS = [
    (["Si", "O"], [(0.4697, 0, 2 / 3), (0.4135, 0.2669, 0.7858)], 154, [4.98, 4.98, 5.47, 90, 90, 120]),
    (["Si", "O"], [(0.3003, 0.3003, 0), (0.2392, 0.1044, 0.1787)], 92, [5.03, 5.03, 7.05, 90, 90, 90]),
    (
        ["Si", "O", "O"],
        [(1 / 3, 2 / 3, 0.062), (1 / 3, 2 / 3, 0.25), (0.5, 0, 0)],
        194,
        [5.15, 5.15, 8.4, 90, 90, 120],
    ),
    (["Si", "O"], [(0, 0, 0), (0.306, 0.306, 0)], 136, [4.22, 4.22, 2.69, 90, 90, 90]),
]
COPIES = (60, 60, 30, 30)
#: eV/Å; beyond it a frame says more of close contacts than of silica
MAX_FORCE = 25.0


def perturbed(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    """A copy under a strain of some 2 % with atoms moved by 0.03 to 0.2 Å."""
    e = rng.normal(0, 0.02, (3, 3))
    out = Atoms(atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=True)
    out.set_cell(out.cell.array @ (np.eye(3) * (1 + rng.normal(0, 0.02)) + (e + e.T) / 2), scale_atoms=True)
    out.positions += rng.normal(0, rng.uniform(0.03, 0.2), out.positions.shape)
    return out


def main(target: str) -> None:
    rng = np.random.default_rng(0)
    frames: list[tuple[str, Atoms]] = []
    for (symbols, sites, group, cell), copies in zip(CRYSTALS, COPIES, strict=True):
        ideal = crystal(symbols, sites, spacegroup=group, cellpar=cell)
        frames += [("train", perturbed(ideal, rng)) for _ in range(copies)]
    for split in ("train", "test", "tridymite", "stishovite", "hot_quartz"):
        for frame in load_source(f"sio2_polymorphs@{split}"):
            numbers, positions = frame["numbers"], frame["positions"]
            atoms = Atoms(numbers, positions=positions, cell=frame["cell"], pbc=True)
            frames.append((f"polymorphs_{split}", atoms))
    teacher = SevenNetBackbone.load("7net-0")
    out = []
    for name, atoms in frames:
        prediction = teacher(teacher.batch([atoms]))
        forces = prediction.forces.detach().numpy()
        if np.abs(forces).max() > MAX_FORCE and name == "train":
            continue
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=prediction.energy.item(),
            forces=forces,
            stress=prediction.stress[0].detach().numpy(),
        )
        atoms.info["set"] = name
        out.append(atoms)
    write(target, out)
    print(f"{len(out)} of {len(frames)} frames labelled")


if __name__ == "__main__":
    main(sys.argv[1])
