"""Extended XYZ: nothing is eaten on reading, and what is written is read back equal, by ASE and by us."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from ase.io import read
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from blip_ft.data.read.comment_line import UNEVEN, CommentError, divided, quoted, read_comment
from blip_ft.data.read.extxyz import read_extxyz
from blip_ft.data.read.sources import load_source
from blip_ft.data.write.extxyz import write_frame
from blip_ft.errors import DataError

ROWS = "O 0.0 0.0 0.0\n"


# ---- comment lines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'config_type="" energy=-35.9',
        "config_type='' energy=-35.9",
        "config_type={} energy=-35.9",
        "config_type=[] energy=-35.9",
        "config_type= energy=-35.9",
        "energy=-35.9 config_type=",
        'energy=-35.9 config_type=""',
        'energy=-35.9 config_type="  "',
        "by=O'Neil energy=-35.9",
        "by=O'Neil energy=-35.9 at=Queen's",
        'size=5" energy=-35.9',
        r"path=C:\ energy=-35.9",
        r'path="C:\my files" energy=-35.9',
        r"name=a\"b energy=-35.9",
        "basis=a[b energy=-35.9",
        "table=[[1, 2], [3, 4]] energy=-35.9",
        "energy = -35.9 config_type = x",
        "energy= -35.9",
        "flag energy=-35.9",
        "'my key'=5 energy=-35.9",
        'url=http://a/b?c=d energy="-35.9"',
        "=5 energy=-35.9",
    ],
)
def test_no_text_eats_the_energy(text: str) -> None:
    assert read_comment(f'{text} pbc="T T F"')["energy"] == -35.9
    assert read_comment(f'{text} pbc="T T F"')["pbc"] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('a="" b=1', {"a": "", "b": 1}),
        ("a= b=1", {"a": "", "b": 1}),
        ("a = 1 b = two", {"a": 1, "b": "two"}),
        ("flag a=x=y", {"flag": True, "a": "x=y"}),
        ('energy="" Lattice="" pbc=""', {}),
        (r'a="C:\dir" b=c\d', {"a": r"C:\dir", "b": r"c\d"}),
        (r'a="say \"hi\" \\"', {"a": 'say "hi" \\'}),
        (r'a="_JSON [\"x\ny\", 1]"', {"a": ["x\ny", 1]}),
        ("i = 0, time = 1.5, E = -17.25", {"i": 0, "time": 1.5, "E": -17.25}),
        (
            "it isn't labelled (at all",
            {"it": True, "isn't": True, "labelled": True, "(at": True, "all": True},
        ),
        ("'tis free text", {"'tis": True, "free": True, "text": True}),
    ],
)
def test_comment_lines(text: str, values: dict[str, Any]) -> None:
    assert read_comment(text) == values


def test_six_numbers_of_a_stress_are_a_tensor() -> None:
    for text in ('stress="1 2 3 4 5 6"', "stress=[1,2,3,4,5,6]", "stress={1 2 3 4 5 6}"):
        assert read_comment(text)["stress"].tolist() == [[1, 6, 5], [6, 2, 4], [5, 4, 3]]


def test_a_stress_that_is_not_symmetric_is_averaged_or_refused(tmp_path: Path) -> None:
    head = 'energy=-1 Lattice="4 0 0 0 4 0 0 0 4" stress="{}"'
    (tmp_path / "a.xyz").write_text(f"1\n{head.format('1 0.501 0 0.499 2 0 0 0 3')}\n{ROWS}")
    (row,) = load_source(str(tmp_path / "a.xyz"))
    assert row["stress"] == [1, 2, 3, 0, 0, 0.5]
    (tmp_path / "b.xyz").write_text(f"1\n{head.format('1 0.9 0 0.1 2 0 0 0 3')}\n{ROWS}")
    with pytest.raises(DataError, match="field 'stress': the stress is not symmetric"):
        load_source(str(tmp_path / "b.xyz"))


@pytest.mark.parametrize("text", ['size="5 energy=-1 name="x"', r'path="C:\my dir\" energy=-1 pbc="T T T"'])
def test_a_quote_that_ends_where_another_opens_is_refused(text: str) -> None:
    with pytest.raises(CommentError, match="closes within"):
        read_comment(text)


def test_a_quote_without_an_end_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(CommentError, match="opens and does not close"):
        read_comment('name="5 inch energy=-35.9')
    (tmp_path / "a.xyz").write_text(f'1\nenergy=-1\n{ROWS}1\nname="5 inch energy=-35.9\n{ROWS}')
    with pytest.raises(
        DataError, match=r"frame 1.*opens and does not close.*5 inch(.|\n)*close the quotation"
    ):
        load_source(str(tmp_path / "a.xyz"))


@example([("=", "")])
@example([("a=", "="), ("=b", "a=b")])
@given(st.lists(st.tuples(st.text(min_size=1), st.text()), max_size=4))
def test_quoted_pairs_come_back(pairs: list[tuple[str, str]]) -> None:
    line = " ".join(f"{quoted(key)}={quoted(value)}" for key, value in pairs)
    assert list(divided(line)) == pairs


@given(st.text(alphabet="ab =\"'[]{}\\,1", max_size=30))
def test_any_line_is_read_or_refused(line: str) -> None:
    with contextlib.suppress(CommentError, ValueError):
        read_comment(line)


def test_labels_behind_an_empty_text_are_taken(tmp_path: Path) -> None:
    head = (
        'config_type="" energy=-35.9 Lattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 pbc="T T T"'
    )
    (tmp_path / "a.xyz").write_text(f"1\n{head}\n{ROWS}")
    (row,) = load_source(str(tmp_path / "a.xyz"))
    assert (row["energy"], row["group"]) == (-35.9, "")
    assert row["cell"] == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]


# ---- there and back ----------------------------------------------------------------------------


def back(atoms: Atoms, folder: Path) -> tuple[Atoms, Atoms]:
    """The structure as ASE and as this package read what was written."""
    path = folder / "a.xyz"
    with path.open("w", encoding="utf-8") as file:
        write_frame(file, atoms)
        write_frame(file, Atoms("H", info={"energy": -1.0}))  # nothing of it is eaten
    ours, after = read_extxyz(path, "a.xyz")
    assert after.calc.results == {"energy": -1.0}
    assert len(read(path, ":")) == 2
    return read(path, "0"), ours


def everything(atoms: Atoms) -> dict[str, Any]:
    """Info, arrays and results by name."""
    results = {} if atoms.calc is None else atoms.calc.results
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    return {**atoms.info, **arrays, **results}


def equal(read: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return (
            isinstance(read, dict)
            and read.keys() == value.keys()
            and all(equal(read[k], value[k]) for k in value)
        )
    if isinstance(value, str) or value is None:
        return type(read) is type(value) and read == value
    if isinstance(value, list | tuple) and not isinstance(read, np.ndarray):
        return len(read) == len(value) and all(equal(a, b) for a, b in zip(read, value, strict=True))
    a, b = np.asarray(read), np.asarray(value)
    if a.shape != b.shape and a.size + b.size:
        return False
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f" and b.dtype.kind == "f"))


NUMBERS = st.one_of(st.booleans(), st.integers(), st.floats())
DTYPES = st.one_of(
    hnp.floating_dtypes(endianness="="), hnp.integer_dtypes(endianness="="), hnp.boolean_dtypes()
)
ARRAYS = hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=1, max_side=4))
PLAIN = st.one_of(st.none(), NUMBERS, st.text())
NESTED = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3))
)
#: names that mean something to the format or to ASE are tried one by one below
OWN = {"Lattice", "Properties", "pbc", "uid", "UID", "Z", "pos", "symbols", "species", "numbers", "positions"}
OWN |= {"move_mask", "charge", *all_properties, UNEVEN}
KEYS = st.text(min_size=1, max_size=6).filter(
    lambda k: k not in OWN and not set(k) & set("\n\r") and k.encode("utf-8", "replace").decode() == k
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    info=st.dictionaries(KEYS, st.one_of(NESTED, ARRAYS), max_size=5),
    per_atom=st.dictionaries(
        KEYS,
        st.one_of(
            hnp.arrays(DTYPES, st.sampled_from([(3,), (3, 2), (3, 3), (3, 3, 3)])),
            st.lists(st.text(), min_size=3, max_size=3).map(np.array),
        ),
        max_size=3,
    ),
)
@example(info={"config_type": ""}, per_atom={})
@example(info={"a": np.zeros(0), "b": "two\nlines", "c": "5", "d": "T", "e": [1.5], "f": "\\"}, per_atom={})
@example(info={"a": "_JSON x", "b": "_JSON 5", "c": " ", "d": ",", "e": 2**70, "f": None}, per_atom={})
@example(
    info={}, per_atom={"a": np.zeros((3, 3)), "a0": np.zeros(3), "tag": np.array(["x", "", "two words"])}
)
def test_info_and_arrays_come_back(info: dict[str, Any], per_atom: dict[str, Any], tmp_path: Path) -> None:
    atoms = Atoms(
        "OH2", positions=np.random.default_rng(0).normal(size=(3, 3)), cell=[3, 4.1, 5], pbc=[1, 0, 1]
    )
    atoms.info = dict(info)
    for name, value in per_atom.items():
        if name not in info and name not in atoms.arrays:
            atoms.new_array(name, value)
    atoms.calc = SinglePointCalculator(atoms, energy=-1 / 3, forces=np.arange(9).reshape(3, 3) / 7)
    wanted = everything(atoms)
    for again in back(atoms, tmp_path):
        assert again.symbols.get_chemical_formula("reduce") == atoms.symbols.get_chemical_formula("reduce")
        assert np.array_equal(again.positions, atoms.positions)
        assert np.array_equal(again.cell.array, atoms.cell.array)
        assert again.pbc.tolist() == [True, False, True]
        found = everything(again)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(found[name], dict) and found[name].keys() == {
                UNEVEN
            }:  # ASE's reader has no such lists
                found[name] = found[name][UNEVEN]
            assert equal(found[name], value), name


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        ({"Lattice": "fcc"}, {"info_Lattice": "fcc"}),
        ({"Properties": "none", "pbc": 5}, {"info_Properties": "none", "info_pbc": 5}),
        ({"virial": np.arange(3.0)}, {"info_virial": np.arange(3.0)}),
        ({"virial": np.eye(3)}, {"virial": np.eye(3)}),
        ({"virial": 2.5, "info_virial": 1}, {"info_virial": 2.5, "info_info_virial": 1}),
        ({"stress": np.arange(9.0).reshape(3, 3)}, {"info_stress": np.arange(9.0).reshape(3, 3)}),
        ({"dipole": "none"}, {"info_dipole": "none"}),
        ({"uid": 5}, {"info_uid": 5}),
        ({"uid": "x y"}, {"uid": "x y"}),
        ({"two\nlines": 1, "": 2}, {"two lines": 1, "_": 2}),
        ({7: 1}, {"7": 1}),
    ],
)
def test_names_that_the_format_uses(info: dict[Any, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    for again in back(Atoms("OH2", cell=[4, 4, 4], info=info), tmp_path):
        found = everything(again)
        assert found.keys() == wanted.keys()
        assert all(equal(found[k], v) for k, v in wanted.items())
        assert again.cell.lengths().tolist() == [4, 4, 4]


@pytest.mark.parametrize("name", ["Z", "pos", "charge", "energy", "species", "move_mask"])
def test_arrays_called_as_something_else(name: str, tmp_path: Path) -> None:
    atoms = Atoms("OH2", info={"charge": 1})
    atoms.arrays[name] = np.array([1.5, 2.5, 3.5])
    for again in back(atoms, tmp_path):
        assert again.arrays[f"atom_{name}"].tolist() == [1.5, 2.5, 3.5]
        assert again.info == {"charge": 1}


def test_what_json_has_not_is_left_out_with_a_warning() -> None:
    file = io.StringIO()
    with pytest.warns(UserWarning, match=r"info\['z'\] is not written: extended XYZ has no complex"):
        write_frame(file, Atoms("H", info={"z": 1j, "a": 1}))
    assert "a=1 pbc" in file.getvalue()


def test_constraints_results_and_charges_come_back(tmp_path: Path) -> None:
    atoms = Atoms("OH2", magmoms=[1, 2, 3.5], charges=[0.5, -1, 0], cell=[3, 3, 3], pbc=True)
    atoms.set_constraint(FixAtoms([1]))
    stress = [1.0, 2, 3, 4, 5, 6]
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, stress=stress, magmoms=[0.1, 0.2, 0.3])
    atoms.calc.results["energy_std"] = 0.25
    for again in back(atoms, tmp_path):
        assert again.constraints[0].index.tolist() == [1]
        assert again.get_initial_magnetic_moments().tolist() == [1, 2, 3.5]
        assert again.get_initial_charges().tolist() == [0.5, -1, 0]
        assert again.calc.results["stress"].tolist() == stress
        assert again.calc.results["magmoms"].tolist() == [0.1, 0.2, 0.3]
        assert again.info == {"energy_std": 0.25}
    atoms.set_constraint([FixCartesian(0, mask=(True, False, False))])
    for again in back(atoms, tmp_path):
        assert again.constraints[0].mask.tolist() == [True, False, False]


def test_lines_are_of_one_length() -> None:
    file = io.StringIO()
    write_frame(file, Atoms("OH2", positions=np.random.default_rng(0).normal(size=(3, 3)) * [1, 100, 1e-9]))
    assert len({len(line) for line in file.getvalue().splitlines()[2:]}) == 1
