"""Distil a small trained UMA, which tests use in place of a foundation model.

    python benchmarks/distil/labels.py labels.extxyz
    python benchmarks/distil/uma.py labels.extxyz       # some minutes on one core

Writes tests/models/sio2_uma.pt, an inference checkpoint with the tasks of UMA of which only ``omat`` is
trained, and beside it sio2_uma.json with the student's error against the teacher, also on frames that
it was not trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from distillation import MODELS, Training, n_weights, read_sets, record, references, train

from blip_ft.adapters.fairchem.backbone import FairchemBackbone

TARGET = MODELS / "sio2_uma.pt"
TASKS = ("oc20", "odac", "omat", "omc", "omol")
TRAINING = Training(epochs=40, batch=6, rate=6e-3, energy=0.01, forces=0.1, clip=50.0)
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


def task_configs(energies: Sequence[float], rmsd: float) -> list[dict[str, object]]:
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
                    "element_references": {"_target_": "torch.DoubleTensor", "_args_": [list(energies)]},
                }
            out.append(config)
    return out


def student(frames: Sequence[Atoms]) -> FairchemBackbone:
    """Random weights, with references and scale of the labels."""
    energies = np.zeros(100)
    energies[[8, 14]] = references(frames)
    rmsd = float(np.sqrt(np.mean(np.concatenate([a.get_forces() for a in frames]) ** 2)))
    torch.manual_seed(0)
    config = {
        "model": model_config(),
        "tasks": task_configs(energies.tolist(), rmsd),
        "task": "omat",
        "charge": 0,
        "spin": 0,
        "origin": {},
    }
    backbone = FairchemBackbone.from_config(config)
    assert isinstance(backbone, FairchemBackbone)
    return backbone


def main(source: str) -> None:
    sets = read_sets(source)
    model = student(sets["train"])
    print(f"{n_weights(model):,} weights, {len(sets['train'])} frames")
    train(model, [p for p in model.parameters() if p.requires_grad], sets["train"], TRAINING)
    TARGET.parent.mkdir(exist_ok=True)
    model.write_native(TARGET, {})
    record(model, TARGET, sets, __file__, task="omat")


if __name__ == "__main__":
    main(sys.argv[1])
