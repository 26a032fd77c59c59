"""Small labelled frames, a cache of its own, and the folder of outside data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from blip_ft.testing.fake import FakeBackbone

#: SiO2 in a small skewed cell, Å
CELL = np.array([[5.0, 0.0, 0.0], [0.6, 5.2, 0.0], [-0.4, 0.3, 5.6]])
SCALED = np.array(
    [[0.05, 0.1, 0.1], [0.55, 0.5, 0.6], [0.3, 0.2, 0.9], [0.8, 0.75, 0.3], [0.1, 0.6, 0.4], [0.6, 0.1, 0.2]]
)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests read does not fill the user's cache, and is not found there either."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def frames() -> Callable[..., list[Atoms]]:
    """``frames(n, seed=0)``: n different SiO2 frames of six atoms with all labels."""

    def make(n: int, seed: int = 0) -> list[Atoms]:
        rng = np.random.default_rng(seed)
        result = []
        for _ in range(n):
            atoms = Atoms("Si2O4", scaled_positions=SCALED, cell=CELL, pbc=True)
            atoms.positions += rng.normal(0, 0.1, (6, 3))
            stress = rng.normal(0, 0.01, 6)
            energy, forces = rng.normal(-50, 1), rng.normal(0, 1, (6, 3))
            forces -= forces.mean(axis=0)
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)
            result.append(atoms)
        return result

    return make


@pytest.fixture
def renamed() -> Callable[..., list[Atoms]]:
    """``renamed(frames, energy="REF_energy", ...)``: labels in info and arrays under other names."""

    def make(frames: list[Atoms], **names: str) -> list[Atoms]:
        result = []
        for atoms in frames:
            copy = atoms.copy()
            for label, name in names.items():
                value = atoms.calc.results[label]
                (copy.arrays if label == "forces" else copy.info)[name] = value
            result.append(copy)
        return result

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """``save(frames, "a.xyz")``: write frames with ASE, give the path."""

    def make(frames: list[Atoms], name: str = "frames.xyz") -> str:
        path = tmp_path / name
        write(path, frames)
        return str(path)

    return make


@pytest.fixture
def backbone() -> FakeBackbone:
    return FakeBackbone()


@pytest.fixture
def outside() -> Callable[[str], str]:
    """``outside("NAME.extxyz.gz")``: path of an outside data set; fails where there is none."""

    def find(name: str) -> str:
        folder = os.environ.get("BLIP_FT_DATA")
        if not folder:
            pytest.fail("BLIP_FT_DATA is not set: run `make test-data DATA=DIR`")
        path = Path(folder) / name
        if not path.is_file():
            pytest.fail(f"there is no {path}: BLIP_FT_DATA must name the folder of the outside data sets")
        return str(path)

    return find
