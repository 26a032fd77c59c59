"""What the scripts that distil a small model share: frames, references, training, errors, the record.

They differ in the architecture of the student and in how its file is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import read

from blip_ft.backbones.protocol import Backbone, Batch

#: folder of the distilled models
MODELS = Path(__file__).parents[2] / "tests/models"


@dataclass(frozen=True)
class Training:
    """How a student is trained, by Adam with one cycle of the learning rate."""

    epochs: int
    batch: int
    """frames per step"""
    rate: float
    """largest learning rate"""
    energy: float
    """eV/atom, with ``forces`` the weights of the two errors in the loss"""
    forces: float
    """eV/Å"""
    clip: float
    """largest norm of the gradient"""
    amsgrad: bool = False


def read_sets(source: str) -> dict[str, list[Atoms]]:
    """The frames that labels.py wrote, by the name of their set."""
    sets: dict[str, list[Atoms]] = {}
    for atoms in read(source, ":"):
        sets.setdefault(atoms.info["set"], []).append(atoms)
    return sets


def references(frames: Sequence[Atoms]) -> np.ndarray:
    """(2,) energies of O and Si that fit the labels, eV; of least norm, as there is one composition."""
    counts = np.array([[(a.numbers == z).sum() for z in (8, 14)] for a in frames])
    energies = np.array([a.get_potential_energy() for a in frames])
    fitted, *_ = np.linalg.lstsq(counts, energies, rcond=None)
    return fitted


def train(
    model: Backbone,
    weights: Sequence[torch.nn.Parameter],
    frames: Sequence[Atoms],
    how: Training,
    turn: Callable[[Batch, torch.Tensor, np.random.Generator], torch.Tensor] | None = None,
) -> None:
    """Fit energies and forces by a Huber loss.

    Args:
        model: the student, changed in place.
        weights: what is trained of it.
        frames: with the teacher's labels.
        how: epochs, rates and weights of the loss.
        turn: turns the structures of a batch in place, and returns their forces (atoms, 3) turned too.
    """
    graphs = [model.graph(a) for a in frames]
    optimiser = torch.optim.Adam(weights, lr=how.rate, amsgrad=how.amsgrad)
    per_epoch = math.ceil(len(frames) / how.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, how.rate, total_steps=how.epochs * per_epoch, pct_start=0.1
    )
    rng = np.random.default_rng(0)
    for epoch in range(how.epochs):
        total, started = 0.0, time.process_time()
        for pick in np.array_split(rng.permutation(len(frames)), per_epoch):
            chosen = [frames[i] for i in pick]
            batch = model.collate(chosen, [graphs[i] for i in pick])
            energy = torch.tensor([a.get_potential_energy() for a in chosen])
            forces = torch.tensor(np.concatenate([a.get_forces() for a in chosen]))
            if turn is not None:
                forces = turn(batch, forces, rng)
            out = model(batch, stress=False, create_graph=True)
            error = (out.energy - energy) / batch.n_atoms / how.energy
            loss = torch.nn.functional.huber_loss(error, torch.zeros_like(error))
            loss = loss + 10 * torch.nn.functional.huber_loss(
                out.forces / how.forces, forces.float() / how.forces
            )
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, how.clip)
            optimiser.step()
            schedule.step()
            total += loss.item() * len(chosen)
        seconds = time.process_time() - started
        print(f"epoch {epoch + 1}: loss {total / len(frames):.3f}, {seconds:.0f} s of CPU", flush=True)


def errors(model: Backbone, frames: Sequence[Atoms]) -> dict[str, float]:
    """Mean absolute errors against the labels, meV/atom and meV/Å."""
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


def n_weights(model: Backbone) -> int:
    """Number of weights, trained or not."""
    return sum(p.numel() for p in model.parameters())


def record(model: Backbone, target: Path, sets: dict[str, list[Atoms]], script: str, **more: str) -> None:
    """Write and print what is known of the model file ``target``, into a ``.json`` beside it."""
    about = {
        "teacher": "SevenNet-0 (11 July 2024)",
        "script": f"benchmarks/distil/{Path(script).name}",
        **more,
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "bytes": target.stat().st_size,
        "weights": n_weights(model),
        "error_against_teacher": {name: errors(model, chosen) for name, chosen in sets.items()},
    }
    target.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))
