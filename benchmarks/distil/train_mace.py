"""Distil a small trained MACE, which tests use in place of a foundation model.

    python benchmarks/distil/labels.py labels.extxyz     # environment b
    python benchmarks/distil/train_mace.py labels.extxyz       # environment a, some minutes on one core

Writes tests/models/sio2_mace.model, a file in the vendor's own format, and beside it
sio2_mace.json with the student's error against the teacher on frames that it was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from blip_ft.adapters.mace import MACEBackbone

from blip_ft.backbone import Batch

TARGET = Path(__file__).parents[2] / "tests/models/sio2_mace.model"
EPOCHS, BATCH, RATE = 60, 4, 0.01
#: eV/atom and eV/Å, the weights of the two errors in the loss
ENERGY, FORCES = 0.003, 0.05


def architecture(frames: Sequence[Atoms]) -> dict[str, object]:
    """A MACE-MP-0 in small, with references and scale of the labels."""
    counts = np.array([[(a.numbers == z).sum() for z in (8, 14)] for a in frames])
    energies = np.array([a.get_potential_energy() for a in frames])
    references, *_ = np.linalg.lstsq(counts, energies, rcond=None)  # minimum norm: one composition
    forces = np.concatenate([a.get_forces() for a in frames])
    return {
        "class": "ScaleShiftMACE",
        "dtype": "float32",
        "r_max": 4.5,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls_first": "RealAgnosticResidualInteractionBlock",
        "interaction_cls": "RealAgnosticResidualInteractionBlock",
        "readout_cls": "NonLinearReadoutBlock",
        "num_interactions": 2,
        "num_elements": 2,
        "hidden_irreps": "16x0e+16x1o",
        "edge_irreps": None,
        "MLP_irreps": "16x0e",
        "gate": "silu",
        "atomic_energies": [references.tolist()],
        "avg_num_neighbors": 28.0,
        "atomic_numbers": [8, 14],
        "correlation": 2,
        "radial_type": "bessel",
        "radial_MLP": [32, 32],
        "atomic_inter_scale": [float(np.sqrt(np.mean(forces**2)))],
        "atomic_inter_shift": [0.0],
        "heads": ["Default"],
    }


def labels(frames: Sequence[Atoms]) -> tuple[torch.Tensor, torch.Tensor]:
    energy = torch.tensor([a.get_potential_energy() for a in frames])
    return energy, torch.tensor(np.concatenate([a.get_forces() for a in frames]), dtype=torch.float32)


def train(model: MACEBackbone, frames: Sequence[Atoms]) -> None:
    graphs = [model.graph(a) for a in frames]
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE, amsgrad=True)
    steps = EPOCHS * math.ceil(len(frames) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        total, started = 0.0, time.monotonic()
        for pick in np.array_split(rng.permutation(len(frames)), math.ceil(len(frames) / BATCH)):
            chosen = [frames[i] for i in pick]
            batch: Batch = model.collate(chosen, [graphs[i] for i in pick])
            energy, forces = labels(chosen)
            out = model(batch, stress=False, create_graph=True)
            error = (out.energy - energy) / batch.n_atoms / ENERGY
            loss = torch.nn.functional.huber_loss(error, torch.zeros_like(error))
            loss = loss + 10 * torch.nn.functional.huber_loss(out.forces / FORCES, forces / FORCES)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(
            f"epoch {epoch + 1}: loss {total / len(frames):.3f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )


def errors(model: MACEBackbone, frames: Sequence[Atoms]) -> dict[str, float]:
    energy, forces = [], []
    for atoms in frames:
        out = model(model.batch([atoms]), stress=False)
        energy.append(abs(out.energy.item() - atoms.get_potential_energy()) / len(atoms))
        forces.append(np.abs(out.forces.detach().numpy() - atoms.get_forces()).ravel())
    return {
        "n_frames": len(frames),
        "energy_mae_mev_per_atom": round(1000 * float(np.mean(energy)), 2),
        "force_mae_mev_per_ang": round(1000 * float(np.mean(np.concatenate(forces))), 1),
    }


def main(source: str) -> None:
    frames = read(source, ":")
    sets: dict[str, list[Atoms]] = {}
    for atoms in frames:
        sets.setdefault(atoms.info["set"], []).append(atoms)
    torch.manual_seed(0)
    model = MACEBackbone(architecture(sets["train"]))
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(sets['train'])} frames")
    train(model, sets["train"])
    TARGET.parent.mkdir(exist_ok=True)
    model.write_native(TARGET, {})
    about = {
        "teacher": "SevenNet-0 (11 July 2024)",
        "script": "benchmarks/distil/train_mace.py",
        "sha256": hashlib.sha256(TARGET.read_bytes()).hexdigest(),
        "bytes": TARGET.stat().st_size,
        "weights": sum(p.numel() for p in model.parameters()),
        "error_against_teacher": {name: errors(model, chosen) for name, chosen in sets.items()},
    }
    TARGET.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
