"""Synthetic predictions with known errors."""

from collections.abc import Callable

import numpy as np
import pytest

from blip_ft.uncertainty.results import SetPrediction


@pytest.fixture
def make_prediction() -> Callable[..., SetPrediction]:
    """Predictions whose errors are Gaussian: total std = sqrt(noise^2 + (scale * spread)^2)."""

    def make(
        frames: int = 20,
        *,
        seed: int = 0,
        name: str = "seen",
        noise: float = 0.0,
        scale: float = 1.0,
        spread: float = 0.05,
        with_std: bool = True,
    ) -> SetPrediction:
        rng = np.random.default_rng(seed)
        n_atoms = rng.integers(3, 12, size=frames)
        n = int(n_atoms.sum())

        def draw(shape: tuple[int, ...], size: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            mean = rng.normal(size=shape)
            std = size * np.exp(0.7 * rng.normal(size=shape))
            total = np.sqrt((noise * size / spread) ** 2 + (scale * std) ** 2)
            return mean, std, mean + rng.normal(size=shape) * total

        energy, energy_std, energy_label = draw((frames,), 0.1 * spread)
        forces, forces_std, forces_label = draw((n, 3), spread)
        stress, stress_std, stress_label = draw((frames, 6), 0.01 * spread)
        return SetPrediction(
            name=name,
            n_atoms=n_atoms,
            numbers=rng.choice([8, 14], size=n),
            frames=[f"{name}.xyz#{i}" for i in range(frames)],
            energy=energy * n_atoms,
            forces=forces,
            stress=stress,
            energy_label=energy_label * n_atoms,
            forces_label=forces_label,
            stress_label=stress_label,
            energy_std=energy_std * n_atoms if with_std else None,
            forces_std=forces_std if with_std else None,
            stress_std=stress_std if with_std else None,
        )

    return make
