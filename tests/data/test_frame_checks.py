from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.data.check.frames import lone_atoms, near_duplicates, net_forces, outliers
from blip_ft.data.check.sets import check_frames
from blip_ft.data.findings import Finding
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.splits import Splits
from blip_ft.testing.fake import FakeBackbone

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]


def relabel(atoms: Atoms, **changes: object) -> Atoms:
    new = atoms.copy()
    new.calc = SinglePointCalculator(new, **{**atoms.calc.results, **changes})
    return new


def numbers(finding: Finding) -> list[int]:
    found: list[int] = finding.to_json()["frames"]
    return found


def test_nothing_is_far_from_the_rest(frames: Frames, save: Save) -> None:
    assert outliers(list(load_source(save(frames(40))))) == []


def test_far_energies_and_forces_are_named(frames: Frames, save: Save) -> None:
    some = frames(40)
    some[3] = relabel(some[3], energy=some[3].calc.results["energy"] + 300.0)
    some[5] = relabel(some[5], forces=some[5].calc.results["forces"] * 1e3)
    energy, force = outliers(list(load_source(save(some))))
    assert (energy.kind, numbers(energy)) == ("outlier", [3])
    assert (force.kind, numbers(force)) == ("outlier", [5])
    assert "eV/Å, z +" in force.frames[0]


def test_energies_are_compared_within_a_composition() -> None:
    rows = []
    for i in range(40):
        zs, per_atom = ([8, 1, 1], -157.0) if i % 2 else ([14], -107.0)
        energy = (per_atom + 0.01 * np.sin(i)) * len(zs)
        rows.append({"numbers": zs, "energy": energy, "forces": None, "source": "f", "frame": i})
    assert outliers(rows) == []
    rows[7]["energy"] = -107.0 * 3
    (finding,) = outliers(rows)
    assert numbers(finding) == [7]


def test_net_forces(frames: Frames, save: Save) -> None:
    some = frames(12)
    pushed = some[4].calc.results["forces"] + [0.5, 0, 0]
    some[4] = relabel(some[4], forces=pushed)
    (finding,) = net_forces("train", list(load_source(save(some))))
    assert (finding.kind, finding.severity, numbers(finding)) == ("label", "warning", [4])
    everyone = [relabel(a, forces=a.calc.results["forces"] + [0.5, 0, 0]) for a in some]
    (finding,) = net_forces("train", list(load_source(save(everyone, "all.xyz"))))
    assert (finding.frames, "12 of 12" in finding.message) == ([], True)


def test_atoms_that_nothing_is_near() -> None:
    far = molecule("H2O")
    far.positions[1] += [0, 0, 30]
    row = {"source": "f", "frame": 2}
    (finding,) = lone_atoms("train", [row], [far], 5.0)
    assert finding.frames == ["f, frame 2 (H1)"]
    assert lone_atoms("train", [row], [molecule("H2O")], 5.0) == []
    assert lone_atoms("train", [row], [Atoms("H")], 5.0) == []


def turned(atoms: Atoms, seed: int, noise: float) -> Atoms:
    """Rotated, shifted, in another order, and moved by ``noise`` (Å)."""
    rng = np.random.default_rng(seed)
    new = atoms[rng.permutation(len(atoms))]
    new.rotate(73.0, (1, 2, 3), rotate_cell=True)
    new.positions += rng.normal(0, noise, (len(atoms), 3)) + np.array([0.3, 0.1, 0.2])
    new.calc = SinglePointCalculator(new, energy=-1.0, forces=np.zeros((len(atoms), 3)))
    return new


def test_near_copies_are_found_in_any_position_and_order(frames: Frames, save: Save) -> None:
    some = frames(8)
    train = load_source(save([*some, turned(some[2], 0, 1e-3)]))
    test = load_source(save([turned(some[5], 1, 1e-3), turned(some[6], 2, 0.05)], "test.xyz"))
    leak, double = near_duplicates({"train": train, "test/seen": test})
    assert (leak.kind, leak.severity, numbers(leak)) == ("leak", "warning", [0])
    assert "train, frame 5" in leak.frames[0]
    assert (double.kind, double.severity, numbers(double)) == ("duplicate", "info", [8])


@pytest.mark.parametrize("seed", range(3))
def test_different_frames_are_no_near_copies(frames: Frames, save: Save, seed: int) -> None:
    assert near_duplicates({"train": load_source(save(frames(30, seed=seed)))}) == []


def test_copies_with_other_labels(frames: Frames, save: Save) -> None:
    some = frames(3)
    other = relabel(some[1], energy=some[1].calc.results["energy"] + 0.2)
    data = load_source(save([*some, other, some[2]]))
    spare = load_source("sio2_polymorphs")
    splits = Splits(data, spare.select([0]), spare.select([1]), {"seen": spare.select([2])}, "")
    found = {f.kind: f for f in check_frames(splits, FakeBackbone())}
    assert numbers(found["duplicate"]) == [3, 4]
    assert (found["label"].severity, numbers(found["label"])) == ("warning", [3])
    assert found["label"].frames[0].endswith("(and frame 1)")
