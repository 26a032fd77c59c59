from __future__ import annotations

import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from blip_ft.data.frame import fingerprint, to_atoms
from blip_ft.data.read import embedded
from blip_ft.data.read.schema import FEATURES
from blip_ft.data.read.sources import load_source


def test_every_set_is_described_and_not_large() -> None:
    readme = (embedded.path("sio2_polymorphs").parent / "README.md").read_text(encoding="utf-8")
    for name in embedded.SETS:
        path = embedded.path(name)
        assert f"## `{name}`" in readme
        assert path.stat().st_size < 300_000
    assert "MIT" in readme
    assert re.search(r"SHA-256 `[0-9a-f]{64}`", readme)


def test_split_table_of_the_readme_is_true() -> None:
    readme = (embedded.path("sio2_polymorphs").parent / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", readme, re.MULTILINE))
    splits = load_source("sio2_polymorphs")["split"][:]
    assert {name: splits.count(name) for name in table} == {name: int(n) for name, n in table.items()}
    assert len(splits) == sum(map(int, table.values())) == 195


def test_columns_are_the_schema_and_where_frames_come_from() -> None:
    table = pq.read_table(embedded.path("sio2_polymorphs"))
    later = ("weight", "atom_weight", "charge", "spin", "theory", "mapping")
    schema = [name for name in FEATURES if name not in later]
    assert table.column_names == [*schema, "phase", "temperature_K", "trajectory", "step"]
    rows = table.to_pylist()
    assert {row["phase"] for row in rows if row["split"] == "train"} == {"quartz", "cristobalite"}
    for row in rows:
        assert (
            row["group"]
            == row["trajectory"]
            == f"{row['phase']}-{row['temperature_K']}K-{row['trajectory'][-1]}"
        )
        assert row["source"] == "sio2_polymorphs"


def test_content_is_the_frozen_one() -> None:
    assert fingerprint(load_source("sio2_polymorphs")) == FROZEN


FROZEN = "9c6381d01a71c50bf0eebcdc4b9b68b8255eed1ce52bc53f46798128a3155d6f"


def test_labels_are_physical() -> None:
    rows = list(load_source("sio2_polymorphs"))
    for row in rows:
        atoms = to_atoms(row)
        assert sorted(set(row["numbers"])) == [8, 14]
        assert -340 < row["energy"] / len(atoms) < -330
        # pw.x leaves a net force of its grid's size; a swapped row or unit would leave eV/Å
        assert np.abs(atoms.get_forces().sum(axis=0)).max() < 0.02
        assert np.abs(atoms.get_stress()).max() < 0.4
    train = [np.square(row["forces"]) for row in rows if row["split"] == "train"]
    assert np.sqrt(np.concatenate(train).mean()) == pytest.approx(1.35, abs=0.01)
