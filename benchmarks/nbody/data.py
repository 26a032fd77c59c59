"""Five charged bodies: positions and velocities now, positions 1,000 steps later.

The system of Satorras, Hoogeboom and Welling (ICML 2021; arXiv 2102.09844), written anew: charges of +-1, unit masses,
positions from N(0, 1), speeds of 0.5, the Coulomb law without softening, forces clamped to 100 in each component,
steps of 0.001 (kick, then drift). The input is the state after 3,100 steps, the label the positions after 4,100.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BODIES, STEP, LARGEST_FORCE, SPEED = 5, 0.001, 100.0, 0.5
FIRST, LAST = 3100, 4100
#: samples that are integrated together
CHUNK = 500


@dataclass(frozen=True)
class Samples:
    """Labelled samples.

    Attributes:
        position: (N, 5, 3) now.
        velocity: (N, 5, 3) now.
        charge: (N, 5).
        target: (N, 5, 3) positions 1,000 steps later.
    """

    position: Tensor
    velocity: Tensor
    charge: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, index: slice | Tensor) -> Samples:
        return Samples(self.position[index], self.velocity[index], self.charge[index], self.target[index])


def force(position: np.ndarray, charge: np.ndarray) -> np.ndarray:
    """(N, 5, 3) Coulomb forces, clamped."""
    apart = position[:, :, None] - position[:, None]
    square = (apart**2).sum(axis=-1) + np.eye(BODIES)
    size = charge[:, :, None] * charge[:, None] / square**1.5 * (1 - np.eye(BODIES))
    total: np.ndarray = (size[..., None] * apart).sum(axis=2)
    return total.clip(-LARGEST_FORCE, LARGEST_FORCE)


def energy(position: np.ndarray, velocity: np.ndarray, charge: np.ndarray) -> np.ndarray:
    """(N,) kinetic and potential energy."""
    apart = position[:, :, None] - position[:, None]
    distance = np.sqrt((apart**2).sum(axis=-1)) + np.eye(BODIES)
    pairs = charge[:, :, None] * charge[:, None] / distance * (1 - np.eye(BODIES))
    out: np.ndarray = 0.5 * (velocity**2).sum(axis=(1, 2)) + 0.5 * pairs.sum(axis=(1, 2))
    return out


def start(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, velocities and charges at step 0; a sample is the same however many there are."""
    states = []
    for number in range(count):
        random = np.random.default_rng((seed, number))
        charge = random.choice([-1.0, 1.0], size=BODIES)
        position = random.normal(size=(BODIES, 3))
        direction = random.normal(size=(BODIES, 3))
        states.append(
            (position, SPEED * direction / np.linalg.norm(direction, axis=1, keepdims=True), charge)
        )
    position, velocity, charge = (np.stack(column) for column in zip(*states, strict=True))
    return position, velocity, charge


def simulate(count: int, seed: int) -> Samples:
    """Samples of one seed."""
    parts = []
    position, velocity, charge = start(count, seed)
    for first in range(0, count, CHUNK):
        x, v, q = (a[first : first + CHUNK].copy() for a in (position, velocity, charge))
        kept = []
        for step in range(1, LAST + 1):
            v += STEP * force(x, q)
            x += STEP * v
            if step in (FIRST, LAST):
                kept += [x.copy(), v.copy()]
        parts.append((kept[0], kept[1], q, kept[2]))
    return Samples(*(torch.from_numpy(np.concatenate(column)).float() for column in zip(*parts, strict=True)))


def load(folder: Path, role: str, count: int) -> Samples:
    """Samples of a role, simulated once and kept in a folder."""
    seed = {"train": 1, "validation": 2, "test": 3}[role]
    file = folder / f"nbody-{role}-{count}.npz"
    if not file.exists():
        made = simulate(count, seed)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file, **{name: value.numpy() for name, value in vars(made).items()})
    with np.load(file) as kept:
        return Samples(*(torch.from_numpy(kept[name]) for name in Samples.__dataclass_fields__))
