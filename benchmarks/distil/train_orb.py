"""Distil a small trained Orb, which tests use in place of a foundation model.

    python benchmarks/distil/labels.py labels.extxyz
    python benchmarks/distil/train_orb.py labels.extxyz       # some minutes on one core

Writes tests/models/sio2_orb.ckpt, a state dict of the architecture of orb-v3-conservative-inf-omat in
small, and beside it sio2_orb.json with the student's error against the teacher, also on frames that it
was not trained on. Orb learns rotations: every frame is turned at random each time it is seen.
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
from blip_ft.adapters import _orb as vendor
from blip_ft.adapters.orb import ConservativeOrb
from scipy.spatial.transform import Rotation

TARGET = Path(__file__).parents[2] / "tests/models/sio2_orb.ckpt"
ARCHITECTURE = "orb-v3-conservative-inf-omat"
SIZES = {
    "latent_dim": 24,
    "base_mlp_hidden_dim": 48,
    "base_mlp_depth": 2,
    "head_mlp_hidden_dim": 24,
    "head_mlp_depth": 1,
    "num_message_passing_steps": 3,
}
EPOCHS, BATCH, RATE = 60, 4, 4e-3
#: eV/atom and eV/Å, the weights of the two errors in the loss
ENERGY, FORCES = 0.01, 0.1


def student(frames: Sequence[Atoms]) -> ConservativeOrb:
    """Random weights, with the references of the labels."""
    torch.manual_seed(0)
    model = ConservativeOrb(ARCHITECTURE, SIZES)
    counts = np.array([[(a.numbers == z).sum() for z in (8, 14)] for a in frames])
    energies = np.array([a.get_potential_energy() for a in frames])
    references, *_ = np.linalg.lstsq(counts, energies, rcond=None)  # minimum norm: one composition
    head = model.model.heads["energy"]
    with torch.no_grad():
        head.reference.linear.weight.view(-1)[[8, 14]] = torch.tensor(references, dtype=torch.float32)
        head.normalizer.bn.running_mean.zero_()
    return model


def train(model: ConservativeOrb, frames: Sequence[Atoms]) -> None:
    graphs = [model.graph(a) for a in frames]
    weights = [p for name, p in model.named_parameters() if "reference" not in name]
    optimiser = torch.optim.Adam(weights, lr=RATE)
    steps = EPOCHS * math.ceil(len(frames) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        total, started = 0.0, time.monotonic()
        for pick in np.array_split(rng.permutation(len(frames)), math.ceil(len(frames) / BATCH)):
            chosen = [frames[i] for i in pick]
            batch = model.collate(chosen, [graphs[i] for i in pick])
            turn = torch.tensor(Rotation.random(len(pick), random_state=rng).as_matrix())
            batch.graph["edge_vec"] = torch.einsum(
                "eij,ej->ei", turn[batch.rows["edge"]], batch.graph["edge_vec"]
            )
            energy = torch.tensor([a.get_potential_energy() for a in chosen])
            forces = torch.tensor(np.concatenate([a.get_forces() for a in chosen]))
            forces = torch.einsum("nij,nj->ni", turn[batch.structure], forces).float()
            out = model(batch, stress=False, create_graph=True)
            error = (out.energy - energy) / batch.n_atoms / ENERGY
            loss = torch.nn.functional.huber_loss(error, torch.zeros_like(error))
            loss = loss + 10 * torch.nn.functional.huber_loss(out.forces / FORCES, forces / FORCES)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 50.0)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(
            f"epoch {epoch + 1}: loss {total / len(frames):.3f}, {time.monotonic() - started:.0f} s",
            flush=True,
        )


def errors(model: ConservativeOrb, frames: Sequence[Atoms]) -> dict[str, float]:
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
    sets: dict[str, list[Atoms]] = {}
    for atoms in read(source, ":"):
        sets.setdefault(atoms.info["set"], []).append(atoms)
    model = student(sets["train"])
    n_weights = sum(p.numel() for p in model.parameters())
    print(f"{n_weights:,} weights, {len(sets['train'])} frames")
    train(model, sets["train"])
    TARGET.parent.mkdir(exist_ok=True)
    vendor.write(model.model, TARGET, {})
    about = {
        "teacher": "SevenNet-0 (11 July 2024)",
        "script": "benchmarks/distil/train_orb.py",
        "architecture": ARCHITECTURE,
        "sha256": hashlib.sha256(TARGET.read_bytes()).hexdigest(),
        "bytes": TARGET.stat().st_size,
        "weights": n_weights,
        "error_against_teacher": {name: errors(model, chosen) for name, chosen in sets.items()},
    }
    TARGET.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
