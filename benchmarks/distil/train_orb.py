"""Distil a small trained Orb, which tests use in place of a foundation model.

    python benchmarks/distil/labels.py labels.extxyz
    python benchmarks/distil/train_orb.py labels.extxyz       # some minutes on one core

Writes tests/models/sio2_orb.ckpt, a state dict of the architecture of orb-v3-conservative-inf-omat in
small, and beside it sio2_orb.json with the student's error against the teacher, also on frames that it
was not trained on. Orb learns rotations: every frame is turned at random each time it is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from distillation import MODELS, Training, n_weights, read_sets, record, references, train
from scipy.spatial.transform import Rotation

from blip_ft.adapters.orb import vendor
from blip_ft.adapters.orb.backbone import ConservativeOrb
from blip_ft.backbones.protocol import Batch

TARGET = MODELS / "sio2_orb.ckpt"
ARCHITECTURE = "orb-v3-conservative-inf-omat"
SIZES = {
    "latent_dim": 24,
    "base_mlp_hidden_dim": 48,
    "base_mlp_depth": 2,
    "head_mlp_hidden_dim": 24,
    "head_mlp_depth": 1,
    "num_message_passing_steps": 3,
}
TRAINING = Training(epochs=60, batch=4, rate=4e-3, energy=0.01, forces=0.1, clip=50.0)


def student(frames: Sequence[Atoms]) -> ConservativeOrb:
    """Random weights, with the references of the labels."""
    torch.manual_seed(0)
    model = ConservativeOrb(ARCHITECTURE, SIZES)
    fitted = torch.tensor(references(frames), dtype=torch.float32)
    head = model.model.heads["energy"]
    with torch.no_grad():
        head.reference.linear.weight.view(-1)[[8, 14]] = fitted
        head.normalizer.bn.running_mean.zero_()
    return model


def turned(batch: Batch, forces: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Each structure turned at random: edge vectors in place, and the forces (atoms, 3) returned."""
    turn = torch.tensor(Rotation.random(len(batch.n_atoms), random_state=rng).as_matrix())
    batch.graph["edge_vec"] = torch.einsum("eij,ej->ei", turn[batch.rows["edge"]], batch.graph["edge_vec"])
    return torch.einsum("nij,nj->ni", turn[batch.structure], forces)


def main(source: str) -> None:
    sets = read_sets(source)
    model = student(sets["train"])
    print(f"{n_weights(model):,} weights, {len(sets['train'])} frames")
    weights = [p for name, p in model.named_parameters() if "reference" not in name]
    train(model, weights, sets["train"], TRAINING, turned)
    TARGET.parent.mkdir(exist_ok=True)
    vendor.write(model.model, TARGET, {})
    record(model, TARGET, sets, __file__, architecture=ARCHITECTURE)


if __name__ == "__main__":
    main(sys.argv[1])
