"""Charge and spin from every source into graphs, keys, splits and findings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.db
import datasets
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from blip_ft.config import DataConfig
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.batch.ledger import exact_key
from blip_ft.data.check.charge_spin import electron_findings
from blip_ft.data.check.frames import near_duplicates, outliers
from blip_ft.data.check.label_faults import Compared, check_labels
from blip_ft.data.check.sets import check_frames, unit_findings
from blip_ft.data.frame import atoms_key, content_key, fingerprint, row_key, to_atoms
from blip_ft.data.read.schema import FEATURES
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.context import perturbed
from blip_ft.data.split.duplicates import first_same
from blip_ft.data.split.splits import Splits, load_splits
from blip_ft.data.split.splits_file import keys
from blip_ft.data.write.convert import convert
from blip_ft.errors import DataError
from blip_ft.testing.fake import FakeBackbone

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]

STATES = [(0, 1), (1, 2), (-1, 2), (2, 1)]


@pytest.fixture
def charged(frames: Frames) -> list[Atoms]:
    """Four frames of different charge and spin."""
    some = frames(4)
    for atoms, (charge, spin) in zip(some, STATES, strict=True):
        atoms.info = {"charge": charge, "spin": spin}
    return some


def states(rows: datasets.Dataset) -> list[tuple[float | None, float | None]]:
    return list(zip(rows["charge"], rows["spin"], strict=True))


# ---- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz.gz", "a.traj"])
def test_files_of_ase(charged: list[Atoms], save: Save, name: str) -> None:
    rows = load_source(save(charged, name))
    assert states(rows) == STATES
    assert "charge <- charge, spin <- spin" in rows[0]["mapping"]
    for row, (charge, spin) in zip(rows, STATES, strict=True):
        assert to_atoms(row).info == to_atoms(row, labels=False).info == {"charge": charge, "spin": spin}


@pytest.mark.parametrize("where", ["key_value_pairs", "data"])
@pytest.mark.parametrize("names", [("charge", "spin"), ("total_charge", "multiplicity")])
def test_databases(charged: list[Atoms], tmp_path: Path, where: str, names: tuple[str, str]) -> None:
    with ase.db.connect(tmp_path / "a.db") as database:
        for atoms in charged:
            pairs = dict(zip(names, atoms.info.values(), strict=True))
            atoms.info = {}
            database.write(atoms, **{where: pairs})
    assert states(load_source(str(tmp_path / "a.db"))) == STATES


def test_lmdb(charged: list[Atoms], tmp_path: Path) -> None:
    pytest.importorskip("ase_db_backends")
    path = convert(load_source_of(charged, tmp_path), tmp_path / "a.aselmdb")
    assert states(load_source(str(path))) == STATES


def load_source_of(frames: list[Atoms], folder: Path) -> datasets.Dataset:
    write(folder / "source.traj", frames)
    return load_source(str(folder / "source.traj"))


@pytest.mark.parametrize(
    "target", ["a.extxyz", "a.traj", "a.db", "a.parquet", "a.jsonl", "a.json", "a.npz", "folder"]
)
def test_every_format_keeps_them(charged: list[Atoms], tmp_path: Path, target: str) -> None:
    for atoms, theory in zip(charged, ("pbe", "pbe", "r2scan", ""), strict=True):
        atoms.info |= {"head": theory} if theory else {}
    rows = load_source_of(charged, tmp_path)
    assert rows["theory"] == ["pbe", "pbe", "r2scan", ""]
    again = load_source(str(convert(rows, tmp_path / target)))
    assert states(again) == STATES
    assert fingerprint(again) == fingerprint(rows)
    if target != "a.npz":  # holds arrays with a number for each frame
        assert again["theory"] == rows["theory"]


def test_formats_without_them_stay_without(frames: Frames, tmp_path: Path) -> None:
    rows = load_source_of(frames(3), tmp_path)
    for target in ("a.extxyz", "a.db", "a.parquet", "a.jsonl", "a.npz"):
        again = load_source(str(convert(rows, tmp_path / target)))
        assert states(again) == [(None, None)] * 3
        assert again["theory"] == [""] * 3


def test_tables_of_others(charged: list[Atoms], tmp_path: Path) -> None:
    records = [
        {
            "pos": a.positions.tolist(),
            "atomic_numbers": a.numbers.tolist(),
            "cell": a.cell.array.tolist(),
            "energy": -1.0 * i,
            "charge": a.info["charge"],
            "spin": a.info["spin"],
        }
        for i, a in enumerate(charged)
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert states(load_source(str(tmp_path / "a.json"))) == STATES
    for record in records:
        record["q"], record["m"] = record.pop("charge"), record.pop("spin")
    (tmp_path / "b.json").write_text(json.dumps(records))
    assert states(load_source(str(tmp_path / "b.json"))) == [(None, None)] * 4
    assert states(load_source(str(tmp_path / "b.json"), fields={"charge": "q", "spin": "m"})) == STATES


def test_a_charged_structure_of_pymatgen(tmp_path: Path) -> None:
    def record(charge: float | None) -> dict[str, Any]:
        site = {"species": [{"element": "Si", "occu": 1}], "abc": [0, 0, 0], "xyz": [0, 0, 0]}
        lattice = {"matrix": (3.0 * np.eye(3)).tolist()}
        return {"structure": {"lattice": lattice, "sites": [site], "charge": charge}, "energy": -1.0}

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record(c)) for c in (None, 0, -1)))
    # 0 is what pymatgen writes where nobody has set one
    assert load_source(str(tmp_path / "a.jsonl"))["charge"] == [None, None, -1.0]


def test_partial_charges_are_not_the_total_charge(frames: Frames, save: Save) -> None:
    (atoms,) = frames(1)
    atoms.new_array("charge", np.linspace(-1, 1, len(atoms)))
    assert load_source(save([atoms]))["charge"] == [None]


@pytest.mark.parametrize("value", ["positive", float("nan")])
def test_no_number_is_refused(frames: Frames, save: Save, value: object) -> None:
    some = frames(2)
    some[1].info["charge"] = value
    with pytest.raises(DataError, match=r"frames\.xyz, frame 1, field 'charge': the charge is .*no number"):
        load_source(save(some))


def test_two_names_that_differ_are_refused(frames: Frames, save: Save) -> None:
    (atoms,) = frames(1)
    atoms.info = {"charge": 0, "total_charge": 1}
    with pytest.raises(DataError, match="'charge' and 'total_charge' could both be the charge and differ"):
        load_source(save([atoms]))
    assert load_source(save([atoms]), fields={"charge": "total_charge"})["charge"] == [1.0]


# ---- identity ----------------------------------------------------------------------------------


def two_states(frames: Frames) -> list[Atoms]:
    (one,) = frames(1)
    other = one.copy()
    other.calc = one.calc
    one.info, other.info = {"charge": 0, "spin": 1}, {"charge": 1, "spin": 2}
    return [one, other]


def test_keys_of_frames_that_say_nothing_are_those_of_the_geometry(frames: Frames, save: Save) -> None:
    plain = load_source(save(frames(1)))[0]
    one, other = load_source(save(two_states(frames), "b.xyz"))
    geometry = content_key(plain["numbers"], plain["positions"], plain["cell"])
    assert row_key(plain) == row_key(one) == geometry != row_key(other)
    assert [row_key(r) for r in (one, other)] == [atoms_key(to_atoms(r)) for r in (one, other)]
    a, b, c = (to_atoms(row) for row in (plain, one, other))
    assert len({exact_key(x) for x in (a, b, c)}) == 3  # a model may have another default


def test_written_divisions_tell_states_apart(frames: Frames, save: Save) -> None:
    plain, states = load_source(save(frames(1))), load_source(save(two_states(frames), "b.xyz"))
    (bare,), (one, other) = keys(plain), keys(states)
    assert bare == one
    assert not set(one) & set(other)


def test_two_states_of_one_geometry_are_no_twins(frames: Frames, save: Save, tmp_path: Path) -> None:
    pair = two_states(frames)
    assert first_same(pair) == [0, 1]
    assert first_same([pair[0], pair[0].copy(), frames(1)[0]]) == [0, 0, 0]
    pair[1].positions += 0.001
    pair[1].positions[0] += 0.001
    rows = load_source(save(pair))
    assert near_duplicates({"train": rows.select([0]), "test/seen": rows.select([1])}) == []
    alike = load_source(save([a for a in pair if not a.info.clear()], "plain.xyz"))
    assert len(near_duplicates({"train": alike.select([0]), "test/seen": alike.select([1])})) == 1


def test_two_states_may_stand_in_two_roles(frames: Frames, save: Save) -> None:
    one, other = two_states(frames)
    rest = frames(6, seed=7)
    sources = {
        "train": save([one, *rest[:3]], "train.xyz"),
        "validation": save([other], "validation.xyz"),
        "calibration": save(rest[3:5], "calibration.xyz"),
        "test": save(rest[5:], "test.xyz"),
    }
    splits = load_splits(DataConfig(**sources))
    assert splits.validation["charge"] == [1.0]
    other.info = {}
    with pytest.raises(DataError, match="the frame stands in validation"):
        load_splits(DataConfig(**sources | {"validation": save([other], "again.xyz")}))


def test_energies_of_states_are_not_compared(frames: Frames, save: Save) -> None:
    some = frames(60)
    for i, atoms in enumerate(some):
        atoms.info = {"charge": int(i < 4), "spin": 1 + int(i < 4)}
        atoms.calc.results["energy"] = -50.0 + 0.01 * np.sin(i) + 60.0 * (i < 4)
    assert [f for f in outliers(list(load_source(save(some)))) if "energy" in f.message] == []
    for atoms in some:
        atoms.info = {}
    assert [f for f in outliers(list(load_source(save(some, "b.xyz")))) if "energy" in f.message] != []


def test_strained_copies_keep_their_state(frames: Frames) -> None:
    _, cation = two_states(frames)
    cation.info["REF_energy"] = -1.0
    assert perturbed(cation, np.random.default_rng(0)).info == {"charge": 1, "spin": 2}


# ---- the model ---------------------------------------------------------------------------------


def test_they_reach_the_model(charged: list[Atoms], save: Save) -> None:
    backbone = FakeBackbone("charged")
    rows = load_source(save(charged, "a.traj"))
    items = FrameDataset(rows, backbone)
    for i, (atoms, (charge, spin)) in enumerate(zip(charged, STATES, strict=True)):
        assert items[i].graph["electrons"].tolist() == [charge, spin]
        assert items.key(i) == items[i].key == atoms_key(atoms)


def test_a_model_that_takes_them_says_its_default_once(
    charged: list[Atoms], frames: Frames, save: Save
) -> None:
    backbone = FakeBackbone("charged")
    assert electron_findings(load_source(save(charged)), backbone) == []
    (finding,) = electron_findings(load_source(save(frames(3), "b.xyz")), backbone)
    assert (finding.severity, finding.frames) == ("info", [])
    assert finding.message == "no frame has charge, the model takes 0; no frame has spin, the model takes 1"
    del charged[2].info["spin"]
    path = save(charged, "c.xyz")
    (finding,) = electron_findings(load_source(path), backbone)
    assert finding.frames == [f"{path}, frame 2"]
    assert finding.message == "1 frames have no spin, the model takes 1"


def test_a_model_that_does_not_take_them_says_so_once(
    charged: list[Atoms], frames: Frames, save: Save, backbone: FakeBackbone
) -> None:
    assert electron_findings(load_source(save(frames(3))), backbone) == []
    (finding,) = electron_findings(load_source(save(charged, "b.xyz")), backbone)
    assert finding.severity == "warning"
    assert "4 frames have charge and spin, which this fake model does not take" in finding.message
    assert finding.to_json()["frames"] == [1, 2, 3]
    for atoms in charged:
        atoms.info = {"charge": 0, "spin": 1}
    (finding,) = electron_findings(load_source(save(charged, "c.xyz")), backbone)
    assert finding.severity == "info"


class Needy(FakeBackbone):
    """Has no default, as Orb's ``omol`` models."""

    @property
    def conditions(self) -> dict[str, float | None]:
        return {"charge": None, "spin": None}


def test_a_model_without_default_names_the_frame(charged: list[Atoms], save: Save) -> None:
    backbone = Needy("charged")
    del charged[2].info["spin"]
    path = save(charged, "a.traj")
    items = FrameDataset(load_source(path), backbone)
    assert items[1].graph["electrons"].tolist() == [1, 2]
    with pytest.raises(DataError, match=r"a\.traj, frame 2, field 'spin': this fake model needs the spin of"):
        items[2]


def test_the_check_of_all_frames_says_it(charged: list[Atoms], save: Save, backbone: FakeBackbone) -> None:
    spare = load_source("sio2_polymorphs")
    splits = Splits(load_source(save(charged)), *(spare.select([i]) for i in (0, 1)), {}, "")
    found = check_frames(splits, backbone)
    assert ["does not take" in f.message for f in found] == [True]


def test_rows_of_older_tables_lack_the_columns(charged: list[Atoms], save: Save) -> None:
    row = load_source(save(charged))[1]
    old = {k: v for k, v in row.items() if k not in ("charge", "spin", "theory")}
    assert to_atoms(old).info == {}
    assert row_key(old) == content_key(row["numbers"], row["positions"], row["cell"])
    assert {"charge", "spin", "theory"} <= set(FEATURES)


def test_energies_of_states_do_not_look_wrong() -> None:
    """A model that knows no charge: ions differ by a constant, and a wrong energy among them is found."""
    rng = np.random.default_rng(0)
    frames = []
    for i in range(48):
        atoms = Atoms("Si2O4", positions=rng.uniform(0, 5, (6, 3)), cell=[5, 5, 5], pbc=True)
        atoms.info = {"charge": int(i % 6 == 0), "spin": 1 + int(i % 6 == 0)}
        model = float(rng.normal(-30, 2))
        energy = model + 6 * rng.normal(0, 0.004) + 8.0 * atoms.info["charge"] + 0.6 * (i == 12)
        forces = rng.normal(0, 1, (6, 3))
        frames.append(Compared(atoms, energy, forces, None, model, forces))
    faults = check_labels(frames).faults
    assert [(f.index, f.label, f.cause) for f in faults] == [(12, "energy", "offset")]
    for one in frames:
        one.atoms.info = {}
    assert len(check_labels(frames).faults) >= 7


def test_copies_of_two_levels_of_theory_are_named(frames: Frames, save: Save, backbone: FakeBackbone) -> None:
    (one,) = frames(1)
    other = one.copy()
    other.calc = SinglePointCalculator(other, **{**one.calc.results, "energy": -9.0})
    one.info["head"], other.info["head"] = "pbe", "r2scan"
    spare = load_source("sio2_polymorphs")
    splits = Splits(load_source(save([one, other])), *(spare.select([i]) for i in (0, 1)), {}, "")
    (finding,) = (f for f in check_frames(splits, backbone) if "other labels" in f.message)
    assert finding.to_json()["notes"] == ["and frame 0, r2scan and pbe"]


def test_ions_do_not_look_like_another_unit() -> None:
    """Energies of four states lie far apart where the model sees one: within each they have the right unit."""
    rng = np.random.default_rng(0)
    model = rng.normal(-50, 0.3, 16)
    rows = [
        {
            "numbers": [8, 14],
            "energy": e + 10.0 * (i % 4),
            "charge": float(i % 4),
            "spin": None,
            "forces": None,
        }
        | {"stress": None, "source": "a", "frame": i, "pbc": [True] * 3, "cell": np.eye(3)}
        for i, e in enumerate(np.sort(model))
    ]
    predictions = [{"energy": e, "forces": None, "stress": None} for e in np.sort(model)]
    assert unit_findings(rows, predictions, by_state=True) == {}
    rows = [row | {"energy": 23.0605 * row["energy"]} for row in rows]
    assert "kcal/mol" in unit_findings(rows, predictions, by_state=True)["energy"].message
