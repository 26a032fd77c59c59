"""Labelled sets that are not shipped: ``make test-data DATA=DIR`` names their folder."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from blip_ft.backbones.registry import get_adapter
from blip_ft.config import DataConfig
from blip_ft.data.check.sets import check_frames, check_units
from blip_ft.data.frame import fingerprint
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import DataError

pytestmark = pytest.mark.outside_data
Outside = Callable[[str], str]

#: file -> frames, atoms in the smallest and largest, has stress
SETS = {
    "Li_mlearn": (270, 2, 84, True),
    "Si_mlearn": (239, 12, 96, True),
    "MOF_UiO66_mini": (20, 114, 114, True),
    "NH3_BP86": (138, 4, 4, False),
    "NH3_inversion_path": (25, 4, 4, False),
    "SiO2_zeo_BCT": (1500, 48, 48, False),
    "SiO2_zeo_EDI": (1609, 15, 15, False),
    "SiO2_zeo_SOD": (1703, 36, 36, False),
    "SiO2_zeo_MTT_badlabels": (120, 72, 72, False),
    "SiO2_zeo_multi": (492, 15, 120, False),
    "ethanol_rMD17_100": (100, 9, 9, False),
    "sio2_polymorphs_pbe": (195, 6, 12, True),
}


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_set_is_read_whole(outside: Outside, name: str) -> None:
    frames, smallest, largest, stress = SETS[name]
    dataset = load_source(outside(f"{name}.extxyz.gz"))
    assert len(dataset) == frames
    atoms = [len(numbers) for numbers in dataset["numbers"]]
    assert (min(atoms), max(atoms)) == (smallest, largest)
    for row in dataset:
        assert row["energy"] is not None
        assert np.shape(row["forces"]) == (len(row["numbers"]), 3)
        assert (row["stress"] is not None) == stress
        assert row["group"]


def test_embedded_set_is_its_source_text(outside: Outside) -> None:
    path = outside("sio2_polymorphs_pbe.extxyz.gz")
    text = gzip.decompress(Path(path).read_bytes())
    assert hashlib.sha256(text).hexdigest() == (
        "a3fc80029e89a32b004bc5042f53ec5ee0ca57585f76664449b88d1b20208a58"
    )
    assert fingerprint(load_source(path)) == fingerprint(load_source("sio2_polymorphs"))


@pytest.mark.parametrize("name", sorted(set(SETS) - {"NH3_inversion_path"}))
def test_every_set_can_be_divided(outside: Outside, name: str) -> None:
    splits = load_splits(DataConfig(train=outside(f"{name}.extxyz.gz")))
    roles = splits.roles()
    assert {"train", "validation", "calibration", "test/seen"} <= set(roles)
    assert min(len(frames) for frames in roles.values()) >= 1
    assert sum(len(frames) for frames in roles.values()) + len(splits.dropped) == SETS[name][0]


def test_frameworks_are_not_shared_between_roles(outside: Outside) -> None:
    splits = load_splits(DataConfig(train=outside("SiO2_zeo_multi.extxyz.gz")))
    frameworks = [set(frames["group"]) for frames in splits.roles().values()]
    assert sum(map(len, frameworks)) == len(set.union(*frameworks)) == 82


# ---- against a real pretrained model -----------------------------------------------------------


@pytest.fixture(scope="module")
def predict() -> Callable[[list[Atoms]], list[dict[str, Any]]]:
    calculator = get_adapter("sevennet").load("7net-0").stock_calculator()

    def evaluate(atoms_list: list[Atoms]) -> list[dict[str, Any]]:
        results = []
        for atoms in atoms_list:
            copy = atoms.copy()
            copy.calc = calculator
            results.append(
                {
                    "energy": copy.get_potential_energy(),
                    "forces": copy.get_forces(),
                    "stress": copy.get_stress() if copy.pbc.all() else None,
                }
            )
        return results

    return evaluate


SMALL = ["SiO2_zeo_EDI", "NH3_BP86", "ethanol_rMD17_100", "sio2_polymorphs_pbe", "Si_mlearn", "Li_mlearn"]


@pytest.mark.backend("sevennet")
@pytest.mark.parametrize("name", SMALL)
def test_units_of_real_sets_are_right(outside: Outside, predict: Any, name: str) -> None:
    assert check_units(load_source(f"{outside(f'{name}.extxyz.gz')}"), predict) == []


@pytest.mark.backend("sevennet")
@pytest.mark.parametrize(
    ("name", "units", "words"),
    [
        ("SiO2_zeo_EDI", {"forces": "23.0605 * eV/Ang"}, "forces labels look like kcal/mol/Ang"),
        ("NH3_BP86", {"forces": "23.0605 * eV/Ang"}, "forces labels look like kcal/mol/Ang"),
        ("Si_mlearn", {"stress": "-1602.18 * eV/Ang^3"}, "stress labels look like kbar of the wrong sign"),
        ("Li_mlearn", {"forces": "-eV/Ang"}, "gradients"),
    ],
)
def test_wrong_units_of_real_sets_are_named(
    outside: Outside, predict: Any, name: str, units: dict[str, str], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        check_units(load_source(outside(f"{name}.extxyz.gz"), units=units), predict)


@pytest.mark.backend("sevennet")
def test_corrupted_labels_are_noticed(outside: Outside, predict: Any) -> None:
    findings = check_units(load_source(outside("SiO2_zeo_MTT_badlabels.extxyz.gz")), predict)
    assert "label" in {finding.kind for finding in findings}


@pytest.mark.backend("sevennet")
def test_frames_of_real_sets_are_sound(outside: Outside) -> None:
    backbone = get_adapter("sevennet").load("7net-0")
    for name in ("SiO2_zeo_EDI", "ethanol_rMD17_100", "Li_mlearn"):
        findings = check_frames(load_splits(DataConfig(train=outside(f"{name}.extxyz.gz"))), backbone)
        assert not [f for f in findings if f.severity != "info"], name
