"""Short molecular dynamics: conservation of energy, and a hot structure that has to stay whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet

from blip_ft.data.neighbours import contact
from blip_ft.verify.contacts import INSIDE
from blip_ft.verify.models import evaluated
from blip_ft.verify.verdict import Check, Result, at_most

#: ps of a run without thermostat; its slope then scatters by some 0.1 meV/atom/ps
NVE_TIME = 0.5
#: meV/atom/ps. A solid heats by 3.9 K/ps for each: 1 is what a thermostat of 1 ps holds within 4 K
NVE_GOOD, NVE_LIMIT = 1.0, 5.0
#: ps at the highest temperature
HOT_TIME = 5.0
#: atoms of a periodic structure in dynamics, at least
LEAST_ATOMS = 8
#: 1/fs, of the Langevin thermostat
FRICTION = 0.01
#: steps between two looks at a hot structure
LOOK = 10
#: standard deviations of the kinetic temperature beyond which a structure has blown up
HOT_STDS = 8.0


def timestep(atoms: Atoms, *, hot: bool) -> float:
    """fs: 0.5 with hydrogen and 1 without; hot structures of heavier elements than lithium and beryllium 2."""
    lightest = float(atoms.get_masses().min())
    if lightest < 3:
        return 0.5
    return 2.0 if hot and lightest > 10 else 1.0


def nve_steps(atoms: Atoms) -> int:
    """Steps of the run without thermostat."""
    return round(1e3 * NVE_TIME / timestep(atoms, hot=False))


def hot_steps(atoms: Atoms) -> int:
    """Steps of the whole hot run."""
    return round(1e3 * HOT_TIME / timestep(atoms, hot=True))


def repeated(atoms: Atoms) -> Atoms:
    """A periodic structure of :data:`LEAST_ATOMS` or more, as one atom has no relative motion."""
    out: Atoms = atoms.copy()
    while len(out) < LEAST_ATOMS and out.pbc.any():
        lengths = np.where(out.pbc, out.cell.lengths(), np.inf)
        out = out.repeat([2 if k == int(np.argmin(lengths)) else 1 for k in range(3)])
    return out


def seconds_per_step(atoms: Atoms, calculator: Calculator) -> float:
    """Of a call of the model, the best of three after one that warms up."""
    taken = []
    for n in range(4):
        moved = evaluated(atoms, calculator)
        moved.rattle(1e-3, seed=n)
        started = time.perf_counter()
        moved.get_forces()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def with_velocities(atoms: Atoms, temperature: float, seed: int) -> Atoms:
    """A copy with Maxwell's velocities (K) and no total momentum."""
    out: Atoms = atoms.copy()
    rng = np.random.default_rng(seed)
    masses = out.get_masses()[:, None]
    velocities = rng.normal(size=(len(out), 3)) * np.sqrt(units.kB * temperature / masses)
    velocities -= (masses * velocities).sum(axis=0) / masses.sum()
    out.set_velocities(velocities)
    return out


def check_nve(
    calculator: Calculator,
    atoms: Atoms,
    precision: str,
    temperature: float,
    steps: int,
    advance: Callable[[int], Any],
) -> Check:
    """Slope of the total energy, meV/atom/ps, of velocity Verlet from a start at ``temperature`` (K)."""
    name = "nve_drift" if precision == "given" else f"nve_drift_{precision}"
    moving = with_velocities(atoms, temperature, seed=0)
    moving.calc = calculator
    step = timestep(atoms, hot=False)
    run = VelocityVerlet(moving, timestep=step * units.fs)
    energies = []
    for _ in range(steps):
        run.run(1)
        energies.append(1e3 * moving.get_total_energy() / len(atoms))
        advance(1)
        if not np.isfinite(energies[-1]):
            return Check(name, "fail", None, NVE_LIMIT, "meV/atom/ps", "the energy is not finite")
    slope = float(np.polyfit(1e-3 * step * np.arange(steps), energies, 1)[0])
    note = f"{steps} steps of {step:g} fs at {temperature:.0f} K"
    return at_most(name, abs(slope), good=NVE_GOOD, limit=NVE_LIMIT, unit="meV/atom/ps", note=note)


def check_hot(
    calculator: Calculator, atoms: Atoms, temperature: float, steps: int, advance: Callable[[int], Any]
) -> Check:
    """Time, ps, that a structure stays whole at ``temperature`` (K); fewer than :data:`HOT_TIME` are a warning at best.

    It is not whole any more where a number is not finite, two atoms are closer than 60 % of their bond length, or
    the kinetic temperature is :data:`HOT_STDS` of its own standard deviations too high.
    """
    moving = with_velocities(atoms, temperature, seed=1)
    moving.calc = calculator
    step = timestep(atoms, hot=True)
    run = Langevin(
        moving,
        timestep=step * units.fs,
        temperature_K=temperature,
        friction=FRICTION / units.fs,
        fixcm=False,
        rng=np.random.default_rng(2),
    )
    bound = temperature * (1 + HOT_STDS * np.sqrt(2 / (3 * len(atoms))))
    closest = np.inf
    for done in range(0, steps, LOOK):
        some = min(LOOK, steps - done)
        run.run(some)
        advance(some)
        why = ""
        if not (np.isfinite(moving.get_potential_energy()) and np.isfinite(moving.positions).all()):
            why = "numbers that are not finite"
        else:
            closest = min(closest, contact(moving))
            if closest < INSIDE:
                why = f"two atoms at {100 * closest:.0f} % of their bond length"
            elif moving.get_temperature() > bound:
                why = f"a kinetic temperature of {moving.get_temperature():.0f} K"
        if why:
            survived = 1e-3 * step * (done + some)
            return Check(
                "md_high_temperature", "fail", survived, HOT_TIME, "ps", f"{temperature:.0f} K: {why}"
            )
    length = 1e-3 * step * steps
    whole = length >= HOT_TIME - 1e-9
    result: Result = "pass" if whole else "warn"
    note = f"{temperature:.0f} K, closest atoms at {100 * closest:.0f} % of their bond length"
    return Check(
        "md_high_temperature", result, length, HOT_TIME, "ps", note if whole else f"{note}; cut for time"
    )
