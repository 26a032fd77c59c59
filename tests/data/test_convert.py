"""Every format there and back again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from blip_ft.cli import main
from blip_ft.data.frame import fingerprint
from blip_ft.data.read.sources import load_source
from blip_ft.data.write.convert import WRITERS, convert
from blip_ft.errors import BlipError, DataError

Frames = Callable[..., list[Atoms]]


@pytest.fixture
def source(frames: Frames, tmp_path: Path) -> str:
    """Six frames with everything the schema has, in the decimals of extended XYZ."""
    some = frames(6)
    for i, atoms in enumerate(some):
        atoms.info |= {"run": f"run-{i // 2}", "split": ["train", "train", "validation"][i % 3]}
        if i == 1:
            atoms.info["config_weight"] = 0.25
            atoms.arrays["atom_weight"] = np.array([1.0, 0, 2, 1, 1, 1])
    write(tmp_path / "rounded.xyz", some)
    for i, atoms in enumerate(some := read(tmp_path / "rounded.xyz", ":")):
        if i == 4:
            del atoms.calc.results["stress"]
        if i == 5:
            del atoms.calc.results["energy"]
            atoms.calc.results.pop("free_energy", None)
    write(tmp_path / "in.xyz", some)
    return str(tmp_path / "in.xyz")


#: the package for LMDB files comes with fairchem-core
TARGETS = [
    pytest.param(name, marks=pytest.mark.backend("fairchem")) if name == ".aselmdb" else name
    for name in (*sorted(set(WRITERS) - {".npz"}), "folder")
]


@pytest.mark.parametrize("ending", TARGETS)
def test_there_and_back(ending: str, source: str, tmp_path: Path) -> None:
    frames = load_source(source)
    target = tmp_path / ("out" if ending == "folder" else f"out{ending}")
    assert convert(frames, target) == target
    again = load_source(str(target))
    order = list(range(6))
    if ending == "folder":  # one part per split
        order = [i for i in order if frames["split"][i] == "train"] + [2, 5]
    assert fingerprint(again) == fingerprint(frames.select(order))
    for column in ("group", "split", "weight"):
        assert again[column][:] == [frames[column][i] for i in order], column
    assert again["atom_weight"][order.index(1)] == [1, 0, 2, 1, 1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"rounded.xyz", "in.xyz", target.name})


@pytest.mark.parametrize("ending", [t for t in TARGETS if t != "folder"] + [".npz"])
def test_all_digits(ending: str, frames: Frames, tmp_path: Path) -> None:
    """Labels and positions come back bit for bit from every format."""
    some = frames(4)
    for atoms in some:
        labels = atoms.calc.results
        atoms.positions[0] *= 1e-7
        atoms.calc = SinglePointCalculator(
            atoms, **labels | {"energy": labels["energy"] - 183034.27778415725}
        )
    write(tmp_path / "in.traj", some)
    before = load_source(str(tmp_path / "in.traj"))
    after = load_source(str(convert(before, tmp_path / f"out{ending}")))
    for column in ("numbers", "positions", "cell", "pbc", "energy", "forces", "stress"):
        assert after[column][:] == before[column][:], column


def test_npz_holds_frames_of_the_same_atoms(frames: Frames, tmp_path: Path) -> None:
    some = frames(4)
    write(tmp_path / "a.traj", some)
    data = load_source(str(tmp_path / "a.traj"))
    convert(data, tmp_path / "a.npz")
    assert fingerprint(load_source(str(tmp_path / "a.npz"))) == fingerprint(data)
    write(tmp_path / "b.traj", [*some, Atoms("O", info={"energy": -1.0})])
    with pytest.raises(DataError, match="frame 4 differs from the first"):
        convert(load_source(str(tmp_path / "b.traj")), tmp_path / "b.npz")
    del some[1].calc.results["stress"]
    write(tmp_path / "c.traj", some)
    with pytest.raises(DataError, match=r"stress.*3 of 4 have it"):
        convert(load_source(str(tmp_path / "c.traj")), tmp_path / "c.npz")
    assert not (tmp_path / "b.npz").exists()


def test_a_hub_style_folder_has_a_card_that_the_hub_understands(source: str, tmp_path: Path) -> None:
    out = tmp_path / "my_set"
    arguments = ["data", "convert", source, str(out), "--license", "cc0-1.0", "--about", "PBE, made up."]
    assert main(arguments) == 0
    assert sorted(p.name for p in (out / "data").iterdir()) == [
        "train-00000-of-00001.parquet",
        "validation-00000-of-00001.parquet",
    ]
    _, head, body = (out / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(head)
    assert meta["license"] == "cc0-1.0"
    assert meta["configs"][0]["data_files"][1] == {"split": "validation", "path": "data/validation-*.parquet"}
    assert "| frames | train 4, validation 2 |" in body
    assert "PBE, made up." in body
    assert "energy 5, forces 6, stress 5" in body
    assert set(datasets.load_dataset(str(out))) == {"train", "validation"}


def test_command(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.extxyz"
    arguments = ["data", "convert", f"{source}@0:4", str(out), "--unit", "energy=kcal/mol"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "energy <- energy" in printed
    assert f"{out}: 4 frames" in printed
    assert read(out, "0").info["REF_energy"] == pytest.approx(
        load_source(source)["energy"][0] / 23.0605, rel=1e-5
    )
    assert main(arguments) == 2
    assert "this file exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    for bad in (
        ["--unit", "energy"],
        ["--unit", "enrgy=eV"],
        ["--field", "enrgy=E"],
        ["--unit", "energy=GPa"],
    ):
        assert main(["data", "convert", source, str(tmp_path / "x.xyz"), *bad]) == 2
        assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "x.xyz").exists()


def test_command_names_what_it_leaves(
    frames: Frames, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = frames(4)
    for atoms in some:
        atoms.info["TotEnergy"] = atoms.calc.results.pop("energy")
    some[2].info["scf_converged"] = False
    write(tmp_path / "in.traj", some)
    assert main(["data", "convert", str(tmp_path / "in.traj"), str(tmp_path / "out.parquet")]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("out.parquet: 3 frames\n")
    assert "in.traj, frame 2: not converged" in err
    assert "nothing uses 'TotEnergy'" in err


def test_unknown_ending_and_no_space(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = load_source(source)
    with pytest.raises(DataError, match=r"cannot write '\.docx'.*\n.*\.parquet"):
        convert(frames, tmp_path / "a.docx")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "to_parquet", full)
    for name in ("a.parquet", "folder"):
        with pytest.raises(BlipError, match="cannot write: No space left"):
            convert(frames, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.xyz", "rounded.xyz"]
