from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write

from blip_ft.data.frame import fingerprint, grid, to_atoms
from blip_ft.data.read.plan import split_selector
from blip_ft.data.read.schema import FEATURES
from blip_ft.data.read.sources import iterate_frames, load_source
from blip_ft.errors import DataError

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]


def same(dataset: datasets.Dataset, frames: list[Atoms], atol: float = 1e-7) -> None:
    """Structures and labels of a data set are those of the frames."""
    assert len(dataset) == len(frames)
    for row, atoms in zip(dataset, frames, strict=True):
        assert row["numbers"] == atoms.numbers.tolist()
        assert row["pbc"] == atoms.pbc.tolist()
        np.testing.assert_allclose(row["positions"], atoms.positions, atol=atol)
        np.testing.assert_allclose(row["cell"], atoms.cell.array, atol=atol)
        for label, value in atoms.calc.results.items():
            np.testing.assert_allclose(row[label], value, atol=atol)


# ---- ASE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.xyz", "a.extxyz", "a.traj", "a.db", "a.json", "a.xyz.gz", "a.xyz.bz2", "a.xyz.xz"]
)
def test_files_of_ase(frames: Frames, save: Save, name: str) -> None:
    expected = frames(5)
    path = save(expected, name)
    dataset = load_source(path)
    same(dataset, expected)
    assert dataset.features == FEATURES
    assert dataset["source"][:] == [path] * 5
    assert dataset["frame"][:] == list(range(5))


def test_ref_keys_in_info_and_arrays(frames: Frames, renamed: Frames, save: Save) -> None:
    expected = frames(3)
    path = save(renamed(expected, energy="REF_energy", forces="REF_forces", stress="REF_stress"))
    same(load_source(path), expected)


def test_stress_as_nine_numbers_and_as_six(tmp_path: Path) -> None:
    def text(stress: str) -> str:
        return (
            '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 '
            f'pbc="T T T" stress="{stress}"\nO 0 0 0 0 0 0\n'
        )

    (tmp_path / "nine.xyz").write_text(text("1 6 5 6 2 4 5 4 3"))
    (tmp_path / "six.xyz").write_text(text("1 2 3 4 5 6"))
    for name in ("nine.xyz", "six.xyz"):
        assert load_source(str(tmp_path / name))["stress"][0] == [1, 2, 3, 4, 5, 6]


def test_forces_on_constrained_atoms_are_kept(frames: Frames, save: Save) -> None:
    from ase.constraints import FixAtoms

    expected = frames(2)
    for atoms in expected:
        atoms.set_constraint(FixAtoms([0, 1]))
    same(load_source(save(expected, "a.traj")), expected)


def test_molecule_without_cell(tmp_path: Path) -> None:
    (tmp_path / "m.xyz").write_text("2\nenergy=-1.5\nO 0 0 0\nH 0 0 0.97\n")
    row = load_source(str(tmp_path / "m.xyz"))[0]
    assert row["pbc"] == [False] * 3
    assert row["cell"] == [[0.0] * 3] * 3
    assert row["forces"] is None


def test_key_value_pairs_of_a_database(frames: Frames, tmp_path: Path) -> None:
    from ase.db import connect

    with connect(tmp_path / "a.db") as db:
        for i, atoms in enumerate(frames(3)):
            db.write(atoms, phase=f"phase-{i}")
    assert load_source(str(tmp_path / "a.db"))["group"][:] == ["phase-0", "phase-1", "phase-2"]


def test_blank_lines_between_frames_lose_nothing(frames: Frames, save: Save) -> None:
    expected = frames(3)
    path = Path(save(expected))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:8], "\n", *lines[8:], "\n\n"]))
    same(load_source(str(path)), expected)


def test_what_changes_between_info_and_calculator_hurts_labels_only(tmp_path: Path) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = Atoms("O", info={"energy": -2.0})
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    write(tmp_path / "a.traj", [atoms, atoms])
    assert [raw.frame for raw in iterate_frames(str(tmp_path / "a.traj"))] == [0, 1]


def test_windows_line_ends(frames: Frames, save: Save) -> None:
    expected = frames(2)
    path = Path(save(expected))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    same(load_source(str(path)), expected)


# ---- tables ------------------------------------------------------------------------------------


@pytest.fixture
def table(frames: Frames, save: Save) -> datasets.Dataset:
    return load_source(save(frames(4)))


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.json", "folder", "disk", "t.arrow"])
def test_tables(table: datasets.Dataset, frames: Frames, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "disk":
        table.save_to_disk(str(path))
    elif name == "t.arrow":
        table.save_to_disk(str(tmp_path / "for-arrow"))
        path = next((tmp_path / "for-arrow").glob("*.arrow"))
    elif name == "t.parquet":
        table.to_parquet(path)
    elif name.startswith("t.json"):
        table.to_json(path, lines=name.endswith("l"))
    else:
        path.mkdir()
        table.select([0, 1]).to_parquet(path / "part-0.parquet")
        table.select([2, 3]).to_parquet(path / "part-1.parquet")
    found = load_source(str(path))
    same(found, frames(4))
    assert fingerprint(found) == fingerprint(table)
    assert found["frame"][:] == [0, 1, 2, 3]
    assert found["source"][:] == [str(path)] * 4
    assert set(found["split"]) == {""}


@pytest.mark.parametrize("parts", [False, True], ids=["set", "splits"])
@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_saved_format_costs_no_digits_and_no_columns(
    table: datasets.Dataset, tmp_path: Path, kind: str, parts: bool
) -> None:
    odd = table.map(
        lambda row, i: {"energy": -1e4 / 3 - i, "forces": (np.array(row["forces"]) / 3).tolist()},
        with_indices=True,
    )
    saved = odd.with_format(kind, columns=["numbers", "positions", "energy"])
    whole = datasets.DatasetDict({"train": saved, "validation": saved}) if parts else saved
    whole.save_to_disk(str(tmp_path / "saved"))
    found = load_source(f"{tmp_path}/saved@train" if parts else str(tmp_path / "saved"))
    for column in ("numbers", "positions", "cell", "energy", "forces", "stress", "weight"):
        assert found[column][:] == odd[column][:], column


@pytest.mark.parametrize("layout", ["files", "disk"])
def test_splits_of_a_folder(table: datasets.Dataset, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "set"
    parts = {"train": table.select([0, 1, 2]), "validation": table.select([3])}
    if layout == "disk":
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    else:
        folder.mkdir()
        for name, part in parts.items():
            part.remove_columns(["split"]).to_parquet(folder / f"{name}.parquet")
    assert load_source(str(folder))["split"][:] == ["train"] * 3 + ["validation"]
    held = load_source(f"{folder}@valid")
    assert fingerprint(held) == fingerprint(table.select([3]))
    assert held["source"][:] == [f"{folder} (validation)"]
    assert held["frame"][:] == [0]


def test_other_column_names(tmp_path: Path) -> None:
    row = {
        "atomic_numbers": [8, 1],
        "pos": [[0.0, 0, 0], [0, 0, 1]],
        "lattice": [[9.0, 0, 0], [0, 9, 0], [0, 0, 9]],
        "atomic_forces": [[0.0, 0, 1], [0, 0, -1]],
        "cauchy_stress": [[1.0, 0, 0], [0, 2, 0], [0, 0, 3]],
        "run": 3,
    }
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "t.parquet")
    found = load_source(str(tmp_path / "t.parquet"))[0]
    assert found["numbers"] == [8, 1]
    assert found["pbc"] == [True] * 3
    assert found["stress"] == [1, 2, 3, 0, 0, 0]
    assert found["group"] == "3"
    symbols = {k: v for k, v in row.items() if k not in ("atomic_numbers", "lattice", "cauchy_stress")}
    datasets.Dataset.from_list([symbols | {"species": ["O", "H"]}]).to_parquet(tmp_path / "s.parquet")
    found = load_source(str(tmp_path / "s.parquet"))[0]
    assert found["numbers"] == [8, 1]
    assert found["pbc"] == [False] * 3
    assert found["stress"] is None


def test_missing_labels_of_a_table_are_none(tmp_path: Path) -> None:
    rows = [
        {"numbers": [1], "positions": [[0.0, 0, 0]], "energy": 1.0, "forces": None},
        {"numbers": [1], "positions": [[0.0, 0, 1]], "energy": None, "forces": [[0.0, 0, 1]]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    found = load_source(str(tmp_path / "t.parquet"))
    assert found["energy"][:] == [1.0, None]
    assert found["forces"][:] == [None, [[0.0, 0.0, 1.0]]]


# ---- selectors, patterns, lists ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("0:3", [0, 1, 2]),
        (":2", [0, 1]),
        ("4:", [4, 5]),
        ("::2", [0, 2, 4]),
        ("1:5:3", [1, 4]),
        ("-2:", [4, 5]),
        (":-4", [0, 1]),
        ("::-1", [5, 4, 3, 2, 1, 0]),
        ("2", [2]),
        ("-1", [5]),
        ("-6", [0]),
        ("0:100", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_slices(frames: Frames, save: Save, selector: str, expected: list[int]) -> None:
    found = load_source(f"{save(frames(6))}@{selector}")
    assert found["frame"][:] == expected
    same(found, [frames(6)[i] for i in expected])


def test_split_names_select(frames: Frames, save: Save) -> None:
    labelled = frames(4)
    for atoms, split in zip(labelled, ["train", "valid", "train", "odd"], strict=True):
        atoms.info["split"] = split
    path = save(labelled)
    assert load_source(f"{path}@train")["frame"][:] == [0, 2]
    assert load_source(f"{path}@validation")["frame"][:] == [1]
    assert load_source(f"{path}@val")["frame"][:] == [1]
    assert load_source(f"{path}@odd")["frame"][:] == [3]
    with pytest.raises(DataError, match=r"split 'nonsense'.*\n.*odd, train, validation"):
        load_source(f"{path}@nonsense")


def test_bad_frames_that_are_not_selected_do_no_harm(frames: Frames, save: Save) -> None:
    some = frames(4)
    some[3].calc = None
    path = save(some)
    assert len(load_source(f"{path}@0:3")) == 3
    with pytest.raises(DataError, match="frame 3"):
        load_source(path)
    assert len(load_source(path, labels=False)) == 4


def test_patterns_are_sorted_and_slices_apply_to_each_file(
    frames: Frames, save: Save, tmp_path: Path
) -> None:
    for i in (2, 0, 1):
        save(frames(3, seed=i), f"run-{i}.xyz")
    found = load_source(f"{tmp_path}/run-*.xyz@-1")
    same(found, [frames(3, seed=i)[2] for i in range(3)])
    assert [Path(s).name for s in found["source"]] == ["run-0.xyz", "run-1.xyz", "run-2.xyz"]
    assert found["frame"][:] == [2, 2, 2]


def test_lists_keep_their_order(frames: Frames, save: Save) -> None:
    a, b = save(frames(2, seed=1), "a.xyz"), save(frames(3, seed=2), "b.traj")
    same(load_source([b, f"{a}@1"]), [*frames(3, seed=2), frames(2, seed=1)[1]])


def test_a_file_name_may_hold_an_at_sign(frames: Frames, save: Save) -> None:
    path = save(frames(3), "me@home.xyz")
    assert len(load_source(path)) == 3
    assert len(load_source(f"{path}@1:")) == 2
    assert split_selector("a@b@0:3") == ("a@b", "0:3")


def test_home_folder(frames: Frames, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(frames(1), "a.xyz")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_source("~/a.xyz")) == 1


def test_fields_and_units_are_passed_on(frames: Frames, renamed: Frames, save: Save) -> None:
    path = save(renamed(frames(2), energy="E", forces="F"))
    with pytest.raises(DataError, match=r"neither energy nor forces.*\n.*data\.fields.*E, F"):
        load_source(path)
    found = load_source(path, fields={"energy": "E", "forces": "F"}, units={"energy": "meV"})
    assert found["energy"][0] == pytest.approx(1e-3 * frames(2)[0].calc.results["energy"])


# ---- cache and fingerprint ---------------------------------------------------------------------


def test_second_reading_comes_from_the_cache(
    frames: Frames, save: Save, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(frames(3))
    first = load_source(path)
    assert first.cache_files, "memory-mapped"

    def forbidden(*args: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("blip_ft.data.read.files.read_frames", forbidden)
    assert fingerprint(load_source(path)) == fingerprint(first)


def test_a_changed_file_is_read_again_even_with_the_same_size_and_time(
    frames: Frames, save: Save, cache: Path
) -> None:
    path = Path(save(frames(1)))
    before = path.stat()
    first = load_source(str(path))["positions"][0]
    text = path.read_text()
    x = text.splitlines()[2].split()[1]
    path.write_text(text.replace(x, x[:-1] + str((int(x[-1]) + 1) % 10)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert load_source(str(path))["positions"][0] != first


def test_options_are_part_of_the_cache_key(frames: Frames, save: Save, cache: Path) -> None:
    path = save(frames(2))
    plain, scaled = load_source(path), load_source(path, units={"energy": "kcal/mol"})
    assert scaled["energy"][0] == pytest.approx(plain["energy"][0] / 23.0605, rel=1e-4)


def test_a_failed_reading_leaves_no_data_in_the_cache(frames: Frames, save: Save, cache: Path) -> None:
    some = frames(5)
    some[4].calc.results["energy"] = float("nan")
    with pytest.raises(DataError, match="frame 4"):
        load_source(save(some, "a.traj"))
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["a.xyz", "a.traj", "a.db", "a.xyz.gz"])
def test_one_fingerprint_in_every_format(frames: Frames, save: Save, name: str) -> None:
    path = save(frames(4), "reference.xyz")
    reference = fingerprint(load_source(path))
    exact = read(path, ":")  # with as many decimals as extended XYZ keeps
    assert fingerprint(load_source(save(exact, name))) == reference
    assert fingerprint(load_source(save(exact[::-1], name))) != reference


@pytest.mark.parametrize("column", ["positions", "energy", "forces", "stress", "cell"])
def test_fingerprint_sees_every_column(table: datasets.Dataset, column: str) -> None:
    row = table[0]
    value = np.array(row[column], dtype=float)
    value.flat[0] += 1e-4
    changed = datasets.Dataset.from_list([row | {column: value.tolist()}], features=FEATURES)
    assert fingerprint(changed) != fingerprint(table.select([0]))


def test_grid_keeps_decimals_away_from_the_edge() -> None:
    ties = np.arange(-50, 50) * 1e-6 + 5e-7
    for shift in (-1e-15, 1e-15, 1e-12):
        np.testing.assert_array_equal(grid(ties, 1e-6), grid(ties + shift, 1e-6))


def test_nothing_is_printed_and_settings_come_back(
    frames: Frames, save: Save, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets.enable_progress_bars()
    level = datasets.logging.get_verbosity()
    broken = Path(save(frames(1), "b.parquet.xyz")).rename(cache.parent / "broken.parquet")
    capfd.readouterr()
    load_source(save(frames(3)))
    load_source("sio2_polymorphs")
    with pytest.raises(DataError):
        load_source(str(broken))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == level


# ---- hub ---------------------------------------------------------------------------------------


def test_hub_set(table: datasets.Dataset, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    asked = []

    def load_dataset(name: str) -> datasets.DatasetDict:
        asked.append(name)
        return datasets.DatasetDict(
            {"train": table.select([0, 1]).remove_columns("split"), "test": table.select([2, 3])}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert fingerprint(load_source("some-group/some.set_v1")) == fingerprint(table)
    assert load_source("some-group/some.set_v1@train")["split"][:] == ["train", "train"]
    assert set(asked) == {"some-group/some.set_v1"}


def test_hub_set_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"group/set: neither a file .*Couldn't reach the Hub\n.*network"
    ) as caught:
        load_source("group/set@train")
    assert "long story" not in str(caught.value)


@pytest.mark.parametrize("name", ["data/train.xyz", "data/train.parquet", "./data/train", "a/b/c", "train"])
def test_what_is_no_hub_id_is_never_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file or folder"):
        load_source(name)


def test_a_misspelt_file_in_an_existing_folder_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file or folder"):
        load_source("runs/first")


def test_unwritable_cache(
    frames: Frames, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"cache of read data cannot be written.*\n.*HF_DATASETS_CACHE"):
        load_source(save(frames(1)))


def test_compressed_text_of_every_kind_is_the_same(frames: Frames, save: Save, tmp_path: Path) -> None:
    path = Path(save(frames(3)))
    expected = fingerprint(load_source(str(path)))
    for module, ending in ((gzip, "gz"), (bz2, "bz2"), (lzma, "xz")):
        packed = tmp_path / f"p.xyz.{ending}"
        packed.write_bytes(module.compress(path.read_bytes()))
        assert fingerprint(load_source(str(packed))) == expected


def test_round_trip_through_atoms(frames: Frames, tmp_path: Path, save: Save) -> None:
    first = load_source(save(frames(3)))
    write(tmp_path / "again.traj", [to_atoms(row) for row in first])
    assert fingerprint(load_source(str(tmp_path / "again.traj"))) == fingerprint(first)
