"""Every layout that is known by name, with the numbers that must come out."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from ase import Atoms, units
from ase.io import write

from blip_ft.config import SourceConfig
from blip_ft.data.batch.shards import make_grid
from blip_ft.data.frame import fingerprint
from blip_ft.data.read.layouts import flatten, from_pymatgen, recognise
from blip_ft.data.read.plan import plan
from blip_ft.data.read.sources import iterate_source, load_source, mappings
from blip_ft.errors import DataError

Frames = Callable[..., list[Atoms]]
KBAR = 0.1 * units.GPa


def pymatgen(atoms: Atoms) -> dict[str, Any]:
    """As pymatgen serialises a structure, without importing it."""
    return {
        "@module": "pymatgen.core.structure",
        "lattice": {"matrix": atoms.cell.array.tolist(), "pbc": [True] * 3},
        "sites": [
            {
                "species": [{"element": s, "occu": 1}],
                "abc": abc.tolist(),
                "xyz": xyz.tolist(),
                "properties": {},
            }
            for s, abc, xyz in zip(
                atoms.get_chemical_symbols(),
                atoms.cell.scaled_positions(atoms.positions),
                atoms.positions,
                strict=True,
            )
        ],
    }


def matpes(atoms: Atoms, i: int) -> dict[str, Any]:
    results = atoms.calc.results
    return {
        "matpes_id": f"matpes-20240214_{i}",
        "elements": ["O", "Si"],
        "structure": pymatgen(atoms),
        "energy": results["energy"],
        "forces": results["forces"].tolist(),
        "stress": (-results["stress"] / KBAR).tolist(),
        "cohesive_energy_per_atom": -4.2,
        "provenance": {"original_mp_id": f"mp-{i // 2}", "md_step": i},
    }


def mptrj(atoms: Atoms, i: int) -> dict[str, Any]:
    record = matpes(atoms, i)
    stress = np.asarray(record.pop("stress"))
    full = [
        [stress[0], stress[5], stress[4]],
        [stress[5], stress[1], stress[3]],
        [stress[4], stress[3], stress[2]],
    ]
    return {
        "structure": record["structure"],
        "uncorrected_total_energy": record["energy"],
        "force": record["forces"],
        "stress": full,
        "magmom": None,
    }


def colabfit(atoms: Atoms, i: int) -> dict[str, Any]:
    s = atoms.calc.results["stress"]
    return {
        "property_id": f"PO_{i}",
        "configuration_id": f"CO_{i}",
        "dataset_id": "DS_1",
        "elements": ["O", "Si"],
        "atomic_numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.array.tolist(),
        "pbc": [True] * 3,
        "energy": atoms.calc.results["energy"],
        "atomic_forces": atoms.calc.results["forces"].tolist(),
        "cauchy_stress": [[s[0], s[5], s[4]], [s[5], s[1], s[3]], [s[4], s[3], s[2]]],
        "cauchy_stress_volume_normalized": False,
        "formation_energy": None,
        "chemical_formula_hill": "O4Si2",
    }


def omat(atoms: Atoms, i: int) -> dict[str, Any]:
    s = atoms.calc.results["stress"]
    return {
        "pos": atoms.positions.tolist(),
        "atomic_numbers": atoms.numbers.tolist(),
        "cell": [atoms.cell.array.tolist()],
        "pbc": [[True] * 3],
        "natoms": len(atoms),
        "energy": [atoms.calc.results["energy"]],
        "forces": atoms.calc.results["forces"].tolist(),
        "stress": [[[s[0], s[5], s[4]], [s[5], s[1], s[3]], [s[4], s[3], s[2]]]],
        "sid": f"agm{i}",
    }


def lemat(atoms: Atoms, i: int) -> dict[str, Any]:
    return {
        "elements": ["O", "Si"],
        "species": '[{"name": "Si"}]',
        "species_at_sites": atoms.get_chemical_symbols(),
        "cartesian_site_positions": atoms.positions.tolist(),
        "lattice_vectors": atoms.cell.array.tolist(),
        "dimension_types": [1, 1, 1],
        "energy": atoms.calc.results["energy"],
        "forces": atoms.calc.results["forces"].tolist(),
        "stress_tensor": None,
    }


@pytest.fixture
def reference(frames: Frames, tmp_path: Path) -> str:
    path = tmp_path / "reference.traj"
    write(path, frames(6))
    return str(path)


RECORDS: dict[str, Callable[[Atoms, int], dict[str, Any]]] = {
    "MatPES": matpes,
    "MPtrj": mptrj,
    "ColabFit": colabfit,
    "fairchem": omat,
}


@pytest.mark.parametrize("layout", RECORDS)
@pytest.mark.parametrize("ending", [".json", ".json.gz", ".jsonl", ".parquet"])
def test_records_of_known_layouts(
    layout: str, ending: str, frames: Frames, reference: str, tmp_path: Path
) -> None:
    records = [RECORDS[layout](atoms, i) for i, atoms in enumerate(frames(6))]
    path = tmp_path / f"set{ending}"
    if ending == ".parquet":
        for record in records:
            for site in record.get("structure", {}).get("sites", []):
                site.pop("properties")  # parquet has no empty records
        datasets.Dataset.from_list(records).to_parquet(path)
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    else:
        text = json.dumps(records).encode()
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    found = load_source(str(path))
    assert fingerprint(found) == fingerprint(load_source(reference))
    (said,) = mappings(found)
    assert said.startswith(f"{path}: {layout}: energy <- ")
    if layout in ("MatPES", "MPtrj"):
        assert "stress <- stress [-1 * kbar]" in said
    if layout == "MatPES":
        assert found["group"][:] == ["mp-0", "mp-0", "mp-1", "mp-1", "mp-2", "mp-2"]


def test_records_nested_by_id(frames: Frames, reference: str, tmp_path: Path) -> None:
    a = frames(6)
    tree = {f"mp-{k}": {f"mp-{k}-{i}": mptrj(a[2 * k + i], i) for i in (0, 1)} for k in range(3)}
    (tmp_path / "mptrj.json").write_text(json.dumps(tree, indent=1))
    found = load_source(str(tmp_path / "mptrj.json"))
    assert fingerprint(found) == fingerprint(load_source(reference))
    assert found["group"][:] == ["mp-0", "mp-0", "mp-1", "mp-1", "mp-2", "mp-2"]


def test_optimade_records_have_forces_and_no_stress(frames: Frames, tmp_path: Path) -> None:
    (tmp_path / "lemat.jsonl").write_text(
        "".join(json.dumps(lemat(a, i)) + "\n" for i, a in enumerate(frames(2)))
    )
    found = load_source(str(tmp_path / "lemat.jsonl"))
    np.testing.assert_allclose(found["forces"][0], frames(2)[0].calc.results["forces"])
    assert found["stress"][0] is None
    assert found["mapping"][0].startswith("OPTIMADE")


def test_two_energies_of_mptrj_are_not_guessed_between(frames: Frames, tmp_path: Path) -> None:
    record = mptrj(frames(1)[0], 0) | {"corrected_total_energy": -60.0}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(
        DataError, match=r"'uncorrected_total_energy' and 'corrected_total_energy' could both"
    ):
        load_source(str(tmp_path / "a.json"))
    found = load_source(str(tmp_path / "a.json"), fields={"energy": "corrected_total_energy"})
    assert found["energy"][:] == [-60.0]


def test_units_that_colabfit_states_are_used_and_the_recipe_comes_first(
    frames: Frames, tmp_path: Path
) -> None:
    a = frames(1)[0]
    record = colabfit(a, 0) | {"energy_unit": "kcal/mol", "atomic_forces_unit": "eV/angstrom"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    found = load_source(str(tmp_path / "a.jsonl"))
    assert found["energy"][0] == pytest.approx(a.calc.results["energy"] * units.kcal / units.mol)
    assert "energy <- energy [kcal/mol]" in found["mapping"][0]
    given = load_source(str(tmp_path / "a.jsonl"), units={"energy": "Hartree"})
    assert given["energy"][0] == pytest.approx(a.calc.results["energy"] * units.Hartree)
    (tmp_path / "b.jsonl").write_text(json.dumps(record | {"energy_unit": "furlong"}))
    with pytest.raises(DataError, match=r"frame 0.*ColabFit layout gives a unit that is not known"):
        load_source(str(tmp_path / "b.jsonl"))


def test_a_stress_that_may_be_a_virial_is_not_guessed(frames: Frames, tmp_path: Path) -> None:
    a = frames(1)[0]
    record = colabfit(a, 0) | {"cauchy_stress_volume_normalized": True}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match="stress or virial, nobody can tell"):
        load_source(str(tmp_path / "a.jsonl"))
    as_stress = load_source(str(tmp_path / "a.jsonl"), fields={"stress": "cauchy_stress"})["stress"][0]
    np.testing.assert_allclose(as_stress, a.calc.results["stress"])
    as_virial = load_source(str(tmp_path / "a.jsonl"), fields={"virial": "cauchy_stress"})["stress"][0]
    np.testing.assert_allclose(as_virial, -a.calc.results["stress"] / a.get_volume())


# ---- MACE --------------------------------------------------------------------------------------


def mace(frames: list[Atoms]) -> list[Atoms]:
    out = []
    for atoms in frames:
        copy, results = atoms.copy(), atoms.calc.results
        s = results["stress"] * -atoms.get_volume()
        copy.info["REF_energy"] = results["energy"]
        copy.info["REF_virials"] = np.array([[s[0], s[5], s[4]], [s[5], s[1], s[3]], [s[4], s[3], s[2]]])
        copy.arrays["REF_forces"] = results["forces"]
        out.append(copy)
    return out


def test_virials_of_mace_become_stresses(frames: Frames, tmp_path: Path) -> None:
    write(tmp_path / "a.xyz", mace(frames(3)))
    found = load_source(str(tmp_path / "a.xyz"))
    for row, atoms in zip(found, frames(3), strict=True):
        np.testing.assert_allclose(row["stress"], atoms.calc.results["stress"], atol=1e-8)
    assert "stress <- REF_virials (virial)" in found["mapping"][0]
    turned = load_source(str(tmp_path / "a.xyz"), units={"virial": "-1 * eV"})
    np.testing.assert_allclose(turned["stress"][0], -np.array(found["stress"][0]))


def test_weights_of_frames_atoms_and_labels(frames: Frames, tmp_path: Path) -> None:
    some = mace(frames(3))
    some[0].info["config_weight"] = 2.5
    some[1].info["config_forces_weight"] = 0.0
    some[2].arrays["atom_weight"] = np.array([1.0, 0, 0, 2, 1, 1])
    write(tmp_path / "a.xyz", some)
    found = load_source(str(tmp_path / "a.xyz"))
    assert found["weight"][:] == [2.5, 1.0, 1.0]
    assert [f is None for f in found["forces"]] == [False, True, False]
    assert found["atom_weight"][:] == [None, None, [1, 0, 0, 2, 1, 1]]


@pytest.mark.parametrize(
    ("info", "field", "words"),
    [
        ({"config_weight": -1.0}, "config_weight", "must be positive"),
        ({"config_weight": 0.0}, "config_weight", "must be positive"),
        ({"config_energy_weight": 3.0}, "config_energy_weight", "only 0"),
    ],
)
def test_bad_weights(info: dict[str, float], field: str, words: str, frames: Frames, tmp_path: Path) -> None:
    (some,) = mace(frames(1))
    some.info |= info
    write(tmp_path / "a.xyz", some)
    with pytest.raises(DataError, match=words) as caught:
        load_source(str(tmp_path / "a.xyz"))
    assert caught.value.field == field


# ---- npz ---------------------------------------------------------------------------------------


def zeolite(frames: list[Atoms], **changes: Any) -> dict[str, Any]:
    return {
        "positions": np.array([a.positions for a in frames]),
        "energies": np.array([a.calc.results["energy"] for a in frames]),
        "forces": np.array([a.calc.results["forces"] for a in frames]),
        "symbols": np.array(frames[0].get_chemical_symbols()),
        "cells": np.array([a.cell.array for a in frames]),
    } | changes


@pytest.mark.parametrize("kind", [str, object])
@pytest.mark.parametrize("count", [1, 3, 6])
def test_zeolite_archives(kind: type, count: int, frames: Frames, tmp_path: Path) -> None:
    some = frames(count)
    arrays = zeolite(some)
    np.savez(tmp_path / "edi.npz", **(arrays | {"symbols": arrays["symbols"].astype(kind)}))
    found = load_source(str(tmp_path / "edi.npz"))
    for atoms in some:
        atoms.calc.results.pop("stress")
    write(tmp_path / "same.traj", some)
    assert fingerprint(found) == fingerprint(load_source(str(tmp_path / "same.traj")))
    assert found["mapping"][0].startswith("Si-ZEO22: energy <- energy, forces <- forces")
    assert found["pbc"][0] == [True] * 3


def test_rmd17_is_in_kcal_per_mol(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "nuclear_charges": np.array([8, 1, 1], dtype=np.uint8),
        "coords": rng.normal(size=(4, 3, 3)),
        "energies": rng.normal(size=4),
        "forces": rng.normal(size=(4, 3, 3)),
        "old_indices": np.arange(4.0),
    }
    np.savez(tmp_path / "rmd17.npz", **arrays)
    found = load_source(str(tmp_path / "rmd17.npz"))
    np.testing.assert_allclose(found["forces"], arrays["forces"] * units.kcal / units.mol)
    np.testing.assert_allclose(found["energy"], arrays["energies"] * units.kcal / units.mol)
    assert found["pbc"][0] == [False] * 3
    assert "forces <- forces [kcal/mol/Ang]" in found["mapping"][0]
    (tmp_path / "md17.npz").write_bytes(b"")
    np.savez(
        tmp_path / "md17.npz",
        z=arrays["nuclear_charges"],
        R=arrays["coords"],
        E=arrays["energies"][:, None],
        F=arrays["forces"],
        name="water",
    )
    assert fingerprint(load_source(str(tmp_path / "md17.npz"))) == fingerprint(found)


def test_other_names_by_an_explicit_map(frames: Frames, reference: str, tmp_path: Path) -> None:
    some = frames(6)
    np.savez(
        tmp_path / "own.npz",
        Z=some[0].numbers,
        xyz=np.array([a.positions for a in some]),
        box=some[0].cell.array,
        V=np.array([a.calc.results["energy"] for a in some]),
        grad=np.array([-a.calc.results["forces"] for a in some]),
        sigma=np.array([a.calc.results["stress"] for a in some]),
    )
    fields = {
        "numbers": "Z",
        "positions": "xyz",
        "cell": "box",
        "energy": "V",
        "forces": "grad",
        "stress": "sigma",
    }
    with pytest.raises(DataError, match=r"no array of positions; there are: V, Z, box, grad, sigma, xyz"):
        load_source(str(tmp_path / "own.npz"))
    found = load_source(str(tmp_path / "own.npz"), fields=fields, units={"forces": "-1 * eV/Ang"})
    assert fingerprint(found) == fingerprint(load_source(reference))
    with pytest.raises(DataError, match=r"no frame has 'W', which data\.fields names for weight"):
        load_source(str(tmp_path / "own.npz"), fields=fields | {"weight": "W"})


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"energies": np.zeros(2)}, "field 'energies': 2 entries for 3 frames"),
        ({"positions": np.zeros((3, 6))}, r"field 'positions'"),
        ({"symbols": np.array(["Si", "O"])}, "frame 0"),
        ({"symbols": np.array([Hostile()] * 6, dtype=object)}, "refused to load"),
        ({"symbols": np.array([["Si"], ["O", "O"]], dtype=object)}, "holds Python objects"),
    ],
)
def test_bad_archives(
    changes: dict[str, Any], words: str, frames: Frames, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bad.npz", **zeolite(frames(3), **changes))
    with pytest.raises(DataError, match=words) as caught:
        load_source(str(tmp_path / "bad.npz"))
    assert caught.value.file == str(tmp_path / "bad.npz")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"PK\x03\x04cut", b"hello", pickle.dumps({"positions": 1})])
def test_no_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as npz"):
        load_source(str(tmp_path / "bad.npz"))


# ---- LMDB --------------------------------------------------------------------------------------


@pytest.fixture
def lmdb_shards(frames: Frames, tmp_path: Path) -> Path:
    from ase_db_backends import aselmdb as backend

    folder = tmp_path / "omat"
    folder.mkdir()
    for shard in (0, 1):
        database = backend.LMDBDatabase(folder / f"data.{shard:04d}.aselmdb", use_lock_file=False)
        for i in range(3):
            database.write(frames(6)[3 * shard + i], data={"calc_id": i, "sid": f"agm{i}"})
        database.close()
    return folder


@pytest.mark.backend("fairchem")
def test_lmdb_files_and_folders(lmdb_shards: Path, reference: str) -> None:
    expected = fingerprint(load_source(reference))
    assert fingerprint(load_source(str(lmdb_shards))) == expected
    assert fingerprint(load_source(f"{lmdb_shards}/*.aselmdb")) == expected
    assert load_source(str(lmdb_shards))["source"][-1] == f"{lmdb_shards}/data.0001.aselmdb"


@pytest.mark.backend("fairchem")
def test_streams_of_lmdb_files_write_nothing(lmdb_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lmdb

    opened: list[dict[str, Any]] = []
    real = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *a, **k: (opened.append(k), real(*a, **k))[1])
    before = {p.name: p.stat().st_mtime_ns for p in lmdb_shards.iterdir() if not p.name.endswith("-lock")}
    for file in lmdb_shards.glob("*-lock"):
        file.unlink()
    grid = make_grid(plan(f"{lmdb_shards}/*.aselmdb", digest=False), 6, 2)
    assert grid is not None
    assert sum(1 for group in grid for lane in group for rows in lane.files for _ in rows()) == 6
    assert opened
    assert all(k["readonly"] and not k["lock"] for k in opened)
    assert {p.name: p.stat().st_mtime_ns for p in lmdb_shards.iterdir()} == before


@pytest.mark.backend("fairchem")
def test_damaged_lmdb(lmdb_shards: Path) -> None:
    (lmdb_shards / "data.0002.aselmdb").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match=r"data\.0002\.aselmdb: cannot be read as aselmdb"):
        load_source(str(lmdb_shards))


def test_without_the_backend_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ase_db_backends.aselmdb", None)
    (tmp_path / "a.aselmdb").write_bytes(b"x")
    with pytest.raises(DataError, match=r"not installed\n.*blip-ft\[lmdb\]"):
        load_source(str(tmp_path / "a.aselmdb"))


# ---- options of one source ---------------------------------------------------------------------


def test_sources_with_options_of_their_own(frames: Frames, tmp_path: Path) -> None:
    some = frames(2)
    write(tmp_path / "a.traj", some)
    for atoms in some:
        atoms.calc.results["forces"] = atoms.calc.results["forces"] / (units.Hartree / units.Bohr)
        order = atoms.calc.results["stress"]
        atoms.calc.results["stress"] = order[[0, 1, 2, 5, 3, 4]]
    write(tmp_path / "b.traj", some)
    spec = [
        str(tmp_path / "a.traj"),
        SourceConfig(path=str(tmp_path / "b.traj"), units={"forces": "Hartree/Bohr"}, stress_order="vasp"),
    ]
    found = load_source(spec)
    np.testing.assert_allclose(found["forces"][:2], found["forces"][2:])
    assert found["stress"][0] == found["stress"][2] == frames(2)[0].calc.results["stress"].tolist()
    assert fingerprint(datasets.Dataset.from_list(list(iterate_source(spec)), features=found.features)) == (
        fingerprint(found)
    )


def test_options_of_the_hub_reach_the_hub(
    frames: Frames, reference: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    asked = []
    table = load_source(reference)

    def load_dataset(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = SourceConfig(path="group/set", config="pbe", revision="v1.2")
    assert fingerprint(load_source(spec)) == fingerprint(table)
    assert set(map(str, asked)) == {str(("group/set", {"name": "pbe", "revision": "v1.2"}))}
    with pytest.raises(DataError, match="only a set on the hub has that"):
        load_source(SourceConfig(path=reference, revision="v1.2"))
    with pytest.raises(DataError, match="selector and the option split"):
        load_source(SourceConfig(path=f"{reference}@train", split="test"))


# ---- parts -------------------------------------------------------------------------------------


def test_nested_names() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "atoms": {"numbers": [1]}, "x": 2}) == {
        "a.b.c": 1,
        "numbers": [1],
        "x": 2,
    }


def test_a_shared_site_is_refused(frames: Frames) -> None:
    structure = pymatgen(frames(1)[0])
    structure["sites"][1]["species"] = [{"element": "Si", "occu": 0.5}, {"element": "Al", "occu": 0.5}]
    with pytest.raises(ValueError, match="shared by several species"):
        from_pymatgen(structure)
    with pytest.raises(ValueError, match="not a pymatgen structure"):
        from_pymatgen({"lattice": {}, "sites": []})


def test_plain_results_are_no_special_layout() -> None:
    assert recognise({"energy", "forces", "stress"}).name == "plain"
    assert recognise({"REF_energy"}).name == "MACE"
