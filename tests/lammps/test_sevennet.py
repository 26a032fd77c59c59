"""SevenNet-0 inside LAMMPS."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import units
from ase.md.verlet import VelocityVerlet
from ase.spacegroup import crystal

from blip_ft import bayesian, load_backbone
from blip_ft.lammps import attach
from blip_ft.uncertainty.calculator import BlipCalculator

pytestmark = [pytest.mark.backend("lammps"), pytest.mark.backend("sevennet")]


def test_quartz_in_units_real(lammps: Any):
    """Ten steps of dynamics as in ASE, the pressure as the slope of the energy, columns as in the calculator."""
    potential = bayesian(
        load_backbone("sevennet", "7net-0", dtype="float64"),
        family="weight",
        noise="scalar",
        prior_scale=0.05,
        n_draws=2,
    )
    sites = [(0.4697, 0, 1 / 3), (0.4133, 0.2672, 0.2142)]
    quartz = crystal(["Si", "O"], sites, spacegroup=152, cellpar=[4.916, 4.916, 5.405, 90, 90, 120])
    quartz.rattle(0.02, seed=0)
    quartz.wrap()
    lmp = lammps(quartz, units="real")
    lmp.command("velocity all create 1000 1 mom yes")
    bridge = attach(lmp, potential, every=10)
    n = len(quartz)
    fs = 1 / np.sqrt(lmp.extract_global("mvv2e") * units.kcal / units.mol)
    quartz.positions = lmp.numpy.extract_atom("x")[:n]
    quartz.set_velocities(lmp.numpy.extract_atom("v")[:n] / fs)
    quartz.set_masses(lmp.numpy.extract_atom("mass")[lmp.numpy.extract_atom("type")[:n]])
    quartz.calc = BlipCalculator(potential, n_draws=0)
    lmp.command("compute u all property/atom xu yu zu")
    lmp.command("fix n all nve")
    lmp.command("timestep 1.0")
    lmp.command("run 10")
    VelocityVerlet(quartz, timestep=fs).run(10)
    assert np.abs(lmp.numpy.extract_compute("u", 1, 2) - quartz.positions).max() < 1e-10
    assert (bridge.evaluations, bridge.with_error_bars) == (11, 2)
    (expected,) = potential.predict([quartz])
    column = lmp.numpy.extract_atom("d_forces_std_norm")[:n] * units.kcal / units.mol
    np.testing.assert_allclose(column, expected["forces_std_norm"], rtol=1e-6)

    bridge.every = 10**6  # the slope needs no error bars
    lmp.command("velocity all set 0 0 0")
    lmp.command("reset_timestep 1")
    lmp.command("run 0")
    pressure, volume = lmp.get_thermo("pzz") / lmp.extract_global("nktv2p"), lmp.get_thermo("vol")
    energies = []
    for height in (5.405 + 5e-4, 5.405 - 5e-4):
        lmp.command(f"change_box all z final 0 {height} remap units box")
        lmp.command("run 0")
        energies.append(lmp.get_thermo("pe"))
    assert energies[0] - energies[1] == pytest.approx(-pressure * volume * 1e-3 / 5.405, rel=1e-5)
