"""Distil a small trained MACE, which tests use in place of a foundation model.

    python benchmarks/distil/labels.py labels.extxyz     # environment b
    python benchmarks/distil/train_mace.py labels.extxyz       # environment a, some minutes on one core

Writes tests/models/sio2_mace.model, a file in the vendor's own format, and beside it
sio2_mace.json with the student's error against the teacher on frames that it was not trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from distillation import MODELS, Training, n_weights, read_sets, record, references, train

from blip_ft.adapters.mace.backbone import MACEBackbone

TARGET = MODELS / "sio2_mace.model"
TRAINING = Training(epochs=60, batch=4, rate=0.01, energy=0.003, forces=0.05, clip=100.0, amsgrad=True)


def architecture(frames: Sequence[Atoms]) -> dict[str, object]:
    """A MACE-MP-0 in small, with references and scale of the labels."""
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
        "atomic_energies": [references(frames).tolist()],
        "avg_num_neighbors": 28.0,
        "atomic_numbers": [8, 14],
        "correlation": 2,
        "radial_type": "bessel",
        "radial_MLP": [32, 32],
        "atomic_inter_scale": [float(np.sqrt(np.mean(forces**2)))],
        "atomic_inter_shift": [0.0],
        "heads": ["Default"],
    }


def main(source: str) -> None:
    sets = read_sets(source)
    torch.manual_seed(0)
    model = MACEBackbone(architecture(sets["train"]))
    print(f"{n_weights(model):,} weights, {len(sets['train'])} frames")
    train(model, list(model.parameters()), sets["train"], TRAINING)
    TARGET.parent.mkdir(exist_ok=True)
    model.write_native(TARGET, {})
    record(model, TARGET, sets, __file__)


if __name__ == "__main__":
    main(sys.argv[1])
