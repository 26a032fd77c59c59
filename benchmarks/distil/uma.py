"""Distil a small trained UMA, which tests use in place of a foundation model.

    python benchmarks/distil/labels.py labels.extxyz
    python benchmarks/distil/uma.py labels.extxyz       # some minutes on one core

Writes tests/models/sio2_uma.pt, an inference checkpoint with the tasks of UMA of which only ``omat`` is
trained, and beside it sio2_uma.json with the student's error against the teacher, also on frames that
it was not trained on.
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
from blip_ft.adapters.fairchem import FairchemBackbone

TARGET = Path(__file__).parents[2] / "tests/models/sio2_uma.pt"
TASKS = ("oc20", "odac", "omat", "omc", "omol")
EPOCHS, BATCH, RATE = 40, 6, 6e-3
#: eV/atom and eV/Å, the weights of the two errors in the loss
ENERGY, FORCES = 0.01, 0.1
UMA = "fairchem.core.models.uma"
NORMALISATION = "fairchem.core.modules.normalization"


def model_config() -> dict[str, object]:
    """UMA in small: mixtures of four experts, a head with one expert per task."""
    datasets = {task: task for task in TASKS}
    return {
        "_target_": "fairchem.core.models.base.HydraModel",
        "model_id": "UMA-SIO2-DISTILLED",
        "pass_through_head_outputs": True,
        "supports_single_atoms": True,
        "backbone": {
            "model": f"{UMA}.escn_moe.eSCNMDMoeBackbone",
            "num_experts": 4,
            "moe_layer_type": "pytorch",
            "use_composition_embedding": True,
            "max_num_elements": 100,
            "sphere_channels": 16,
            "hidden_channels": 16,
            "edge_channels": 16,
            "num_distance_basis": 32,
            "lmax": 2,
            "mmax": 2,
            "num_layers": 2,
            "cutoff": 5.0,
            "max_neighbors": 300,
            "otf_graph": True,
            "always_use_pbc": False,
            "direct_forces": False,
            "regress_forces": True,
            "regress_stress": True,
            "norm_type": "rms_norm_sh",
            "act_type": "gate",
            "ff_type": "spectral",
            "chg_spin_emb_type": "rand_emb",
            "dataset_mapping": datasets,
        },
        "heads": {
            "energyandforcehead": {
                "module": f"{UMA}.escn_moe.DatasetSpecificMoEWrapper",
                "head_cls": f"{UMA}.escn_md.MLP_EFS_Head",
                "head_kwargs": {"wrap_property": False},
                "dataset_mapping": datasets,
            }
        },
    }


def task_configs(references: Sequence[float], rmsd: float) -> list[dict[str, object]]:
    """Energy, forces and stress of every task, in the scale of the labels."""
    out = []
    for task in TASKS:
        for prop, dim in (("energy", [1]), ("forces", [3]), ("stress", [1, 9])):
            config: dict[str, object] = {
                "_target_": "fairchem.core.units.mlip_unit.mlip_unit.Task",
                "name": f"{task}_{prop}",
                "level": "atom" if prop == "forces" else "system",
                "property": prop,
                "out_spec": {"dim": dim, "dtype": "float32"},
                "normalizer": {
                    "_target_": f"{NORMALISATION}.normalizer.Normalizer",
                    "mean": 0.0,
                    "rmsd": rmsd,
                },
                "datasets": [task],
                "metrics": ["mae"],
            }
            if prop == "energy":
                config["element_references"] = {
                    "_target_": f"{NORMALISATION}.element_references.ElementReferences",
                    "element_references": {"_target_": "torch.DoubleTensor", "_args_": [list(references)]},
                }
            out.append(config)
    return out


def student(frames: Sequence[Atoms]) -> FairchemBackbone:
    """Random weights, with references and scale of the labels."""
    counts = np.array([[(a.numbers == z).sum() for z in (8, 14)] for a in frames])
    energies = np.array([a.get_potential_energy() for a in frames])
    fitted, *_ = np.linalg.lstsq(counts, energies, rcond=None)  # minimum norm: one composition
    references = np.zeros(100)
    references[[8, 14]] = fitted
    rmsd = float(np.sqrt(np.mean(np.concatenate([a.get_forces() for a in frames]) ** 2)))
    torch.manual_seed(0)
    config = {
        "model": model_config(),
        "tasks": task_configs(references.tolist(), rmsd),
        "task": "omat",
        "charge": 0,
        "spin": 0,
        "origin": {},
    }
    backbone = FairchemBackbone.from_config(config)
    assert isinstance(backbone, FairchemBackbone)
    return backbone


def train(model: FairchemBackbone, frames: Sequence[Atoms]) -> None:
    graphs = [model.graph(a) for a in frames]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=RATE)
    steps = EPOCHS * math.ceil(len(frames) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(0)
    for epoch in range(EPOCHS):
        total, started = 0.0, time.process_time()
        for pick in np.array_split(rng.permutation(len(frames)), math.ceil(len(frames) / BATCH)):
            chosen = [frames[i] for i in pick]
            batch = model.collate(chosen, [graphs[i] for i in pick])
            energy = torch.tensor([a.get_potential_energy() for a in chosen])
            forces = torch.tensor(np.concatenate([a.get_forces() for a in chosen])).float()
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
        seconds = time.process_time() - started
        print(f"epoch {epoch + 1}: loss {total / len(frames):.3f}, {seconds:.0f} s of CPU", flush=True)


def errors(model: FairchemBackbone, frames: Sequence[Atoms]) -> dict[str, float]:
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
    model.write_native(TARGET, {})
    about = {
        "teacher": "SevenNet-0 (11 July 2024)",
        "script": "benchmarks/distil/uma.py",
        "task": "omat",
        "sha256": hashlib.sha256(TARGET.read_bytes()).hexdigest(),
        "bytes": TARGET.stat().st_size,
        "weights": n_weights,
        "error_against_teacher": {name: errors(model, chosen) for name, chosen in sets.items()},
    }
    TARGET.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
