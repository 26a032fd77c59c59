"""A sound model passes, and every planted fault is found by the check that is there for it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.io import write

from blip_ft import bayesian, load_backbone
from blip_ft.cli import main
from blip_ft.errors import DataError
from blip_ft.potential.export import export_native
from blip_ft.testing.fake import FakeBackbone
from blip_ft.verify import dynamics
from blip_ft.verify.contacts import ENOUGH, LEAST_WALL, WALL, check_dimers, check_scan
from blip_ft.verify.derivatives import check_forces, check_virial
from blip_ft.verify.drift import check_drift, probe_frames
from blip_ft.verify.frames import frames_of, keep_frames, kept_frames, temperature_of, temperatures_in
from blip_ft.verify.models import Verified, of_backbone, of_potential, pretrained_of
from blip_ft.verify.verdict import Check, Verdict, at_most
from blip_ft.verify.verify import static_checks, verify

from .faulty import Faulty, copper, good


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamics of a tenth of the length."""
    monkeypatch.setattr(dynamics, "NVE_TIME", 0.1)
    monkeypatch.setattr(dynamics, "HOT_TIME", 0.2)


def model(calculator: Calculator) -> Verified:
    return Verified("", {"given": lambda: calculator})


def results(verdict: Verdict) -> dict[str, str]:
    return {c.name: c.result for c in verdict.checks}


def test_a_sound_model_passes() -> None:
    verdict = verify(model(good()), [copper()], 300.0)
    assert results(verdict) == dict.fromkeys(
        ("forces", "virial", "dimer_Cu-Cu", "hydrostatic_scan", "nve_drift", "md_high_temperature"), "pass"
    )
    assert verdict.result == "pass"
    assert verdict.sentence.startswith("Molecular dynamics may be run up to 300 K")


@pytest.mark.parametrize(
    ("kind", "check"),
    [("hole", "dimer_Cu-Cu"), ("virial", "virial"), ("forces", "forces"), ("nan", "dimer_Cu-Cu")],
)
def test_a_planted_fault_fails(kind: str, check: str) -> None:
    checks, _, _ = static_checks(model(Faulty(good(), kind, at=1.4, depth=400.0)), [copper()])
    found = {c.name: c.result for c in checks}
    assert found[check] == "fail"
    assert Verdict(checks).result == "fail"
    assert check in Verdict(checks).sentence
    assert Verdict(checks).sentence.startswith("No molecular dynamics")


def test_energy_that_grows_fails() -> None:
    start = copper()
    check = dynamics.check_nve(Faulty(good(), "heat"), start, "given", 300.0, 100, lambda n: None)
    assert check.result == "fail"
    assert dynamics.check_nve(good(), start, "given", 300.0, 100, lambda n: None).result == "pass"


def test_a_crystal_that_collapses_fails() -> None:
    hot = dynamics.check_hot(
        Faulty(good(), "hole", at=2.1, depth=100.0), copper(), 3000.0, 100, lambda n: None
    )
    assert hot.result == "fail"
    assert hot.note.startswith("3000 K: ")
    assert hot.value is not None
    assert 0 < hot.value < 0.2


def test_atoms_that_are_bound_too_strongly_fail() -> None:
    (check,) = check_dimers(model(Faulty(good(), "hole", at=1.9, depth=40.0)), [29], {}, None)
    assert check.result == "fail"
    assert "bound by" in check.note


def test_dynamics_that_is_cut_short_is_a_warning() -> None:
    check = dynamics.check_hot(good(), copper(), 300.0, 20, lambda n: None)
    assert (check.result, check.value) == ("warn", pytest.approx(0.04))
    assert "cut for time" in check.note


def test_forces_and_virial_of_a_gradient_agree() -> None:
    backbone = of_backbone("", FakeBackbone())
    silica = bulk("SiO", "rocksalt", 4.6)
    silica.rattle(0.1, seed=1)
    for check in (check_forces(backbone.calculator(), silica), check_virial(backbone.calculator(), silica)):
        assert check is not None
        assert check.value is not None
        assert check.value < 1e-6
    single = check_forces(backbone.calculator("float32"), silica)
    assert single.result == "pass"


def test_a_hole_of_the_pretrained_model_fails_only_behind_a_low_wall() -> None:
    holed = model(Faulty(good(), "hole", at=1.4, depth=400.0))
    (alone,) = check_dimers(holed, [29], {}, None)
    (inherited,) = check_dimers(holed, [29], {}, [alone])
    (new,) = check_dimers(holed, [29], {}, check_dimers(model(good()), [29], {}, None))
    assert alone.value == inherited.value == new.value
    assert alone.limit == WALL
    assert inherited.limit == max(LEAST_WALL, alone.value / 2)
    assert new.limit == ENOUGH
    assert "1." in alone.note


def test_a_hole_in_the_scan_is_found() -> None:
    check = check_scan(model(Faulty(good(), "hole", at=1.95, depth=30.0)), [copper()])
    assert check is not None
    assert check.result == "fail"
    assert "strain" in check.note
    assert check_scan(model(good()), [molecule("H2O")]) is None


def test_without_periodicity_there_is_no_virial() -> None:
    atoms = molecule("H2O")
    checks, notes, _ = static_checks(of_backbone("", FakeBackbone()), [atoms])
    assert "virial" not in {c.name for c in checks}
    assert {c.name for c in checks} >= {"dimer_H-H", "dimer_H-O", "dimer_O-O"}
    assert "periodic" in notes[0]
    passed = [Check("forces", "pass", 0.0, 1.0, "eV/Å")]
    assert "at constant volume" in Verdict(passed, 300.0).sentence


def test_drift_is_that_of_the_weights() -> None:
    potential = bayesian(load_backbone("fake", "tiny", dtype="float64"), family="weight")
    frames = probe_frames([8, 14], {})
    assert [sorted(set(a.numbers.tolist())) for a in frames] == [[14], [8, 14]]
    before = pretrained_of(potential)
    same = check_drift(of_potential("", potential), before, frames)
    assert same.value == pytest.approx(0, abs=1e-12)
    with_change = potential.mean_parameters[-1]
    with_change.data.add_(1.0)
    moved = check_drift(of_potential("", potential), before, frames)
    assert moved.value is not None
    assert moved.value > 0.01
    again = check_drift(pretrained_of(potential), before, frames)
    assert again.value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("quartz-900K-0", [900.0]),
        ("run at 1200.5 K", [1200.5]),
        ("10Kbar", []),
        ("", []),
        ("300K_600K", [300.0, 600.0]),
    ],
)
def test_temperatures_in_names(text: str, found: list[float]) -> None:
    assert temperatures_in(text) == found


def test_frames_and_their_temperature(tmp_path: Path) -> None:
    small, large, other = (
        bulk("SiO", "rocksalt", 4.6),
        bulk("SiO", "rocksalt", 4.6, cubic=True),
        molecule("H2"),
    )
    large.info["temperature"] = 700
    small.info["name"] = "run-300K"
    write(tmp_path / "a.extxyz", [other, large, small])
    frames = frames_of(str(tmp_path / "a.extxyz"))
    assert [len(a) for a in frames] == [2, 2]
    assert temperature_of(frames) == 700.0
    keep_frames(frames, tmp_path)
    kept = kept_frames(tmp_path)
    assert kept is not None
    assert temperature_of(kept) == 700.0
    np.testing.assert_allclose(kept[0].positions, small.positions, atol=1e-6)
    assert kept_frames(tmp_path / "nowhere") is None


def test_velocities_say_how_hot(tmp_path: Path) -> None:
    write(tmp_path / "a.traj", dynamics.with_velocities(bulk("Si", cubic=True), 400.0, seed=0))
    found = temperature_of(frames_of(str(tmp_path / "a.traj")))
    assert found is not None
    assert 150 < found < 800


def test_overlapping_atoms_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.extxyz", [Atoms("Si2", positions=[(0, 0, 0), (0, 0, 0.3)])])
    with pytest.raises(DataError, match="bond length"):
        frames_of(str(tmp_path / "a.extxyz"))


def test_grades() -> None:
    grade = partial(at_most, "x", good=1.0, limit=2.0, unit="")
    assert [grade(v).result for v in (0.5, 1.5, 2.5, np.nan)] == ["pass", "warn", "fail", "fail"]
    assert grade(np.nan).value is None


# ---- the command -------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model folder alone."""
    potential = bayesian(load_backbone("fake", "tiny", dtype="float64"), family="weight", n_draws=2)
    potential.references = {14: 1.0}
    potential.save(tmp_path / "model")
    return tmp_path / "model"


def json_of(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, Any]:
    assert main(["verify", *args, "--json"]) == code
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json_of_a_model_folder(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # weights of the fake backend are random: holes
    found = json_of(capsys, str(saved), "--strict", code=2)
    assert set(found) == {"verdict", "checks"}
    assert found["verdict"] == "fail"
    names = [c["name"] for c in found["checks"]]
    assert {"forces", "virial", "dimer_Si-Si", "nve_drift_float64", "nve_drift_float32"} <= set(names)
    for check in found["checks"]:
        assert set(check) == {"name", "result", "value", "limit"}


def test_an_exported_file_goes_through_the_vendors_calculator(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from blip_ft.potential.checkpoint import load_model

    export_native(load_model(saved), tmp_path / "export")
    write(tmp_path / "si.extxyz", bulk("Si"))
    opened = []
    native = FakeBackbone.open_native

    def spy(self: FakeBackbone, path: Path, *, as_used: bool = False) -> Any:
        opened.append(as_used)
        return native(self, path, as_used=as_used)

    monkeypatch.setattr(FakeBackbone, "open_native", spy)
    monkeypatch.setattr(FakeBackbone, "load", classmethod(lambda cls, *a, **k: cls()))
    found = json_of(capsys, str(tmp_path / "export/mean.pt"), "--frames", str(tmp_path / "si.extxyz"))
    assert {"forces", "nve_drift_float64", "nve_drift_float32"} <= {c["name"] for c in found["checks"]}
    assert sorted(opened) == [False, True]


def test_a_calculator_by_import_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    write(tmp_path / "cu.extxyz", copper())
    frames = ("--frames", str(tmp_path / "cu.extxyz"))
    assert json_of(capsys, "calculator:faulty:good", *frames)["verdict"] == "pass"
    assert json_of(capsys, "calculator:faulty:holed", *frames)["verdict"] == "fail"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere"], "no model here"),
        (["calculator:nowhere:good"], "cannot be made"),
        (["calculator:json:loads"], "cannot be made"),
        (["calculator:collections:Counter"], "no calculator of ASE"),
        (["fake:tiny"], "--frames"),
        (["fake:tiny", "--frames", "gold.extxyz"], "Au"),
        (["fake:tiny", "--frames", "overlap.extxyz"], "frame 0"),
        (["fake:tiny", "--frames", "none.extxyz"], "none.extxyz"),
        (["gold.extxyz"], "export.json"),
    ],
)
def test_bad_input(args: list[str], said: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write("gold.extxyz", bulk("Au"))
    write("overlap.extxyz", Atoms("Si2", positions=[(0, 0, 0), (0, 0, 0.3)]))
    assert main(["verify", *args]) == 2
    said_there = capsys.readouterr().err
    assert "error:" in said_there
    assert said in said_there


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "hot"])
def test_temperatures_that_are_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "fake:tiny", f"--temperature={value}"])
    assert "a number above 0" in capsys.readouterr().err


# ---- a pretrained model ------------------------------------------------------------------


@pytest.mark.backend("sevennet")
def test_faults_of_a_pretrained_model() -> None:
    from blip_ft.data.read.sources import load_source
    from blip_ft.verify.frames import training_frames

    rows = load_source("sio2_polymorphs")
    frames = training_frames(rows.select([i for i, s in enumerate(rows["split"]) if s == "train"]))
    assert temperature_of(frames) == 900.0
    sound = of_backbone("", load_backbone("sevennet", "7net-0"))
    checks, _, _ = static_checks(sound, frames)
    assert Verdict(checks).result == "warn"  # two silicon atoms fall into each other behind 19 eV
    (found,) = check_dimers(model(Faulty(sound.calculator(), "hole")), [8], {}, None)
    assert found.result == "fail"
    virial = check_virial(Faulty(sound.calculator(), "virial"), frames[0])
    assert virial is not None
    assert virial.result == "fail"
