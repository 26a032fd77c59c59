"""Isolated atoms and calculations that did not converge are no frames to learn from, in any role."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ase.db
import datasets
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.config import DataConfig
from blip_ft.data.check.leaks import group_leaks
from blip_ft.data.check.sets import check_frames, check_units, unit_findings
from blip_ft.data.read.set_aside import SetAside, is_isolated
from blip_ft.data.read.sources import load_source
from blip_ft.data.read.unused import unmatched_labels
from blip_ft.data.split.sample import rows_of, sample_of
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import DataError
from blip_ft.testing.fake import FakeBackbone

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]
ENERGIES = {14: -132.5, 8: -430.0}


def labelled(atoms: Atoms, energy: float) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
    return atoms


def lone(symbol: str, **options: object) -> Atoms:
    atoms = Atoms(symbol, positions=[(7, 7, 7)], **options)
    return labelled(atoms, ENERGIES[int(atoms.numbers[0])])


BOX = {"cell": [15.0, 15.1, 15.2], "pbc": True}


@pytest.mark.parametrize(
    "options",
    [
        BOX,
        {"cell": [6.1, 6.2, 6.3], "pbc": True},
        {"cell": [15.0, 15.0, 15.0], "pbc": [True, True, False]},
        {"cell": [15.0, 15.0, 15.0]},
        {},
        {"cell": [4.0, 4.0, 4.0], "pbc": True, "info": {"config_type": "IsolatedAtom"}},
    ],
    ids=["box", "small-box", "slab-box", "open-box", "no-box", "marked"],
)
def test_an_atom_that_nothing_is_near_is_a_reference(
    options: dict[str, object], frames: Frames, save: Save
) -> None:
    path = save([*frames(12), lone("Si", **options), lone("O", **options)])
    splits = load_splits(DataConfig(train=path))
    assert splits.isolated == ENERGIES
    assert sum(len(part) for part in splits.roles().values()) == 12
    assert splits.dropped == [f"{path}, frame {i}: an isolated atom, kept as reference" for i in (12, 13)]


@pytest.mark.parametrize(
    "atoms",
    [
        bulk("Li"),
        bulk("Xe", "fcc", 6.2),
        bulk("Cs", "bcc", 6.14),
        bulk("Po", "sc", 3.36),
        Atoms("C", cell=[2.5, 20, 20], pbc=[True, False, False]),
        Atoms("C", cell=[[40, 0, 0], [41.5, 1.6, 0], [0, 0, 30]], pbc=True),
    ],
    ids=["Li", "Xe", "Cs", "Po", "chain", "skewed"],
)
def test_a_cell_of_one_atom_is_none(atoms: Atoms) -> None:
    row = {"numbers": atoms.numbers, "cell": atoms.cell.array, "pbc": atoms.pbc, "group": ""}
    assert not is_isolated(row)


def test_atoms_in_every_file_are_set_aside_in_every_role(frames: Frames, save: Save) -> None:
    marked = {"info": {"config_type": "IsolatedAtom"}}
    paths = [
        save([*frames(4, seed=i), lone("Si", **BOX, **marked), lone("O", **BOX, **marked)], f"{i}.xyz")
        for i in range(4)
    ]
    roles = dict(zip(("train", "validation", "calibration", "test"), paths, strict=True))
    splits = load_splits(DataConfig(**roles))
    assert {name: len(part) for name, part in splits.roles().items()} == dict.fromkeys(
        ("train", "validation", "calibration", "test/seen"), 4
    )
    assert len(splits.dropped) == 8
    assert splits.isolated == ENERGIES
    assert group_leaks(splits) == []
    assert [f.kind for f in check_frames(splits, FakeBackbone()) if f.severity == "warning"] == []


@pytest.mark.parametrize("name", ["a.extxyz.gz", "a.traj", "a.db", "a.json", "a.parquet", "a.jsonl"])
def test_every_format(name: str, frames: Frames, save: Save, tmp_path: Path) -> None:
    """Isolated atoms, a calculation that did not converge, and an energy of another name."""
    some = [*frames(12), lone("Si", **BOX), lone("O", **BOX)]
    some[3].info["scf_converged"] = False
    for atoms in some:
        atoms.info["TotEnergy"] = atoms.calc.results.pop("energy")
    path = tmp_path / name
    if name.endswith(("parquet", "jsonl")):
        rows = [
            {"numbers": a.numbers.tolist(), "positions": a.positions.tolist(), "cell": a.cell.tolist()}
            | {"forces": a.calc.results["forces"].tolist(), "scf_converged": True, **a.info}
            for a in some
        ]
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(path) if name.endswith("parquet") else table.to_json(path)
    elif name in ("a.db", "a.json"):
        with ase.db.connect(path) as database:
            for a in some:
                database.write(a, key_value_pairs=a.info)
    else:
        save(some, name)
    splits = load_splits(DataConfig(train=str(path)))
    assert sum(len(part) for part in splits.roles().values()) == 11
    assert [text.partition(": ")[2] for text in splits.dropped] == [
        "not converged, as the file itself says",
        *["an isolated atom, kept as reference"] * 2,
    ]
    assert any("nothing uses 'TotEnergy'" in f.message for f in unmatched_labels(splits.roles()))
    named = load_splits(
        DataConfig(train=str(path), fields={"energy": "TotEnergy"}, references="isolated_atoms")
    )
    assert named.isolated == ENERGIES


def test_a_set_of_nothing_else_is_kept(frames: Frames, save: Save) -> None:
    atoms = save([lone("Si", **BOX), lone("O", **BOX)], "atoms.xyz")
    splits = load_splits(DataConfig(train=save(frames(12)), test={"atoms": atoms}))
    assert len(splits.test["atoms"]) == 2


def test_forces_that_vanish_by_symmetry_are_no_finding(save: Save) -> None:
    cells = []
    for scale in np.linspace(0.95, 1.05, 16):
        cell = bulk("Si", "sc", 2.6 * scale)
        cells.append(labelled(cell, -5.0 - (scale - 1) ** 2))
    train = load_source(save(cells))

    def predict(structures: list[Atoms]) -> list[dict[str, object]]:
        return [{"energy": -1.0, "forces": np.full((1, 3), 1e-17), "stress": None} for _ in structures]

    assert check_units(train, predict) == []
    zeros = [row | {"forces": np.zeros((1, 3))} for row in train]
    rough = [{"energy": -1.0, "forces": np.ones((1, 3)), "stress": None} for _ in zeros]
    (finding,) = unit_findings(zeros, rough).values()
    assert (
        "hardly correlate with the pretrained model (against the pretrained model: slope 0" in finding.message
    )
    assert "nan" not in str(finding)


# ---- convergence -------------------------------------------------------------------------------


def test_frames_that_did_not_converge_are_named_and_left_out(frames: Frames, save: Save) -> None:
    some = frames(14)
    some[5].info["scf_converged"] = False
    some[9].info["scf_converged"] = True
    some[11].info["electronic_converged"] = False
    path = save(some)
    splits = load_splits(DataConfig(train=path))
    assert sum(len(part) for part in splits.roles().values()) == 12
    assert splits.dropped == [f"{path}, frame {i}: not converged, as the file itself says" for i in (5, 11)]


def test_streams_leave_them_out_too(frames: Frames, save: Save) -> None:
    some = frames(6)
    some[2].info["scf_converged"] = False
    path = save([*some, lone("O", **BOX)])
    config = DataConfig(train=path, stream={"frames": 5, "sample": 5})
    assert [row["frame"] for row in rows_of(config)()] == [0, 1, 3, 4, 5]
    aside = SetAside()
    sample = aside.examples(sample_of(config))
    assert sample["frame"][:] == [0, 1, 3, 4, 5]
    assert sum(sample["weight"]) == pytest.approx(5)


def test_nothing_converged(frames: Frames, save: Save) -> None:
    some = frames(3)
    for atoms in some:
        atoms.info["scf_converged"] = False
    with pytest.raises(DataError, match=r"of every frame \(3\) that the calculation did not converge"):
        SetAside().examples(load_source(save(some)))


HEAD = """ vasp.6.3.2 27Jun22 (build) complex

 POTCAR:    PAW_PBE Si 05Jan2001
 POTCAR:    PAW_PBE Si 05Jan2001
   k-points           NKPTS =      1   k-points in BZ     NKDIM =      1   number of bands    NBANDS=      8
   ions per type =               1
   NELM   =      4;   NELMIN=  2; NELMDL= -5     # of ELM steps
   ISPIN  =      1    spin polarized calculation?
 k-points in reciprocal lattice and weights: Automatic mesh
   0.00000000  0.00000000  0.00000000       1.000

"""
STEP = """  in kB      10.0      10.0      10.0       0.0       0.0       0.0
      direct lattice vectors                 reciprocal lattice vectors
     2.600000000  0.000000000  0.000000000     0.384615385  0.000000000  0.000000000
     0.000000000  2.600000000  0.000000000     0.000000000  0.384615385  0.000000000
     0.000000000  0.000000000  2.600000000     0.000000000  0.000000000  0.384615385

 POSITION                                       TOTAL-FORCE (eV/Angst)
 -----------------------------------------------------------------------------------
      {x}      0.00000      0.00000         0.100000      0.000000      0.000000
 -----------------------------------------------------------------------------------

  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)
  ---------------------------------------------------
  free  energy   TOTEN  =       -10.00000000 eV

  energy  without entropy=      -10.00000000  energy(sigma->0) =      -10.00000000

"""
REACHED = " ---- aborting loop because EDIFF is reached ----"
NOT = " ---- aborting loop EDIFF was not reached (unconverged)  ----"


def outcar(*steps: tuple[int, str], x: str = "0.00000") -> str:
    """An OUTCAR: electronic steps and the line behind them, for each ionic step."""
    text = HEAD
    for k, (n, line) in enumerate(steps, 1):
        text += "".join(f"------ Iteration {k:6d}({i:4d})  ------\n" for i in range(1, n + 1))
        text += f"{line}\n{STEP.format(x=x if k == 2 else '0.00000')}"
    return text


@pytest.mark.parametrize(
    ("steps", "failed"),
    [
        ([(3, REACHED), (4, NOT), (3, REACHED)], [1]),
        ([(3, REACHED), (4, ""), (3, REACHED), (4, "")], [1, 3]),  # VASP 5
        ([(4, REACHED), (3, ""), (4, REACHED)], []),
        ([(3, " ---- aborting loop because hard stop was set ----"), (3, REACHED)], [0]),
    ],
    ids=["vasp6", "vasp5", "all", "stopped"],
)
@pytest.mark.parametrize("name", ["OUTCAR", "run-OUTCAR.gz"])
def test_outcar(steps: list[tuple[int, str]], failed: list[int], name: str, tmp_path: Path) -> None:
    import gzip

    path = tmp_path / name
    text = outcar(*steps).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    aside = SetAside()
    rest = aside.examples(load_source(str(path)))
    assert rest["frame"][:] == [i for i in range(len(steps)) if i not in failed]
    assert aside.places == [f"{path}, frame {i}: not converged, as the file itself says" for i in failed]


def test_a_bad_step_of_an_outcar_is_named(tmp_path: Path) -> None:
    (tmp_path / "OUTCAR").write_text(outcar(*[(3, REACHED)] * 4, x="*******"))
    with pytest.raises(DataError, match=r"OUTCAR, frame 1: cannot be read as vasp-out") as caught:
        load_source(str(tmp_path / "OUTCAR"))
    assert "asterisks in place of a number" in caught.value.remedy
    assert "the 1 frames before it can be read (@:1)" in caught.value.remedy


VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v></varray></kpoints>
 <parameters><separator name="electronic"><i type="int" name="NELM">    4</i></separator></parameters>
 <atominfo><array name="atoms"><set><rc><c>Si</c><c>1</c></rc></set></array></atominfo>
 <structure name="initialpos"><crystal><varray name="basis"><v>2.6 0 0</v><v>0 2.6 0</v><v>0 0
 2.6</v></varray></crystal>
  <varray name="positions"><v>0 0 0</v></varray></structure>
 {steps}
</modeling>
"""
CALCULATION = """<calculation>{scf}
 <structure><crystal><varray name="basis"><v>2.6 0 0</v><v>0 2.6 0</v><v>0 0 2.6</v></varray></crystal>
  <varray name="positions"><v>0 0 0</v></varray></structure>
 <varray name="forces"><v>0.1 0 0</v></varray>
 <energy><i name="e_fr_energy">-10.0</i><i name="e_wo_entrp">-10.0</i><i name="e_0_energy">-10.0</i></energy>
</calculation>"""
SCF = '<scstep><energy><i name="e_fr_energy">-10.0</i><i name="e_0_energy">-10.0</i></energy></scstep>'


def test_vasprun(tmp_path: Path) -> None:
    steps = "".join(CALCULATION.format(scf=SCF * n) for n in (3, 4, 2))
    (tmp_path / "vasprun.xml").write_text(VASPRUN.format(steps=steps))
    aside = SetAside()
    assert aside.examples(load_source(str(tmp_path / "vasprun.xml")))["frame"][:] == [0, 2]
