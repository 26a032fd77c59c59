from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.data.check.sets import check_frames, check_units, unit_findings
from blip_ft.data.findings import Finding
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.schema import FEATURES
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.splits import Splits
from blip_ft.errors import DataError
from blip_ft.testing.fake import FakeBackbone

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]


def splits(train: datasets.Dataset, **others: datasets.Dataset) -> Splits:
    spare = load_source("sio2_polymorphs")
    return Splits(
        train=train,
        validation=others.get("validation", spare.select([0])),
        calibration=others.get("calibration", spare.select([1])),
        test={"seen": others.get("test", spare.select([2]))},
        rule="",
        dropped=[],
    )


# ---- frames ------------------------------------------------------------------------------------


def test_clean_frames_give_no_findings(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    assert check_frames(splits(load_source(save(frames(5)))), backbone) == []


@pytest.mark.parametrize("role", ["train", "validation", "calibration", "test"])
def test_unknown_element(frames: Frames, save: Save, backbone: FakeBackbone, role: str) -> None:
    some = frames(3)
    some[2].numbers[0] = some[2].calc.atoms.numbers[0] = 32
    bad = load_source(save(some, "germanium.traj"))
    good = load_source(save(frames(3, seed=9), "good.traj"))
    with pytest.raises(
        DataError, match=r"germanium\.traj, frame 2, field 'numbers': element Ge is unknown to"
    ):
        check_frames(splits(bad) if role == "train" else splits(good, **{role: bad}), backbone)


def test_empty_role(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    some = load_source(save(frames(3)))
    with pytest.raises(DataError, match="the calibration set is empty"):
        check_frames(splits(some, calibration=some.select([])), backbone)


def test_frame_without_labels_is_refused_even_if_it_was_read_without_asking(
    frames: Frames, save: Save, backbone: FakeBackbone
) -> None:
    some = load_source(save([a.copy() for a in frames(2)]), labels=False)
    with pytest.raises(DataError, match="frame 0, field 'energy, forces': the frame has neither"):
        check_frames(splits(some), backbone)


def test_missing_labels_are_listed(tmp_path: Path, backbone: FakeBackbone) -> None:
    (tmp_path / "a.xyz").write_text(
        "1\nenergy=-1.0\nO 0 0 0\n1\nProperties=species:S:1:pos:R:3:forces:R:3\nO 0 0 1 0 0 0\n"
    )
    findings = check_frames(splits(load_source(str(tmp_path / "a.xyz"))), backbone)
    assert [(f.kind, f.severity, f.frames) for f in findings] == [
        ("coverage", "info", [f"{tmp_path}/a.xyz, frame 1"]),
        ("coverage", "info", [f"{tmp_path}/a.xyz, frame 0"]),
    ]
    assert [f.message for f in findings] == [
        "train: 1 of 2 frames have no energy",
        "train: 1 of 2 frames have no forces",
    ]


def test_stress_without_periodicity_is_mentioned(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    some = frames(2)
    some[1].pbc = some[1].calc.atoms.pbc = (True, True, False)
    (finding,) = check_frames(splits(load_source(save(some))), backbone)
    assert "1 frames have a stress but are not periodic" in finding.message
    assert finding.frames[0].endswith("frame 1")


def test_overlapping_atoms_are_a_warning(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    some = frames(3)
    some[1].positions[3] = some[1].positions[0] + [0.3, 0, 0]
    image = some[2].positions[1] + some[2].cell[0] + [0, 0.5, 0]  # only with the periodic image
    some[2].positions[4] = image
    for atoms in some:
        atoms.calc.atoms.positions = atoms.positions
    (finding,) = check_frames(splits(load_source(save(some))), backbone)
    assert (finding.kind, finding.severity) == ("geometry", "warning")
    assert len(finding.frames) == 2
    assert "Si0-O3 0.30 Å" in finding.frames[0]
    assert "Si1-O4 0.50 Å" in finding.frames[1]


def test_copies_in_one_role_are_mentioned(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    some = frames(2)
    (finding,) = check_frames(splits(load_source(save([*some, some[0]]))), backbone)
    assert (finding.kind, finding.severity) == ("duplicate", "info")
    assert finding.frames[0].endswith("frame 2 (as frame 0)")


def test_dropped_frames_are_listed(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    some = splits(load_source(save(frames(2))))
    some.dropped = ["a.xyz, frame 7: same structure as a frame of test"]
    (finding,) = check_frames(some, backbone)
    assert finding.frames == some.dropped
    assert "1 frames are left out of all roles" in finding.message


def test_a_finding_reads_as_one_line() -> None:
    finding = Finding("geometry", "warning", [f"f, frame {i}" for i in range(9)], "atoms overlap", "look")
    assert str(finding) == (
        "warning: atoms overlap [f, frame 0; f, frame 1; f, frame 2; f, frame 3; f, frame 4; ...] - look"
    )


# ---- units -------------------------------------------------------------------------------------


@pytest.fixture
def train() -> datasets.Dataset:
    return load_source("sio2_polymorphs@train")


def model(labels: datasets.Dataset, error: float = 0.1) -> Callable[[list[Atoms]], list[dict[str, Any]]]:
    """A pretrained model that is wrong by ``error`` of each quantity's spread, with its own zero of energy."""
    truth = {tuple(np.ravel(row["positions"])): row for row in labels}
    rng = np.random.default_rng(0)

    def predict(atoms_list: list[Atoms]) -> list[dict[str, Any]]:
        result = []
        for atoms in atoms_list:
            assert atoms.calc is None, "the labels are not shown to the model"
            row = truth[tuple(atoms.positions.ravel())]
            forces, stress = np.array(row["forces"]), np.array(row["stress"])
            result.append(
                {
                    "energy": row["energy"] + 337.0 * len(atoms) + error * rng.normal(0, 0.05),
                    "forces": forces * 0.95 + error * rng.normal(size=forces.shape) * forces.std(),
                    "stress": stress * 1.1 + error * rng.normal(size=6) * stress.std(),
                }
            )
        return result

    return predict


def scaled(dataset: datasets.Dataset, **factors: float) -> datasets.Dataset:
    rows = []
    for row in dataset:
        new = dict(row)
        for label, factor in factors.items():
            new[label] = (factor * np.array(row[label])).tolist()
        rows.append(new)
    return datasets.Dataset.from_list(rows, features=FEATURES)


def test_right_units_give_no_findings(train: datasets.Dataset) -> None:
    assert check_units(train, model(train)) == []


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (
            {"forces": 23.0605},
            r"field 'forces'.*look like kcal/mol/Ang, not eV/Å.*\n.*\{forces: kcal/mol/Ang\}",
        ),
        ({"forces": 1 / 51.422}, r"look like Hartree/Bohr, not eV/Å"),
        ({"forces": 1000}, r"look like meV/Ang"),
        ({"forces": -1}, r"look like gradients.*\n.*-1 \* eV/Ang"),
        ({"forces": -23.0605}, r"look like kcal/mol/Ang of the wrong sign"),
        ({"energy": 23.0605}, r"field 'energy'.*look like kcal/mol, not eV"),
        ({"energy": 23.0605, "forces": 23.0605}, r"field 'forces'"),
        ({"stress": 160.2177}, r"field 'stress'.*look like GPa"),
        ({"stress": -1602.177}, r"look like kbar of the wrong sign.*\n.*\{stress: -1 \* kbar\}"),
        ({"stress": -1}, r"stress of the wrong sign"),
    ],
)
def test_wrong_units_stop(train: datasets.Dataset, factors: dict[str, float], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        check_units(scaled(train, **factors), model(train))
    assert caught.value.file == "sio2_polymorphs"


def test_virials_stop(train: datasets.Dataset) -> None:
    rows = [
        row | {"stress": (-np.array(row["stress"]) * to_atoms(row).get_volume()).tolist()} for row in train
    ]
    with pytest.raises(DataError, match=r"virials in eV \(-stress times volume\)"):
        check_units(datasets.Dataset.from_list(rows, features=FEATURES), model(train))


def test_the_remedy_works(train: datasets.Dataset, save: Save) -> None:
    path = save([to_atoms(row) for row in scaled(train, forces=23.0605)], "kcal.traj")
    predict = model(train)
    with pytest.raises(DataError, match="forces: kcal/mol/Ang"):
        check_units(load_source(path), predict)
    assert check_units(load_source(path, units={"forces": "kcal/mol/Ang"}), predict) == []


def test_stress_that_is_not_trained_on_only_warns(train: datasets.Dataset) -> None:
    (finding,) = check_units(scaled(train, stress=160.2177), model(train), use_stress=False)
    assert (finding.kind, finding.severity) == ("unit", "warning")
    assert "GPa" in finding.message
    (finding,) = check_units(scaled(train, stress=-1.0), model(train), use_stress=False)
    assert (finding.kind, finding.severity) == ("sign", "warning")


def test_other_slopes_warn(train: datasets.Dataset) -> None:
    (finding,) = check_units(scaled(train, forces=4.0), model(train))
    assert (finding.kind, finding.severity) == ("unit", "warning")
    assert "slope 4." in finding.message


def test_labels_of_other_frames_warn(train: datasets.Dataset) -> None:
    rows = list(train)
    forces = [
        np.random.default_rng(i).permutation(np.array(row["forces"])).tolist() for i, row in enumerate(rows)
    ]
    shuffled = datasets.Dataset.from_list(
        [row | {"forces": f} for row, f in zip(rows, forces, strict=True)], features=FEATURES
    )
    (finding,) = check_units(shuffled, model(train))
    assert (finding.kind, finding.severity) == ("label", "warning")
    assert "hardly correlate" in finding.message


def test_large_factor_without_correlation_does_not_name_a_unit(train: datasets.Dataset) -> None:
    rows = [
        row | {"forces": (23 * np.random.default_rng(i).normal(size=np.shape(row["forces"]))).tolist()}
        for i, row in enumerate(train)
    ]
    (finding,) = check_units(datasets.Dataset.from_list(rows, features=FEATURES), model(train))
    assert finding.kind == "label"


def test_at_most_sixteen_frames_are_predicted(train: datasets.Dataset) -> None:
    asked = []
    predict = model(train)

    def counting(atoms_list: list[Atoms]) -> list[dict[str, Any]]:
        asked.append(len(atoms_list))
        return predict(atoms_list)

    check_units(train, counting)
    check_units(train.select([0, 1, 2]), counting)
    assert asked == [16, 3]


def test_models_and_labels_without_stress_or_forces(
    frames: Frames, save: Save, train: datasets.Dataset
) -> None:
    full = model(train)

    def poor(atoms_list: list[Atoms]) -> list[dict[str, Any]]:
        return [p | {"stress": np.full(6, np.nan), "forces": None} for p in full(atoms_list)]

    assert check_units(train, poor) == []
    energies_only = [a.copy() for a in frames(3)]
    for atoms in energies_only:
        atoms.calc = SinglePointCalculator(atoms, energy=1.0)
    rows = load_source(save(energies_only))
    assert (
        check_units(rows, lambda a: [{"energy": 1.0, "forces": np.zeros((6, 3)), "stress": None}] * 3) == []
    )


# ---- nothing to compare with -----------------------------------------------------------------


def test_forces_that_vanish_by_symmetry_have_no_slope() -> None:
    """One-atom cells: the model says zero, and so do the labels, to rounding."""
    row = {"numbers": [29], "energy": -3.0, "forces": [[1e-5, 0.0, -2e-5]], "stress": None, "pbc": [True] * 3}
    said = [{"energy": -4.0, "forces": np.zeros((1, 3)), "stress": None}] * 6
    assert unit_findings([row] * 6, said) == {}
    said = [{"energy": -4.0, "forces": np.full((1, 3), 1e-7), "stress": None}] * 6
    assert unit_findings([row] * 6, said) == {}
    wrong = row | {"forces": [[0.5, 0.0, 0.0]]}
    (finding,) = unit_findings([wrong] * 6, said).values()
    assert "nan" not in str(finding)
    assert "rms of 0.289 where the pretrained model predicts none" in finding.message


def test_slopes_from_few_values_say_so() -> None:
    row = {"numbers": [1], "energy": None, "forces": [[0.1, 0.9, -0.5]], "stress": None, "pbc": [False] * 3}
    said = [{"energy": 0.0, "forces": np.array([[0.9, -0.1, 0.5]]), "stress": None}]
    (finding,) = unit_findings([row], said).values()
    assert "from 3 values only" in finding.message
