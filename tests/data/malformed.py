"""Inputs that nobody should be able to train on: the table of ``test_malformed.py``.

Each entry makes a file (or folder) below a path and gives what to read. ``HEAD``, ``ROWS`` and
``GOOD`` are the pieces of a good frame that the bad ones are made from.
"""

from __future__ import annotations

import bz2
import gzip
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

HEAD = 'Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="T T T"'
ROWS = "Si 0.0 0.0 0.0 0.1 0.0 0.0\nO  1.6 0.0 0.0 -0.1 0.0 0.0\n"
GOOD = f"2\n{HEAD}\n{ROWS}"
ROW = {"numbers": [14, 8], "positions": [[0.0, 0, 0], [1.6, 0, 0]], "energy": -1.0}


@dataclass(frozen=True)
class Malformed:
    """One input.

    Attributes:
        name: of the file, and of the case.
        content: bytes or text of the file, or a function that makes it at a path.
        words: pattern of what must be said.
        frame: number of the frame that must be named, where one can be.
        field: field that must be named, where one can be.
        spec: what to read, relative to the folder; by default the file itself.
    """

    name: str
    content: str | bytes | Callable[[Path], None]
    words: str
    frame: int | None = None
    field: str | None = None
    spec: str = ""

    def make(self, folder: Path) -> str:
        """Write it; the source to read."""
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content if isinstance(self.content, bytes) else self.content.encode())
        return str(folder / self.spec) if self.spec else str(path)


def frame(head: str = HEAD, rows: str = ROWS, n: int | str = 2) -> str:
    """A good frame followed by one with other parts."""
    return f"{GOOD}{n}\n{head}\n{rows}"


def lines(**changes: object) -> str:
    """JSON lines: a good frame, then one with other values; ``None`` removes a key."""
    bad = {k: v for k, v in {**ROW, **changes}.items() if v is not None}
    return f"{json.dumps(ROW)}\n{json.dumps(bad)}\n"


def shards(*contents: list[dict[str, object]] | bytes) -> Callable[[Path], None]:
    """A folder of parquet shards."""

    def make(path: Path) -> None:
        path.mkdir()
        for i, content in enumerate(contents):
            shard = path / f"part-{i}.parquet"
            if isinstance(content, bytes):
                shard.write_bytes(content)
            else:
                datasets.Dataset.from_list(content).to_parquet(shard)

    return make


def changing(path: Path) -> None:
    """One parquet file whose row groups were written from tables with other columns: the bytes of the
    second table replace the tail of the first.
    """
    first, second = path.with_suffix(".a"), path.with_suffix(".b")
    datasets.Dataset.from_list([ROW] * 50).to_parquet(first)
    datasets.Dataset.from_list([{"numbers": ["Si"], "energy": "low"}] * 50).to_parquet(second)
    a, b = first.read_bytes(), second.read_bytes()
    path.write_bytes(a[: len(a) // 2] + b[len(b) // 2 :])
    first.unlink()
    second.unlink()


def cut(maker: Callable[[Path], None], keep: float) -> Callable[[Path], None]:
    """The first part of what ``maker`` writes."""

    def make(path: Path) -> None:
        maker(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data))])

    return make


def trajectory(path: Path) -> None:
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    atoms = Atoms("SiO", ROW["positions"])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((2, 3)))
    write(path, [atoms] * 5)


def parquet(path: Path) -> None:
    datasets.Dataset.from_list([ROW] * 20).to_parquet(path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.xyz", GOOD)


def npz(**arrays: object) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **{k: np.asarray(v) for k, v in arrays.items()})


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not found</body></html>\n"
NOWHERE = HEAD.replace("Lattice", "Box")

TABLE = [
    # ---- text that is not what its name says
    Malformed("page.xyz", PAGE, "should be a number of atoms", 0),
    Malformed("page.parquet", PAGE, "cannot be read as parquet"),
    Malformed("pointer.xyz", LFS, "should be a number of atoms", 0),
    Malformed("pointer.parquet", LFS, "cannot be read as parquet"),
    Malformed("utf16.xyz", GOOD.encode("utf-16"), "cannot be read"),
    Malformed("zeros.xyz", bytes(400), "should be a number of atoms"),
    Malformed("zip.xyz.gz", zipped, "cannot be read"),
    Malformed("double.xyz.gz", gzip.compress(gzip.compress(GOOD.encode())), "cannot be read"),
    Malformed("nothing.xyz.gz", gzip.compress(b""), "neither a structure file"),
    Malformed("cut.xyz.bz2", bz2.compress(GOOD.encode() * 99)[:-30], "cannot be read"),
    Malformed("sqlite.db", b"SQLite format 3\x00" + bytes(200), "not a database"),
    Malformed("cut.traj", cut(trajectory, 0.5), "cannot be read"),
    Malformed("cut_foot.parquet", cut(parquet, 0.9), "cannot be read as parquet"),
    Malformed("changing.parquet", changing, "cannot be read as parquet"),
    Malformed("vasprun.xml", "<modeling><calculation>", "cannot be read as vasp-xml"),
    Malformed("OUTCAR", " vasp.6.3.0\n POTCAR: PAW_PBE Si\n", "Incomplete OUTCAR"),
    Malformed("mixed.xyz", GOOD + "data_cif\n_cell_length_a 5\n", "should be a number of atoms", 1),
    # ---- counts
    Malformed("million.xyz", frame(n=10**6), "announces 1000000 atoms and the file ends after 2", 1),
    Malformed("astronomic.xyz", frame(n=10**30), "announces 10+ atoms and the file ends after 2", 1),
    Malformed("digits.xyz", frame(n="9" * 5000), "announces 9+ atoms and the file ends after 2", 1),
    Malformed("fraction.xyz", frame(n="2.5"), "should be a number of atoms", 1),
    Malformed("fewer.xyz", frame(n=1), "should be a number of atoms", 2),
    # ---- numbers
    Malformed("inf_position.xyz", frame(rows=ROWS.replace("1.6", "inf")), "NaN or infinite", 1, "positions"),
    Malformed("huge_force.xyz", frame(rows=ROWS.replace("-0.1", "1e999")), "NaN or infinite", 1, "forces"),
    Malformed("comma.xyz", frame(rows=ROWS.replace("1.6", "1,6")), "cannot be read as extxyz", 1),
    Malformed("fortran.xyz", frame(rows=ROWS.replace("1.6", "******")), "cannot be read as extxyz", 1),
    # ---- cells
    Malformed("zero_cell.xyz", frame(HEAD.replace("5", "0")), "do not span a cell", 1, "cell"),
    Malformed("plane.xyz", frame(HEAD.replace("0 0 0 5", "0 5 0 0")), "do not span a cell", 1, "cell"),
    Malformed("nan_cell.xyz", frame(HEAD.replace('"5', '"nan')), "NaN", 1),
    Malformed("eight.xyz", frame(HEAD.replace('0 5"', '0"')), "cannot be read as extxyz", 1),
    Malformed("no_lattice.xyz", frame(NOWHERE), "do not span a cell", 1, "cell"),
    # ---- tables
    Malformed(
        "swapped_axes.jsonl", lines(positions=[[0.0, 1.6], [0, 0], [0, 0]]), "expected", 1, "positions"
    ),
    Malformed("swapped_forces.jsonl", lines(forces=[[0.0, 1], [0, 0], [0, 0]]), "expected", 1, "forces"),
    Malformed("forces_of_one.jsonl", lines(forces=[[0.0, 0, 0]]), r"shape \(1, 3\)", 1, "forces"),
    Malformed("energies.jsonl", lines(energy=[1.0, 2.0]), "expected one number", 1, "energy"),
    Malformed("energy_text.jsonl", lines(energy="low"), "not a number", 1, "energy"),
    Malformed("energy_map.jsonl", lines(energy={"value": 1}), "neither energy nor forces", 1),
    Malformed("nothing_known.jsonl", lines(energy=None), "neither energy nor forces", 1, "energy, forces"),
    Malformed("stress_5.jsonl", lines(stress=[1.0] * 5), r"shape \(5,\)", 1, "stress"),
    Malformed(
        "stress_asymmetric.jsonl",
        lines(stress=[[1, 2, 3], [0, 1, 0], [0, 0, 1]]),
        "not symmetric",
        1,
        "stress",
    ),
    Malformed("number_0.jsonl", lines(numbers=[14, 0]), "0 is not an atomic number", 1, "numbers"),
    Malformed("number_200.jsonl", lines(numbers=[14, 200]), "200 is not an atomic number", 1, "numbers"),
    Malformed("number_negative.jsonl", lines(numbers=[14, -8]), "-8 is not an atomic number", 1, "numbers"),
    Malformed("no_atoms.jsonl", lines(numbers=[], positions=[]), "has no atoms", 1),
    Malformed("weight.jsonl", lines(config_weight=-1.0), "must be positive", 1),
    Malformed("cut_line.jsonl", lines()[:-20], "cannot be read"),
    Malformed("scalar.json", "3", "neither records"),
    Malformed("null.json", "null", "neither records"),
    Malformed("empty_list.json", "[]", "no frames in it"),
    Malformed("list_of_numbers.json", "[1, 2]", "a row is a record"),
    # ---- folders
    Malformed("folder/readme.txt", "hello", "no parquet, arrow or json table", spec="folder"),
    Malformed("shards_zero", shards([ROW], b""), "cannot be read as table"),
    Malformed("shards_cut", shards([ROW], b"PAR1"), "cannot be read as table"),
    Malformed("shards_change", shards([ROW], [ROW | {"energy": "low"}]), "'low'", 1),
    Malformed(
        "shards_lack",
        shards([ROW], [{"numbers": [1], "energy": 1.0}]),
        "no column 'positions'",
        1,
        "positions",
    ),
    Malformed("glob_empty/a.txt", "x", "no file matches", spec="glob_empty/*.xyz"),
    Malformed("glob_bad/b.xyz", GOOD + "x\n", "should be a number of atoms", 1, spec="glob_bad/*.xyz"),
    # ---- arrays
    Malformed("cut.npz", cut(npz(R=np.zeros((9, 2, 3))), 0.5), "cannot be read as npz"),
    Malformed("lacking.npz", npz(hello=[1, 2]), "no array of positions"),
    Malformed("pickled.npz", npz(R=np.array([{}], dtype=object)), "Python objects"),
]
