"""What clean sets are like: relaxed structures, one substance, structures that the model describes badly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.config import DataConfig
from blip_ft.data.check.examine import _units
from blip_ft.data.check.label_faults import check_labels
from blip_ft.data.check.leaks import group_leaks
from blip_ft.data.check.sets import unit_findings
from blip_ft.data.split.splits import load_splits

from .test_energy_sets import frame

Save = Callable[..., str]
#: eV/Å^3
GPA = 0.006241509


def compared(label: np.ndarray, model: np.ndarray, quantity: str) -> list[str]:
    """Findings about one quantity of some frames; forces (f, n, 3) or stresses (f, 6)."""
    rows, predictions = [], []
    for one, other in zip(label, model, strict=True):
        row = {"energy": None, "forces": None, "stress": None, "numbers": [14] * 4, "pbc": [True] * 3}
        rows.append(row | {"cell": np.eye(3) * 6, quantity: one})
        predictions.append({"energy": 0.0, "forces": None, "stress": None, quantity: other})
    return [f"{f.severity} {f.kind}" for f in unit_findings(rows, predictions).values()]


@pytest.mark.parametrize(
    ("quantity", "shape", "usual", "large"),
    [("forces", (4, 3), 0.05, 0.5), ("stress", (6,), 0.4 * GPA, 4 * GPA)],
)
def test_labels_near_the_model_are_not_remarkable(
    quantity: str, shape: tuple[int, ...], usual: float, large: float
) -> None:
    rng = np.random.default_rng(0)
    relaxed = rng.normal(0, 1e-3 * usual, (20, *shape))
    model = rng.normal(0, usual, (20, *shape))
    assert compared(relaxed, model, quantity) == []  # slope and correlation near 0
    assert compared(rng.normal(0, usual, (20, *shape)), model, quantity) == []
    strange = rng.normal(0, large, (20, *shape))
    assert compared(strange, model, quantity) == ["warning label"]
    assert compared(strange, rng.normal(0, large, (20, *shape)), quantity) == ["warning label"]


def test_a_small_stress_in_another_unit_is_still_found() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 0.3 * GPA, (20, 6))
    assert compared(true / GPA, true + rng.normal(0, 0.05 * GPA, (20, 6)), "stress") == ["error unit"]
    assert compared(-true, true + rng.normal(0, 0.05 * GPA, (20, 6)), "stress") == ["error sign"]


@pytest.mark.parametrize(("groups", "severity"), [(("EDI",), "info"), (("a", "b", "c", "d", "e"), "warning")])
def test_one_group_of_all_frames_tells_nothing(groups: tuple[str, ...], severity: str, save: Save) -> None:
    rng = np.random.default_rng(0)
    some = []
    for i in range(40):
        atoms = Atoms("Si4", positions=rng.uniform(0, 6, (4, 3)), cell=[6] * 3, pbc=True)
        atoms.calc = SinglePointCalculator(atoms, energy=-20.0, forces=rng.normal(0, 1, (4, 3)))
        atoms.info["config_type"] = groups[i % len(groups)]
        some.append(atoms)
    config = DataConfig.model_validate({"train": save(some), "split": {"by": "random"}})
    found = {f.message.partition(":")[0]: f for f in group_leaks(load_splits(config))}
    assert found["test/seen"].severity == severity
    assert ("divide by group" in found["test/seen"].remedy) == (severity == "warning")


@pytest.mark.parametrize(("second", "named"), [(0.36, []), (0.0, [20]), (-0.36, [20, 21])])
def test_two_frames_of_a_structure_that_the_model_describes_badly(second: float, named: list[int]) -> None:
    """Off alike, they are the model's error; alone, or against each other, labels are named."""
    rng = np.random.default_rng(1)
    frames = [frame(i, rng) for i in range(20)] + [frame(i, rng, "Si4O8") for i in range(2)]
    for i, off in ((20, 0.36), (21, second)):
        energy = frames[i].energy
        assert energy is not None
        frames[i] = replace(frames[i], energy=energy + off * len(frames[i].atoms), group="EWO")
    faults = check_labels(frames).faults
    assert [f.index for f in faults if f.cause != "group"] == named


@pytest.mark.parametrize(
    ("source", "factor", "said"),
    [
        ("q.xyz", 0.0, []),
        ("other.xyz", 0.0, ["warning label"]),
        ("q.xyz", 23.06, ["error unit"]),
        ("other.xyz", 23.06, ["error unit"]),
    ],
)
def test_a_few_frames_of_the_training_file(source: str, factor: float, said: list[str]) -> None:
    """That they correlate with nothing is no news; of another file it is, and another unit always is."""
    rng = np.random.default_rng(0)
    names, rows, compared = [], [], []
    for i in range(14):
        one = frame(i, rng)
        forces = one.forces
        assert forces is not None
        if i >= 10:
            forces = factor * forces if factor else rng.permuted(forces)
        names.append("train" if i < 10 else "validation")
        compared.append(replace(one, forces=forces))
        rows.append({"source": "q.xyz" if i < 10 else source, "numbers": [14] * 6, "energy": None})
        rows[-1] |= {"forces": forces, "stress": None, "pbc": [True] * 3}
    found, _ = _units(names, rows, compared, use_stress=True, by_state=False)
    assert [f"{f.severity} {f.kind}" for f in found] == said
    assert all(f.message.startswith("validation: the forces") for f in found)
