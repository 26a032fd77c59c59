"""Files that must be refused, each with the file, the frame, the field and a remedy."""

from __future__ import annotations

import gzip
from pathlib import Path

import datasets
import pytest
from ase import Atoms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip_ft.data.read.files import read_frames
from blip_ft.data.read.schema import RawFrame
from blip_ft.data.read.sources import load_source
from blip_ft.errors import DataError

HEAD = 'Lattice="5 0 0 0 5 0 0 0 5" Properties=species:S:1:pos:R:3:forces:R:3 energy=-1.0 pbc="T T T"'
ROWS = "Si 0.0 0.0 0.0 0.1 0.0 0.0\nO  1.6 0.0 0.0 -0.1 0.0 0.0\n"
GOOD = f"2\n{HEAD}\n{ROWS}"


def bad(*frames: str) -> str:
    return GOOD + "".join(frames)


#: name, content, frame, field, what is said
TEXTS: list[tuple[str, str | bytes, int | None, str | None, str]] = [
    ("empty.xyz", "", None, None, "the file is empty"),
    ("blank.xyz", "\n \n", None, None, "no frames"),
    ("words.xyz", "not a structure\n", 0, None, "should be a number of atoms"),
    ("words.txt", "not a structure\n", None, None, "neither a structure file"),
    ("words", "not a structure\n", None, None, "neither a structure file"),
    ("image.png", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), None, None, "PNG|png|cannot be read|neither"),
    ("noatoms.xyz", f"0\n{HEAD}\n", 0, None, "no atoms"),
    ("negative.xyz", bad(f"-1\n{HEAD}\n"), 1, None, "should be a number of atoms and is '-1'"),
    (
        "cut_rows.xyz",
        bad(f"2\n{HEAD}\nSi 0 0 0 0 0 0\n"),
        1,
        None,
        "announces 2 atoms and the file ends after 1",
    ),
    ("cut_head.xyz", bad("2\n"), 1, None, "announces 2 atoms and the file ends after 0"),
    ("cut_columns.xyz", bad(f"2\n{HEAD}\n{ROWS[:40]}\n"), 1, None, "cannot be read as extxyz"),
    (
        "cut_number.xyz",
        "3\nProperties=species:S:1:pos:R:3 energy=-1\nO 0.000 0.000 0.123\nH 0.000 0.000 1.123\nH 0.000 1.000 0.1",
        0,
        None,
        "shorter than the others",
    ),
    ("too_many_rows.xyz", f"1\n{HEAD}\n{ROWS}", 1, None, "line 4 should be a number of atoms"),
    ("letters.xyz", bad(f"1\n{HEAD}\nO a b c 0 0 0\n"), 1, None, "cannot be read as extxyz"),
    ("element.xyz", bad(f"1\n{HEAD}\nQq 0 0 0 0 0 0\n"), 1, None, "cannot be read as extxyz.*Qq"),
    ("unlabelled.xyz", bad('1\npbc="F F F"\nO 0 0 0\n'), 1, "energy, forces", "neither energy nor forces"),
    ("nan_energy.xyz", bad("1\nenergy=nan\nO 0 0 0\n"), 1, "energy", "NaN"),
    ("inf_energy.xyz", bad("1\nenergy=-inf\nO 0 0 0\n"), 1, "energy", "NaN or infinite"),
    ("nan_force.xyz", bad(f"1\n{HEAD}\nO 0 0 0 nan 0 0\n"), 1, "forces", "NaN"),
    ("nan_position.xyz", bad(f"1\n{HEAD}\nO nan 0 0 0 0 0\n"), 1, "positions", "NaN"),
    (
        "nan_stress.xyz",
        bad(f'1\n{HEAD} stress="1 2 3 4 5 nan"\nO 0 0 0 0 0 0\n'),
        1,
        "stress",
        "NaN",
    ),
    (
        "two_columns.xyz",
        bad("1\nProperties=species:S:1:pos:R:3:forces:R:2 energy=-1\nO 0 0 0 1 2\n"),
        1,
        "forces",
        r"shape \(1, 2\), expected \(1, 3\)",
    ),
    ("vector_energy.xyz", bad('1\nREF_energy="1 2 3"\nO 0 0 0\n'), 1, "REF_energy", "expected one number"),
    ("text_energy.xyz", bad("1\nREF_energy=low\nO 0 0 0\n"), 1, "REF_energy", "not a number"),
    ("bad_stress.xyz", bad(f'1\n{HEAD} REF_stress="1 2 3 4"\nO 0 0 0 0 0 0\n'), 1, "REF_stress", r"\(4,\)"),
    (
        "two_energies.xyz",
        bad(f"1\n{HEAD} REF_energy=-2.0\nO 0 0 0 0 0 0\n"),
        1,
        "energy",
        "'energy' and 'REF_energy' could both be the energy and differ",
    ),
    ("flat_cell.xyz", bad('1\nLattice="5 0 0 0 5 0 0 0 0" energy=1\nO 0 0 0\n'), 1, "cell", "do not span"),
    ("no_cell.xyz", bad('1\nenergy=1 pbc="T T T"\nO 0 0 0\n'), 1, "cell", "do not span"),
    ("not_utf8.xyz", b"1\nenergy=1 name=\xff\xfe\nO 0 0 0\n", None, None, "cannot be read"),
    ("not_gzip.xyz.gz", GOOD, None, None, "cannot be read"),
    ("cut.xyz.gz", gzip.compress(GOOD.encode() * 50)[:-20], None, None, "cannot be read"),
    ("cut.parquet", b"PAR1" + bytes(100), None, None, "cannot be read as parquet"),
    ("words.parquet", "hello", None, None, "cannot be read as parquet"),
    ("words.arrow", "hello", None, None, "cannot be read"),
    ("cut.json", '[{"numbers": [1], ', 0, None, "cannot be read"),
    ("words.jsonl", "hello\n", 0, None, "cannot be read"),
    ("no_numbers.jsonl", '{"positions": [[0, 0, 0]]}\n', 0, "numbers", "no column 'numbers'"),
    ("no_positions.jsonl", '{"numbers": [1], "energy": 1}\n', 0, "positions", "no column 'positions'"),
    (
        "ragged.jsonl",
        '{"numbers": [1, 1], "positions": [[0, 0, 0], [0, 0]], "energy": 1}\n',
        0,
        "numbers, positions, cell or pbc",
        "not a structure",
    ),
    (
        "few_positions.jsonl",
        '{"numbers": [1, 1], "positions": [[0, 0, 0]], "energy": 1}\n',
        0,
        "positions",
        r"expected \(2, 3\)",
    ),
    (
        "half_numbers.jsonl",
        '{"numbers": [1.5], "positions": [[0, 0, 0]], "energy": 1}\n',
        0,
        "numbers, positions, cell or pbc",
        "integers or chemical symbols",
    ),
    (
        "bad_symbol.jsonl",
        '{"species": ["Zz"], "positions": [[0, 0, 0]], "energy": 1}\n',
        0,
        "numbers, positions, cell or pbc",
        "'Zz' is not a chemical element",
    ),
    (
        "short_cell.jsonl",
        '{"numbers": [1], "positions": [[0, 0, 0]], "cell": [[1, 0], [0, 1]], "energy": 1}\n',
        0,
        "cell",
        r"shape \(2, 2\)",
    ),
    (
        "pbc.jsonl",
        '{"numbers": [1], "positions": [[0, 0, 0]], "pbc": [true, false], "energy": 1}\n',
        0,
        "numbers, positions, cell or pbc",
        "not a structure",
    ),
    (
        "unlabelled.jsonl",
        '{"numbers": [1], "positions": [[0, 0, 0]]}\n',
        0,
        "energy, forces",
        "neither energy nor forces",
    ),
    ("POSCAR", "cut\n1.0\n5 0 0\n0 5 0\n", None, None, "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "frame", "field", "words"), TEXTS, ids=[t[0] for t in TEXTS])
def test_bad_file(
    name: str,
    content: str | bytes,
    frame: int | None,
    field: str | None,
    words: str,
    tmp_path: Path,
    cache: Path,
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as caught:
        load_source(str(path))
    error = caught.value
    assert error.file == str(path)
    assert error.field == field
    if frame is not None:
        assert error.frame == frame
    assert error.remedy
    assert [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing.xyz", "no such file or folder"),
        ("nothing/here.xyz@train", "nothing/here.xyz: there is no such file"),
        ("*.nothing", "no file matches this pattern"),
        ("sio2_polymorphs@", "cannot read the source"),
        ("@0:3", "cannot read the source"),
        ("", "cannot read the source"),
        ("sio2_polymorphs@1000:", "selects no frame"),
        ("sio2_polymorphs@3:3", "selects no frame"),
        ("sio2_polymorphs@::0", "step 0"),
        ("sio2_polymorphs@quartz", r"no frame is of the split 'quartz'.*\n.*did you mean 'hot_quartz'"),
        ([], "no source is given"),
    ],
)
def test_bad_spec(spec: str | list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_source(spec)


def test_one_bad_source_of_a_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.xyz").write_text(GOOD)
    (tmp_path / "bad.xyz").write_text(bad("1\nenergy=nan\nO 0 0 0\n"))
    with pytest.raises(DataError, match=r"bad\.xyz, frame 1, field 'energy'"):
        load_source([str(tmp_path / "good.xyz"), str(tmp_path / "bad.xyz")])


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.xyz"
    path.write_text(GOOD)
    path.chmod(0)
    real = Path.open

    def refuse(self: Path, *args: object, **options: object) -> object:
        if self == path:  # permissions do not stop the superuser, under whom tests may run
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"secret\.xyz: cannot be opened: Permission denied\n.*may read"):
        load_source(str(path))


def test_folder_without_tables(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(GOOD)
    with pytest.raises(DataError, match=r"no parquet, arrow or json table\n.*/\*\.xyz"):
        load_source(str(tmp_path))


def test_table_whose_columns_change(tmp_path: Path) -> None:
    row = {"numbers": [1], "positions": [[0.0, 0, 0]], "energy": 1.0}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "part-0.parquet")
    datasets.Dataset.from_list([row | {"energy": "low"}]).to_parquet(tmp_path / "part-1.parquet")
    with pytest.raises(DataError, match=r"frame 1"):
        load_source(str(tmp_path))


def test_info_and_calculator_that_disagree(tmp_path: Path) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    atoms = Atoms("O", info={"energy": -2.0})
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    write(tmp_path / "a.traj", atoms)
    with pytest.raises(DataError, match="'energy' occurs twice with different values"):
        load_source(str(tmp_path / "a.traj"))


# ---- fuzz --------------------------------------------------------------------------------------


def attempt(path: Path, name: str) -> tuple[list[RawFrame], DataError | None]:
    """Frames read before the error, and the error; any other exception is a defect."""
    frames: list[RawFrame] = []
    try:
        frames.extend(read_frames(path, name))
    except DataError as error:
        return frames, error
    return frames, None


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good file with bytes removed, replaced or put in at random."""
    data = bytearray((GOOD * 3).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        stop = min(len(data), at + draw(st.integers(0, 12)))
        junk = draw(
            st.one_of(
                st.binary(max_size=6), st.sampled_from([b"\n", b" ", b"nan", b"-1", b"1e999", b'"', b"="])
            )
        )
        data[at:stop] = junk
    return bytes(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged())
def test_damaged_files_are_read_or_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.xyz"
    path.write_bytes(content)
    frames, error = attempt(path, "damaged.xyz")
    assert error is None or error.file == "damaged.xyz"
    for frame in frames:
        assert frame.positions.shape == (len(frame.numbers), 3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=200),
    name=st.sampled_from(["f.xyz", "f.json", "f.jsonl", "f.parquet", "f.cif", "f"]),
)
def test_noise_is_never_a_traceback(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    frames, error = attempt(path, name)
    assert error is not None or not frames
