"""What no simulation starts with: each is a message with the remedy, before the first step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms, FixCom
from ase.io import read, write

from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.simulate.guard import Limits
from blip_ft.simulate.options import Dynamics
from blip_ft.simulate.run import simulate
from blip_ft.simulate.start import read_start

from .systems import model, structure


@pytest.mark.parametrize(
    ("options", "field", "remedy"),
    [
        ({"temperature": 0.0}, "--temperature", "above 0"),
        ({"temperature": -300.0}, "--temperature", "above 0"),
        ({"temperature": float("nan")}, "--temperature", "in K"),
        ({"temperature": None}, "--temperature", "--temperature 300"),
        ({"steps": 0}, "--steps", "1 or more"),
        ({"steps": -5}, "--steps", "1 or more"),
        ({"timestep": 0.0}, "--timestep", "in fs"),
        ({"timestep": 50.0}, "--timestep", "in fs"),
        ({"every": 0}, "--every", "1 or more"),
        ({"seed": -1}, "--seed", "0 or"),
        ({"draws": 1}, "--draws", "2 or more"),
        ({"friction": -1.0}, "--friction", "nve"),
        ({"pressure": 1.0}, "--pressure", "--ensemble npt"),
        ({"ensemble": "npt", "pressure": float("inf")}, "--pressure", "GPa"),
        ({"heat_to": -1.0}, "--heat-to", "above 0"),
        ({"heat_to": 900.0, "thermostat": "nose-hoover"}, "--heat-to", "langevin"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], field: str, remedy: str):
    with pytest.raises(BlipError) as caught:
        Dynamics(**({"ensemble": "nvt", "steps": 10, "temperature": 300.0} | options))
    assert caught.value.field == field
    assert remedy in caught.value.remedy


def broken(what: str) -> tuple[Atoms, dict[str, Any]]:
    """A start that is refused, and options."""
    atoms, options = structure(), {"ensemble": "nvt", "temperature": 300.0}
    if what == "element":
        atoms.numbers[0] = 79
    elif what == "overlap":
        atoms.positions[1] = atoms.positions[0] + [0.2, 0, 0]
    elif what == "image":
        atoms.positions[1] = atoms.positions[0] + atoms.cell[2] + [0.1, 0, 0]
    elif what == "thin":
        atoms.set_cell(np.diag([4.4, 4.6, 3.5]))
    elif what == "NaN":
        atoms.positions[0, 0] = np.nan
    elif what == "one atom":
        atoms = atoms[:1]
    elif what == "molecule":
        atoms.pbc, options["ensemble"] = False, "npt"
    elif what == "slab":
        atoms.pbc, options["ensemble"] = (True, True, False), "npt"
    elif what == "momenta":
        options = {"ensemble": "nve"}
    elif what == "fixed":
        atoms.set_constraint(FixAtoms([0]))
        options["thermostat"] = "nose-hoover"
    elif what == "constraint":
        atoms.set_constraint(FixCom())
    return atoms, options


@pytest.mark.parametrize(
    ("what", "problem", "remedy"),
    [
        ("element", "element Au is unknown", "choose a model"),
        ("overlap", r"atoms 0 and 1 \(Si and O\) are 0.20 Å apart", "relax"),
        ("image", r"atoms 0 and 1 \(Si and O\) are 0.10 Å apart", "relax"),
        ("thin", "3.50 Å thick and the model looks 4.00 Å far", "--repeat 1 1 2, or --thin-cell"),
        ("NaN", "which is no place", "mend or remove"),
        ("one atom", "nothing to move against", "--repeat"),
        ("molecule", "periodic in all directions", "--ensemble nvt"),
        ("slab", "periodic in all directions", "--ensemble nvt"),
        ("momenta", "no momenta", "--temperature 300"),
        ("fixed", "nve or Langevin", "--thermostat langevin"),
        ("constraint", "only fixed atoms", "remove"),
    ],
)
def test_structures_that_cannot_be_run(
    potential: BayesianPotential, tmp_path: Path, what: str, problem: str, remedy: str
):
    atoms, options = broken(what)
    with pytest.raises(BlipError, match=problem) as caught:
        simulate(
            potential, atoms, tmp_path / "out.extxyz", Dynamics(steps=4, **options), Limits(), file="in.xyz"
        )
    assert remedy in caught.value.remedy
    assert caught.value.file == "in.xyz"
    assert list(tmp_path.iterdir()) == []


def test_a_thin_cell_that_is_meant(potential: BayesianPotential, tmp_path: Path):
    atoms, options = broken("thin")
    done = simulate(
        potential, atoms, tmp_path / "o.xyz", Dynamics(steps=2, **options), Limits(), thin_cell=True
    )
    assert done.steps == 2


@pytest.mark.parametrize("name", ["out.traj", "missing/out.extxyz"])
def test_outputs_that_cannot_be(potential: BayesianPotential, tmp_path: Path, name: str):
    with pytest.raises(BlipError, match=r"extended XYZ|folder does not exist"):
        simulate(potential, structure(), tmp_path / name, Dynamics("nve", 2, temperature=300.0), Limits())
    assert list(tmp_path.iterdir()) == []


# ---- reading -----------------------------------------------------------------------------------


def test_one_structure_is_read_without_its_results_and_repeated(tmp_path: Path):
    atoms = structure()
    atoms.set_momenta(np.ones((6, 3)))
    path = tmp_path / "in.extxyz"
    write(path, [structure(1), atoms])
    with pytest.raises(BlipError, match="several structures") as caught:
        read_start(str(path))
    assert "@0:1" in caught.value.remedy
    found = read_start(f"{path}@1:2", (2, 1, 1))
    assert len(found) == 12
    assert found.calc is None
    np.testing.assert_allclose(found.get_momenta(), 1)
    np.testing.assert_allclose(found.positions[:6], read(path, 1).positions)


def test_open_directions_are_not_repeated(tmp_path: Path):
    write(tmp_path / "in.extxyz", structure(periodic=False))
    with pytest.raises(BlipError, match="not periodic"):
        read_start(str(tmp_path / "in.extxyz"), (1, 2, 1))


# ---- thresholds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, (0.2, 0.3)),
        ({"save": "0.05", "stop": "4x"}, (0.05, 0.4)),
        ({"save": "off"}, (None, 0.3)),
        ({"save": "off", "stop": "OFF"}, (None, None)),
        ({"signal": "ood_score"}, (4.0, 6.0)),
        ({"available": False}, (None, None)),
    ],
)
def test_thresholds(potential: BayesianPotential, options: dict[str, Any], found: tuple[Any, Any]):
    limits = Limits.of(potential.levels, **options)
    assert (limits.save, limits.stop) == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"save": "3x", "stop": "2x"}, "saved above 0.3, but the run has ended above 0.2"),
        ({"save": "much"}, "'much' is no threshold"),
        ({"stop": "-1"}, "'-1' is no threshold"),
        ({"stop": "nanx"}, "is no threshold"),
        ({"patience": 0}, "0 error bars in a row"),
        ({"available": False, "stop": "1"}, "no forces_std to watch"),
    ],
)
def test_bad_thresholds(potential: BayesianPotential, options: dict[str, Any], problem: str):
    with pytest.raises(BlipError, match=re.escape(problem)):
        Limits.of(potential.levels, **options)


def test_multiples_need_a_level():
    with pytest.raises(BlipError, match="does not say which forces_std") as caught:
        Limits.of(None)
    assert "eV/Å" in caught.value.remedy
    assert Limits.of(None, save="0.1", stop="0.2").stop == 0.2


def test_levels_travel_with_the_model(tmp_path: Path):
    from blip_ft.library import load

    potential = model(scores=False)
    potential.save(tmp_path / "model")
    assert load(tmp_path / "model").levels == potential.levels
