"""Tiny random UMA and eSEN models as inference checkpoints in the vendor's true format.

Every parameter is random, also those that the vendor starts at 0 or 1 (norms, biases), so that a term
that is left out shows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

UMA = "fairchem.core.models.uma"
NORM = "fairchem.core.modules.normalization"
#: eV; part of the element references, others are 0
REFERENCES = {1: -3.2, 6: -8.1, 8: -4.9, 14: -5.4}
#: scale of energies, forces and stress
RMSD = 4.0


def backbone_config(datasets: Sequence[str], **changes: Any) -> dict[str, Any]:
    """A small backbone; ``num_experts=0`` makes it an eSEN."""
    return {
        "model": f"{UMA}.escn_moe.eSCNMDMoeBackbone",
        "num_experts": 4,
        "moe_layer_type": "pytorch",
        "use_composition_embedding": True,
        "max_num_elements": 100,
        "sphere_channels": 8,
        "hidden_channels": 8,
        "edge_channels": 8,
        "num_distance_basis": 16,
        "lmax": 2,
        "mmax": 2,
        "num_layers": 1,
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
        "dataset_mapping": {d: d for d in datasets},
    } | changes


def uma_config(datasets: Sequence[str], **changes: Any) -> dict[str, Any]:
    """A conservative model whose head has one expert per data set, as UMA has."""
    return {
        "_target_": "fairchem.core.models.base.HydraModel",
        "model_id": "UMA-TINY-TEST",
        "pass_through_head_outputs": True,
        "supports_single_atoms": True,
        "backbone": backbone_config(datasets, **changes),
        "heads": {
            "energyandforcehead": {
                "module": f"{UMA}.escn_moe.DatasetSpecificMoEWrapper",
                "head_cls": f"{UMA}.escn_md.MLP_EFS_Head",
                "head_kwargs": {"wrap_property": False},
                "dataset_mapping": {d: d for d in datasets},
            }
        },
    }


def direct_config(datasets: Sequence[str], *, stress: bool = False, **changes: Any) -> dict[str, Any]:
    """A direct model: heads for energy, forces and perhaps stress, shared by all data sets."""
    heads = {"energy": "MLP_Energy_Head", "forces": "Linear_Force_Head"}
    if stress:
        heads["stress"] = "MLP_Stress_Head"
    options = {"num_experts": 0, "direct_forces": True, "regress_stress": stress, "direct_stress": stress}
    return uma_config(datasets, **options | changes) | {
        "heads": {
            name: {
                "module": f"{UMA}.escn_moe.DatasetSpecificSingleHeadWrapper",
                "head_cls": f"{UMA}.escn_md.{head}",
                "dataset_names": list(datasets),
            }
            for name, head in heads.items()
        }
    }


def task_config(dataset: str, prop: str, *, rmsd: float = RMSD, mean: float = 0.0) -> dict[str, Any]:
    """One task, as inference checkpoints describe it."""
    config: dict[str, Any] = {
        "_target_": "fairchem.core.units.mlip_unit.mlip_unit.Task",
        "name": f"{dataset}_{prop}",
        "level": "atom" if prop == "forces" else "system",
        "property": prop,
        "out_spec": {"dim": {"energy": [1], "forces": [3], "stress": [1, 9]}[prop], "dtype": "float32"},
        "normalizer": {"_target_": f"{NORM}.normalizer.Normalizer", "mean": mean, "rmsd": rmsd},
        "datasets": [dataset],
        "metrics": ["mae"],
    }
    if prop == "energy":
        table = np.zeros(101)
        table[list(REFERENCES)] = list(REFERENCES.values())
        config["element_references"] = {
            "_target_": f"{NORM}.element_references.ElementReferences",
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [table.tolist()]},
        }
    return config


def task_configs(
    datasets: Sequence[str], properties: Sequence[str] = ("energy", "forces", "stress")
) -> list[dict[str, Any]]:
    """All tasks of all data sets."""
    return [task_config(d, p) for d in datasets for p in properties]


def save(path: Path, model_config: dict[str, Any], tasks: list[dict[str, Any]], *, seed: int = 0) -> Path:
    """Write an inference checkpoint with random weights; the plain and the averaged ones differ."""
    import hydra
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hydra.utils.instantiate(copy.deepcopy(model_config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        average = torch.optim.swa_utils.AveragedModel(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    content = MLIPInferenceCheckpoint(
        model_config=model_config,
        model_state_dict=model.state_dict(),
        ema_state_dict=average.state_dict(),
        tasks_config=tasks,
    )
    torch.save(content, path)
    return path


def uma(path: Path, datasets: Sequence[str] = ("omat", "omol"), *, seed: int = 0, **changes: Any) -> Path:
    """A conservative model with two tasks and four experts; ``changes`` go into its backbone."""
    return save(path, uma_config(datasets, **changes), task_configs(datasets), seed=seed)


def direct(path: Path, *, stress: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A direct eSEN with one task, ``omol``."""
    properties = ("energy", "forces", "stress")[: 3 if stress else 2]
    return save(
        path, direct_config(["omol"], stress=stress, **changes), task_configs(["omol"], properties), seed=seed
    )
