"""Two levels of theory in one training, each with references of its own, through ``fit`` and what comes after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from rich.console import Console

import blip_ft
from blip_ft import cli
from blip_ft.cli.check_data import check_data
from blip_ft.config import Recipe, parse_recipe
from blip_ft.errors import BlipError, DataError, RecipeError
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training.fit import fit
from blip_ft.training.prepare import prepare

from .labelled import frames, small_run

#: eV/atom between the two sets, and of both from the model
OFFSET, BASE = 0.35, -3.0


def two_sets(n: int = 60, key: str = "head", names: tuple[str, str] = ("pbe", "r2scan")) -> list[Atoms]:
    """Frames of the fake potential's own labels, every second of another set."""
    out = frames(n)
    for i, atoms in enumerate(out):
        atoms.info |= {key: names[i % 2], "trajectory": f"run{i // 4 % 4}"}  # all trajectories have both
        atoms.info["REF_energy"] += (BASE + OFFSET * (i % 2)) * len(atoms)
    return out


def tree_of(folder: Path, **data: Any) -> dict[str, Any]:
    return small_run(folder, "two.extxyz", **data)


def recipe_of(folder: Path, **data: Any) -> Recipe:
    return parse_recipe(tree_of(folder, **data))


def energies(path: Path) -> np.ndarray:
    return np.array([a.get_potential_energy() / len(a) for a in read(path, ":")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sets")
    write(folder / "two.extxyz", two_sets())
    fit(recipe_of(folder, reference_sets={"default": "pbe"}), Console(quiet=True))
    return folder


@pytest.mark.default
class TestFit:
    """One run, judged by what each command says of it."""

    @pytest.fixture
    def call(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
        def run(*argv: str | Path) -> tuple[int, str, str]:
            return cli.main([str(a) for a in argv]), *capsys.readouterr()

        return run

    def test_nothing_of_the_offset_is_left(self, folder: Path) -> None:
        metrics = json.loads((folder / "runs/run/metrics.json").read_text())
        for model in ("pretrained", "blip"):
            assert metrics[model]["seen"]["energy_mae_mev_per_atom"] < 10  # of a set that is half r2scan
        receipt = json.loads((folder / "runs/run/receipt.json").read_text())
        assert not [f for f in receipt["data"]["findings"] if "fall into sets" in f["message"]]
        sets = receipt["reference_sets"]
        assert sets["default"] == "pbe"
        assert sum(n * sets["shifts"]["r2scan"][z] for z, n in (("8", 2), ("14", 1))) == pytest.approx(
            3 * OFFSET, abs=1e-6
        )

    def test_a_new_structure_is_of_the_default_set(self, folder: Path, call: Any) -> None:
        new = frames(4, seed=9)
        calculator = FakeBackbone.load("tiny").stock_calculator()
        want = []
        for atoms in new:
            atoms.calc = calculator
            want.append(atoms.get_potential_energy() / 3 + BASE)
            atoms.calc = None
            atoms.info = {"head": "r2scan"}
        write(folder / "new.extxyz", new)
        run = folder / "runs/run"
        code, _, err = call("predict", run, folder / "new.extxyz", "-o", folder / "a.extxyz", "--overwrite")
        assert code == 0
        assert "zero of 'pbe' (other reference sets: r2scan)" in err
        np.testing.assert_allclose(energies(folder / "a.extxyz"), want, atol=0.02)
        argv = "predict", run, folder / "new.extxyz", "-o", folder / "b.extxyz", "--overwrite"
        assert call(*argv, "--reference-set", "r2scan")[0] == 0
        off = energies(folder / "b.extxyz") - energies(folder / "a.extxyz")
        np.testing.assert_allclose(off, OFFSET, atol=1e-6)

    def test_the_calculator_has_the_zero_that_was_asked_for(self, folder: Path) -> None:
        atoms = frames(1, seed=9)[0]
        of = {}
        for name in (None, "pbe", "r2scan"):
            atoms.calc = blip_ft.load(folder / "runs/run", reference_set=name).calculator(n_draws=0)
            of[name] = atoms.get_potential_energy() / len(atoms), atoms.get_forces()
        assert of[None][0] == of["pbe"][0]
        assert of["r2scan"][0] - of["pbe"][0] == pytest.approx(OFFSET, abs=1e-6)
        np.testing.assert_array_equal(of["r2scan"][1], of["pbe"][1])
        with pytest.raises(BlipError, match=r"no reference set 'r2scn'.*pbe, r2scan"):
            blip_ft.load(folder / "runs/run", reference_set="r2scn")

    def test_evaluate_puts_each_frame_into_its_set(self, folder: Path, call: Any) -> None:
        fresh = two_sets(12)
        for atoms in fresh:
            atoms.rattle(0.01, seed=3)
            atoms.calc = FakeBackbone.load("tiny").stock_calculator()
            off = BASE + OFFSET * (atoms.info["head"] == "r2scan")
            atoms.info["REF_energy"] = atoms.get_potential_energy() + off * len(atoms)
            atoms.arrays["REF_forces"] = atoms.get_forces()
            atoms.calc = None
        write(folder / "held.extxyz", fresh)
        for chosen in ([], ["--reference-set", "r2scan"]):
            out = folder / f"held{len(chosen)}.json"
            argv = "evaluate", folder / "runs/run", folder / "held.extxyz", "-o", out, "--overwrite"
            assert call(*argv, *chosen)[0] == 0
            assert json.loads(out.read_text())["energy_mae_mev_per_atom"] < 20
        fresh[5].info["head"] = "scan"
        write(folder / "other.extxyz", fresh)
        code, _, err = call("evaluate", folder / "runs/run", folder / "other.extxyz")
        assert code == 2
        assert "frame 5" in err
        assert "of the set 'scan'" in err
        assert "pbe, r2scan" in err

    def test_an_export_says_its_set(self, folder: Path, call: Any) -> None:
        for name, argv in (("pbe", []), ("r2scan", ["--reference-set", "r2scan"])):
            code, out, _ = call("export", folder / "runs/run", "-o", folder / name, *argv)
            assert code == 0
            assert f"zero of '{name}'" in out
            assert json.loads((folder / name / "export.json").read_text())["reference_set"] == name


def test_the_finding_names_the_key_to_write(tmp_path: Path) -> None:
    write(tmp_path / "two.extxyz", two_sets(key="config_type"))
    both = prepare(recipe_of(tmp_path, fields={"group": "config_type"}), Console(quiet=True))
    (found,) = [f for f in both.findings if "fall into sets" in f.message]
    assert "data.reference_sets: {default: " in found.remedy
    assert ", by: group}" in found.remedy
    sets = {"default": "r2scan", "by": "group"}
    one = prepare(
        recipe_of(tmp_path, fields={"group": "config_type"}, reference_sets=sets), Console(quiet=True)
    )
    assert not [f for f in one.findings if "fall into sets" in f.message]
    assert one.references is not None
    shift = one.references.shift
    assert 2 * shift[8] + shift[14] == pytest.approx(3 * (BASE + OFFSET), abs=1e-6)


def lone_energies() -> dict[str, float]:
    """Energies of isolated atoms of the fake potential, eV."""
    out = {}
    for symbol in ("Si", "O"):
        atoms = Atoms(symbol)
        atoms.calc = FakeBackbone.load("tiny").stock_calculator()
        out[symbol] = atoms.get_potential_energy()
    return out


@pytest.mark.parametrize("mode", ["given", "isolated_atoms", "refit", "keep"])
def test_references_of_every_kind(tmp_path: Path, mode: str) -> None:
    alone = lone_energies()
    given = {
        name: {symbol: energy + BASE + off for symbol, energy in alone.items()}
        for name, off in (("pbe", 0.0), ("r2scan", OFFSET))
    }
    labelled = two_sets()
    if mode == "keep":
        for atoms in labelled:
            atoms.info["REF_energy"] -= BASE * len(atoms)
    if mode == "isolated_atoms":
        for name, of in given.items():
            for symbol, energy in of.items():
                atom = Atoms(symbol, cell=[12] * 3, pbc=True, info={"head": name, "REF_energy": energy})
                atom.arrays["REF_forces"] = np.zeros((1, 3))
                labelled.append(atom)
    write(tmp_path / "two.extxyz", labelled)
    sets = {"default": "r2scan" if mode == "keep" else "pbe"} | (
        {"energies": given} if mode == "given" else {}
    )
    if mode == "keep":
        sets["default"] = "pbe"
    done = prepare(recipe_of(tmp_path, references=mode, reference_sets=sets), Console(quiet=True))
    own = done.potential.reference_sets
    assert own is not None
    assert own.energy("r2scan", [14, 8, 8]) == pytest.approx(3 * OFFSET, abs=1e-6)
    if mode in ("given", "isolated_atoms"):  # each element, which one composition alone does not tell
        assert own.shifts["r2scan"] == pytest.approx({8: OFFSET, 14: OFFSET}, abs=1e-6)
    shift = done.potential.references
    for dataset in done.sets.values():
        for i in range(len(dataset)):
            item = dataset[i]
            (known,) = done.ledger.ask([item])  # type: ignore[union-attr]
            left = (
                float(item.labels["energy"])
                - known.energy
                - sum(shift.get(z, 0.0) for z in item.atoms.numbers)
            )
            assert abs(left) < 1e-6
            assert dataset.frames[i]["energy"] == float(item.labels["energy"])


def test_compositions_that_one_set_alone_has(tmp_path: Path) -> None:
    """What the frames of one level of theory do not tell about another composition is said."""
    labelled, calculator = two_sets(), FakeBackbone.load("tiny").stock_calculator()
    for atoms in labelled[1::4]:  # of r2scan only
        del atoms[2]
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = None
        atoms.info["REF_energy"] = energy + (BASE + OFFSET) * len(atoms)
        atoms.arrays["REF_forces"] = forces
    write(tmp_path / "two.extxyz", labelled)
    done = prepare(recipe_of(tmp_path, reference_sets={"default": "pbe"}), Console(quiet=True))
    said = [f.message for f in done.findings if f.message.startswith("train, energies of 'r2scan'")]
    assert len(said) == 1
    assert "for the set 'pbe' the composition O1Si1" in said[0]
    quiet = prepare(recipe_of(tmp_path, reference_sets={"default": "r2scan"}), Console(quiet=True))
    said = [f.message for f in quiet.findings if "energies of '" in f.message]
    assert said == []


def test_a_replayed_source_has_references_of_its_own_for_each_set(tmp_path: Path) -> None:
    write(tmp_path / "two.extxyz", two_sets())
    replayed = two_sets(20)
    for atoms in replayed:
        atoms.rattle(0.01, seed=1)
        atoms.calc = FakeBackbone.load("tiny").stock_calculator()
        off = 7.0 if atoms.info["head"] == "pbe" else -2.0
        atoms.info["REF_energy"] = atoms.get_potential_energy() + off * len(atoms)
        atoms.arrays["REF_forces"] = atoms.get_forces()
        atoms.calc = None
    write(tmp_path / "old.extxyz", replayed)
    replay = {"source": str(tmp_path / "old.extxyz"), "labels": "own"}
    done = prepare(recipe_of(tmp_path, reference_sets={"default": "pbe"}, replay=replay), Console(quiet=True))
    shift = done.potential.references
    items = list(done.frames["rehearsal"])
    assert len(items) == 20
    for item, known in zip(items, done.ledger.ask(items), strict=True):  # type: ignore[union-attr]
        left = float(item.labels["energy"]) - known.energy - sum(shift[z] for z in item.atoms.numbers)
        assert abs(left) < 1e-6


def test_a_stream_has_its_sets(tmp_path: Path) -> None:
    labelled = two_sets(48)
    write(tmp_path / "two.extxyz", labelled[:30])
    for name, part in (("v", labelled[30:36]), ("c", labelled[36:42]), ("t", labelled[42:])):
        write(tmp_path / f"{name}.extxyz", part)
    done = prepare(
        recipe_of(
            tmp_path,
            stream={"frames": 30, "sample": 10},
            validation=str(tmp_path / "v.extxyz"),
            calibration=str(tmp_path / "c.extxyz"),
            test=str(tmp_path / "t.extxyz"),
            reference_sets={"default": "pbe"},
        ),
        Console(quiet=True),
    )
    assert done.stream is not None
    done.potential.eval()
    n = 0
    for batch in done.stream(1, 0):
        energy = done.potential.on_reference(done.potential.backbone(batch), batch).energy
        assert float((energy.detach() - batch.labels["energy"]).abs().max()) < 1e-6
        n += batch.n_structures
    assert n == 30


@pytest.mark.parametrize(
    ("sets", "message", "remedy"),
    [
        ({"default": "pbesol"}, "of the set 'pbesol'; there are", "pbe"),
        ({"default": "pbe", "energies": {"pbe": {"Si": 1.0}, "rscan": {"Si": 1.0}}}, "'rscan'", "r2scan"),
        (
            {"default": "pbe", "energies": {"pbe": {"Si": -5.0, "O": -5.0}}},
            "r2scan: no energy of the",
            "give it",
        ),
    ],
)
def test_sets_that_no_frame_has(tmp_path: Path, sets: dict[str, Any], message: str, remedy: str) -> None:
    write(tmp_path / "two.extxyz", two_sets())
    mode = {"references": "given"} if "energies" in sets else {}
    with pytest.raises(DataError, match=message) as raised:
        prepare(recipe_of(tmp_path, reference_sets=sets, **mode), Console(quiet=True))
    assert remedy in raised.value.remedy


def test_a_frame_that_names_no_set_or_one_that_is_not_trained_on(tmp_path: Path) -> None:
    labelled = two_sets()
    del labelled[7].info["head"]
    write(tmp_path / "two.extxyz", labelled)
    recipe = recipe_of(tmp_path, reference_sets={"default": "pbe"})
    with pytest.raises(DataError, match=r"frame 7.*names no reference set"):
        prepare(recipe, Console(quiet=True))
    (told,) = check_data(recipe).findings
    assert told.severity == "error"
    assert "names no reference set" in told.message
    write(tmp_path / "two.extxyz", two_sets())
    held = frames(6, seed=5)
    for atoms in held:
        atoms.info["head"] = "hse"
    write(tmp_path / "held.extxyz", held)
    recipe = recipe_of(tmp_path, reference_sets={"default": "pbe"}, test=str(tmp_path / "held.extxyz"))
    with pytest.raises(DataError, match=r"held\.extxyz.*of the set 'hse'.*pbe, r2scan"):
        prepare(recipe, Console(quiet=True))


@pytest.mark.parametrize(
    "data",
    [
        {"references": "given", "reference_sets": {"default": "pbe"}},
        {"reference_sets": {"default": "pbe", "energies": {"pbe": {"Si": 1.0}}}},
        {"references": "given", "reference_energies": {"Si": 1.0}, "reference_sets": {"default": "pbe"}},
    ],
)
def test_given_energies_belong_to_sets(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="need each other"):
        recipe_of(tmp_path, **data)
