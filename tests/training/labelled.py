"""Frames with labels for trainings of the fake potential."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from blip_ft.testing.fake import FakeBackbone


def frames(n: int = 12, *, seed: int = 0, scale: float = 1.0, other: bool = False) -> list[Atoms]:
    """Small periodic structures with right units and signs.

    They are labelled by the fake potential itself, times ``scale``, or by one of ``other`` weights.
    """
    rng = np.random.default_rng(seed)
    calculator = FakeBackbone.load("tiny", seed=int(other)).stock_calculator()
    out = []
    for i in range(n):
        a = Atoms("SiO2", positions=[(0, 0, 0), (1.6, 0, 0), (0, 1.6, 0)], cell=[5, 5, 5], pbc=True)
        a.positions += rng.normal(0, 0.1, (3, 3))
        a.calc = calculator
        energy, forces = a.get_potential_energy(), a.get_forces().copy()
        a.calc = None
        a.info |= {"REF_energy": scale * energy, "trajectory": f"run{i % 4}"}
        a.arrays["REF_forces"] = scale * forces
        out.append(a)
    return out


def small_run(folder: Path, train: str, /, **data: Any) -> dict[str, Any]:
    """A recipe of the default family with few samples, on a file in a folder."""
    return {
        "name": "run",
        "output": str(folder / "runs"),
        "data": {"train": str(folder / train)} | data,
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"rank": 4},
        "uncertainty": {"n_draws": 4, "calibration_draws": 4, "linearity_frames": 0},
        "plain": {"enabled": False},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
    }
