"""Wrong labels are named, right ones are not: with models that are wrong in smooth ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from blip_ft.backbones.registry import get_adapter
from blip_ft.data.check.examine import compare
from blip_ft.data.check.label_faults import MIN_FRAMES, Compared, LabelFault, check_labels
from blip_ft.data.check.pairwise import PairFunctions
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.sources import load_source
from blip_ft.testing.planted import KINDS, plant


@pytest.fixture(scope="module")
def frames() -> list[Compared]:
    """The embedded set beside a model of another level of theory: its own zero of energy, a pair
    potential (60 meV/Å) and noise (20 meV/Å, 2 meV/atom) between it and the labels.
    """
    rows = load_source("sio2_polymorphs")
    structures = [to_atoms(row, labels=False) for row in rows]
    functions = PairFunctions(structures)
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.03, functions.size)
    out = []
    for row, atoms in zip(rows, structures, strict=True):
        forces, stress = np.array(row["forces"]), np.array(row["stress"])
        off = (functions.forces(atoms) @ weights).reshape(-1, 3)
        n = len(atoms)
        energy = row["energy"] + n * (337.0 + functions.energies(atoms) @ weights + rng.normal(0, 0.002))
        noise = rng.normal(0, 0.02, forces.shape)
        model_stress = 0.9 * stress + rng.normal(0, 1e-3, 6)
        out.append(Compared(atoms, row["energy"], forces, stress, energy, forces + off + noise, model_stress))
    return out


def named(faults: list[LabelFault]) -> set[int]:
    return {fault.index for fault in faults if fault.cause != "group"}


def test_right_labels_are_not_named(frames: list[Compared]) -> None:
    check = check_labels(frames)
    assert len(named(check.faults)) <= 1
    assert np.isfinite([check.energy, check.energy_usual, check.forces, check.forces_usual]).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_planted_faults_are_found(frames: list[Compared], kind: str, seed: int) -> None:
    planted, bad = plant(frames, kind, seed)
    found = named(check_labels(planted).faults)
    assert len(found & bad) >= 0.8 * len(bad)
    assert len(found - bad) <= 0.02 * (len(frames) - len(bad))


def test_causes_are_told_apart(frames: list[Compared]) -> None:
    some = list(frames)
    order = np.random.default_rng(3).permutation(len(some[0].atoms))
    some[0] = replace(some[0], forces=some[0].forces[order])
    some[9] = replace(some[9], forces=some[9].forces * [1, 1, -1])
    some[18] = replace(some[18], forces=some[18].forces[:, [1, 0, 2]])
    some[27] = replace(some[27], forces=some[27].forces * 23.06)
    some[36] = replace(some[36], forces=np.random.default_rng(4).normal(size=some[36].forces.shape))
    some[45] = replace(some[45], energy=some[45].energy - 0.06 * len(some[45].atoms))
    planted, (i, j) = plant(some, "swap", 5, 0.0)
    assert not {i, j} & {0, 9, 18, 27, 36, 45}, "the seed must choose others"
    faults = {(f.index, f.label): f for f in check_labels(planted).faults}
    assert faults[0, "forces"].cause == "atoms"
    assert (faults[9, "forces"].cause, faults[9, "forces"].text) == ("axes", "the sign of z is inverted")
    assert faults[18, "forces"].text == "the axes are in the order yxz"
    assert faults[27, "forces"].cause == "factor"
    assert faults[27, "forces"].text.startswith("23")
    assert faults[36, "forces"].cause == "unknown"
    assert abs(faults[45, "energy"].size + 0.06) < 0.02
    assert (faults[i, "forces"].cause, faults[i, "forces"].other) == ("frame", j)
    assert (faults[j, "forces"].cause, faults[j, "forces"].other) == ("frame", i)


def test_a_quarter_of_the_frames_may_be_wrong(frames: list[Compared]) -> None:
    planted, bad = plant(frames, "swap", 0, 0.25)
    found = named(check_labels(planted).faults)
    assert len(found & bad) >= 0.9 * len(bad)
    assert len(found - bad) <= 4


def test_another_zero_of_energy_and_unit_cell_change_nothing(frames: list[Compared]) -> None:
    planted, _ = plant(frames, "energy", 1)
    before = named(check_labels(planted).faults)
    shifted = [replace(f, energy=f.energy + 2.5 * np.sum(f.atoms.numbers == 8)) for f in planted]
    assert named(check_labels(shifted).faults) == before


def test_wrong_stress_is_named(frames: list[Compared]) -> None:
    some = list(frames)
    for i in (4, 70):
        some[i] = replace(some[i], stress=-3 * some[i].stress)
    stress = [f.index for f in check_labels(some).faults if f.label == "stress"]
    assert stress == [4, 70]


def test_missing_labels(frames: list[Compared]) -> None:
    some = [replace(f, energy=None) if i % 2 else replace(f, forces=None) for i, f in enumerate(frames)]
    some[7] = replace(some[7], forces=-some[7].forces)
    some[8] = replace(some[8], energy=some[8].energy + 0.1 * len(some[8].atoms))
    some = [replace(f, stress=None) for f in some]
    check = check_labels(some)
    assert {7, 8} <= named(check.faults)
    assert np.isnan(check.energy[1::2]).all()
    assert np.isnan(check.forces[::2]).all()
    assert check_labels([replace(f, energy=None, forces=None) for f in some]).faults == []


@pytest.mark.parametrize("n", [0, 1, MIN_FRAMES - 1, MIN_FRAMES])
def test_few_frames(frames: list[Compared], n: int) -> None:
    assert check_labels(frames[:n]).faults == []


def test_atoms_alone_and_perfect_crystals() -> None:
    lone = [
        Compared(Atoms("H"), -1.0 - 0.001 * i, np.zeros((1, 3)), None, -1.0, np.zeros((1, 3)))
        for i in range(12)
    ]
    assert check_labels(lone).faults == []
    cells = [
        Compared(
            Atoms("Cu", cell=[3 + 0.05 * i] * 3, pbc=True),
            -3.0 + 0.01 * i,
            np.zeros((1, 3)),
            None,
            -3.0,
            np.zeros((1, 3)),
        )
        for i in range(12)
    ]
    assert check_labels(cells).faults == []


# ---- a real model ------------------------------------------------------------------------------


@pytest.mark.backend("sevennet")
def test_planted_faults_beside_a_real_model() -> None:
    """SevenNet-0 (PBE of another code) and frames from quartz at 300 K to stishovite and hot quartz."""
    rows = list(load_source("sio2_polymorphs"))[::2]
    frames = compare(rows, get_adapter("sevennet").load("7net-0"))
    assert len(named(check_labels(frames).faults)) <= 2
    for kind in KINDS:
        found, wrong, n_bad, n_good = 0, 0, 0, 0
        for seed in range(4):
            planted, bad = plant(frames, kind, seed)
            names = named(check_labels(planted).faults)
            found, n_bad = found + len(names & bad), n_bad + len(bad)
            wrong, n_good = wrong + len(names - bad), n_good + len(frames) - len(bad)
        assert found >= 0.8 * n_bad, kind
        assert wrong <= 0.02 * n_good, kind


@pytest.mark.outside_data
@pytest.mark.backend("sevennet")
def test_real_corrupted_labels(outside: Callable[[str], str]) -> None:
    """30 of 120 frames of a zeolite whose published labels are broken."""
    import gzip
    from pathlib import Path

    path = outside("SiO2_zeo_MTT_badlabels.extxyz.gz")
    heads = [t for t in gzip.decompress(Path(path).read_bytes()).decode().splitlines() if "bad_label" in t]
    bad = {i for i, text in enumerate(heads) if "bad_label=T" in text}
    assert len(bad) == 30
    frames = compare(list(load_source(path)), get_adapter("sevennet").load("7net-0"))
    found = named(check_labels(frames).faults)
    assert bad <= found
    assert len(found - bad) <= 2


def test_what_is_beyond_doubt_is_marked(frames: list[Compared]) -> None:
    """One component, one energy and one stress; six frames are enough for it, and say nothing else."""
    for chosen in (frames[:40], frames[:6]):
        assert not [f for f in check_labels(chosen).faults if f.certain]
        spoilt = list(chosen)
        forces, stress = np.array(spoilt[2].forces), np.array(spoilt[4].stress)
        forces[1, 1] += 50.0
        stress[0] = 30.0
        energy = spoilt[3].energy
        assert energy is not None
        spoilt[2] = replace(spoilt[2], forces=forces)
        spoilt[3] = replace(spoilt[3], energy=energy + 15.0 * len(spoilt[3].atoms))
        spoilt[4] = replace(spoilt[4], stress=stress)
        faults = [f for f in check_labels(spoilt).faults if f.certain]
        assert [(f.index, f.label) for f in faults] == [(2, "forces"), (3, "energy"), (4, "stress")]
