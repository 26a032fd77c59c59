"""The data report as a whole, beside a model that made the labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import datasets
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.data.check.examine import DataReport, examine, without_bad_labels
from blip_ft.data.findings import Finding, from_error
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.splits import Splits
from blip_ft.errors import DataError
from blip_ft.testing.fake import FakeBackbone

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]
BAD = (4, 11)


@pytest.fixture(scope="module")
def backbone() -> FakeBackbone:
    return FakeBackbone(seed=3)  # one whose forces are not tiny


@pytest.fixture
def splits(frames: Frames, save: Save, backbone: FakeBackbone) -> Splits:
    """40 frames whose labels are the model's, with another zero; two of train have wrong ones."""
    calculator = backbone.stock_calculator()
    some = []
    for i, atoms in enumerate(frames(40)):
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy() + 7.0, 1.05 * atoms.get_forces()
        if i == BAD[0]:
            energy += 0.5 * len(atoms)
        if i == BAD[1]:
            forces = forces * [1, -1, 1]
        atoms.calc = SinglePointCalculator(
            atoms, energy=energy, forces=forces, stress=1.02 * atoms.get_stress()
        )
        some.append(atoms)
    data = load_source(save(some))
    parts = [data.select(range(*span)) for span in ((0, 24), (24, 28), (28, 32), (32, 40))]
    return Splits(parts[0], parts[1], parts[2], {"seen": parts[3]}, "By hand.")


def of_kind(report: DataReport, kind: str) -> list[Finding]:
    return [f for f in report.findings if f.kind == kind]


def test_what_is_reported(splits: Splits, backbone: FakeBackbone) -> None:
    seen: list[tuple[int, int]] = []
    report = examine(splits, backbone, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (40, 40)
    assert list(report.summary) == ["train", "validation", "calibration", "test/seen"]
    train = report.summary["train"]
    assert (train["frames"], train["atoms"], train["elements"]) == (24, 144, ["O", "Si"])
    assert train["labels"] == {"energy": 24, "forces": 24, "stress": 24}
    assert train["atoms_per_frame"] == [6, 6, 6]
    assert report.model["validation"]["energy_mae_mev_per_atom"] < 20
    assert {f.to_json()["frames"][0] for f in of_kind(report, "label")} == set(BAD)
    assert not [f for f in report.findings if f.severity == "error"]
    assert report.bad["train"].keys() == set(BAD)
    assert len(report.frames["role"]) == 40
    json.dumps(report.to_json() | {"frames": report.frames}, allow_nan=False)


def test_frames_are_sampled_and_that_is_said(splits: Splits, backbone: FakeBackbone) -> None:
    report = examine(splits, backbone, most=20)
    assert len(report.frames["role"]) == 20
    assert "labels of 20 of 40 frames" in " ".join(f.message for f in of_kind(report, "coverage"))
    none = examine(splits, backbone, most=0)
    assert none.model == {}
    assert none.summary["train"]["frames"] == 24


def test_wrong_units_are_a_finding_and_hide_the_rest(splits: Splits, backbone: FakeBackbone) -> None:
    def wrong(frames: datasets.Dataset) -> datasets.Dataset:
        rows = [dict(row) | {"forces": (23.06 * np.array(row["forces"])).tolist()} for row in frames]
        return datasets.Dataset.from_list(rows, features=frames.features)

    one = examine(replace(splits, calibration=wrong(splits.calibration)), backbone)
    (unit,) = of_kind(one, "unit")
    assert unit.severity == "error"
    assert unit.message.startswith("calibration: the forces labels look like kcal/mol/Ang")
    both = replace(splits, train=wrong(splits.train), calibration=wrong(splits.calibration))
    report = examine(both, backbone)
    (unit,) = of_kind(report, "unit")
    assert unit.message.startswith("train: ")
    assert report.findings[0] is unit
    assert of_kind(report, "label") == []


def test_bad_labels_are_dropped_and_listed(splits: Splits, backbone: FakeBackbone) -> None:
    report = examine(splits, backbone)
    clean = without_bad_labels(splits, report.bad)
    assert len(clean.train) == 22
    assert not set(BAD) & set(clean.train["frame"])
    assert [text.partition(": ")[0].rpartition(" ")[2] for text in clean.dropped] == [str(i) for i in BAD]
    assert all("wrong label" in text for text in clean.dropped)
    assert "2 frames with a wrong label are left out" in clean.rule
    report.bad["validation"] = dict.fromkeys(range(4), "energy")
    with pytest.raises(DataError, match="every frame of validation has a wrong label"):
        without_bad_labels(splits, report.bad)


def test_findings_as_json() -> None:
    names = ["a 1, frame 3.xyz, frame 12 (off by 3)", "b.xyz, frame 0", "c.xyz, frame 7: same structure"]
    assert Finding("label", "info", names, "m", "r").to_json() == {
        "kind": "label",
        "severity": "info",
        "frames": [12, 0, 7],
        "files": ["a 1, frame 3.xyz", "b.xyz", "c.xyz"],
        "notes": ["off by 3", "", "same structure"],
        "message": "m",
        "remedy": "r",
    }


@pytest.mark.parametrize(
    ("field", "kind"), [("forces", "label"), ("cell", "geometry"), (None, "file"), ("numbers", "file")]
)
def test_findings_of_errors(field: str | None, kind: str) -> None:
    finding = from_error(DataError("is bad", file="a.xyz", frame=3, field=field, remedy="mend"))
    assert (finding.kind, finding.severity, finding.frames) == (kind, "error", ["a.xyz, frame 3"])
    assert from_error(DataError("is bad", file="a.xyz")).message == "a.xyz: is bad"
