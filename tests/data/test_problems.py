"""A remedy names the cause, not the first thing that comes to mind."""

from __future__ import annotations

import errno
import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from blip_ft.data.read.problems import symbol_remedy, unreadable
from blip_ft.data.read.sources import load_source
from blip_ft.errors import DataError


def remedy_of(source: str) -> str:
    with pytest.raises(DataError) as caught:
        load_source(source)
    return f"{caught.value.problem} | {caught.value.remedy}"


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        ("D", "write H for deuterium"),
        ("T", "write H for tritium"),
        ("Si1", "did you mean 'Si'?"),
        ("O_w", "did you mean 'O'?"),
        ("Fe2+", "did you mean 'Fe'?"),
        ("Qq", "labels of sites"),
    ],
)
def test_symbols_that_are_no_elements(symbol: str, words: str, tmp_path: Path) -> None:
    assert words in symbol_remedy(symbol)
    (tmp_path / "a.xyz").write_text(f"1\nenergy=-1\nH 0 0 0\n2\nenergy=-1\nH 0 0 0\n{symbol} 0 0 1\n")
    row = {"species": ["H", symbol], "positions": [[0, 0, 0], [0, 0, 1]], "energy": -1.0}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    np.savez(
        tmp_path / "a.npz", symbols=np.array(["H", symbol]), positions=np.zeros((1, 2, 3)), energies=[-1.0]
    )
    for name in ("a.xyz", "a.jsonl", "a.npz"):
        text = remedy_of(str(tmp_path / name))
        assert f"'{symbol.capitalize() if name == 'a.xyz' else symbol}' is not a chemical element" in text
        assert "whole" not in text
        if name != "a.xyz":
            assert words in text
    with pytest.raises(DataError, match="frame 1"):
        load_source(str(tmp_path / "a.xyz"))


@pytest.mark.parametrize(
    ("error", "kind", "frame", "words"),
    [
        (
            ModuleNotFoundError("No module named 'netCDF4'", name="netCDF4"),
            "netcdftrajectory",
            None,
            "pip install netCDF4",
        ),
        (PermissionError(errno.EACCES, "Permission denied"), "traj", None, "may read it"),
        (FileNotFoundError(errno.ENOENT, "gone"), "traj", None, "no longer there"),
        (OSError(errno.EMFILE, "too many"), "traj", None, "ulimit"),
        (OSError(errno.EIO, "I/O error"), "traj", None, "the disk or the network"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "extxyz", None, "no text in UTF-8"),
        (MemoryError(), "json", None, "fit into memory"),
        (NotImplementedError("magnetic"), "cif", None, "ASE does not read this kind"),
        (zlib.error("bad"), "extxyz", None, "packed file is damaged"),
        (gzip.BadGzipFile("not gzip"), "extxyz", None, "its ending names another packer"),
        (RuntimeError("database is locked"), "db", None, "another program is writing"),
        (ValueError("could not convert string"), "vasp-out", 7, "the 7 frames before it can be read (@:7)"),
        (ValueError("could not convert string"), "lammps-dump-text", None, "asterisks or texts in place"),
        (ValueError("cast"), "table", 3, "columns or types"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_causes(error: Exception, kind: str, frame: int | None, words: str) -> None:
    assert words in unreadable("a", error, kind, frame).remedy


def test_a_reader_that_makes_all_frames_first_claims_no_frame(tmp_path: Path) -> None:
    write(tmp_path / "XDATCAR", [Atoms("Si", cell=[3, 3, 3], pbc=True)] * 3, format="vasp-xdatcar")
    text = (tmp_path / "XDATCAR").read_text()
    place = text.rindex("0.0")
    (tmp_path / "XDATCAR").write_text(f"{text[:place]}x.x{text[place + 3 :]}")
    with pytest.raises(DataError) as caught:
        load_source(str(tmp_path / "XDATCAR"))
    assert caught.value.frame is None
    assert "no step has asterisks" in caught.value.remedy


def test_a_label_that_no_unit_has(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("1\nenergy=1e200\nH 0 0 0\n")
    text = remedy_of(str(tmp_path / "a.xyz"))
    assert "1e+200 is no label in any unit" in text
    assert "a mark for a missing value" in text
