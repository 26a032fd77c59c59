"""ASE's integrators, and their state to the last digit, so that a run that goes on is one that never stopped.

``nve``: velocity Verlet. ``nvt``: Langevin (Vanden-Eijnden and Ciccotti 2006) or a Nosé-Hoover chain. ``npt``: the
equations of Martyna, Tobias and Klein (1994), volume or whole cell.

Nosé-Hoover chains of ASE count 3 n degrees of freedom, but the motion of the whole is conserved, and at rest: they
get the temperature (n - 1)/n T, at which the 3 n - 3 others have T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.constraints import FixCom
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet

from blip_ft.simulate.options import Dynamics

#: what ASE's integrators, their thermostats and barostats remember from step to step beside the atoms
_MEMORY = {
    "": ("_p_eps", "_eps", "_volume0", "_cell0", "_p_g"),
    "_thermostat": ("_eta", "_p_eta"),
    "_barostat": ("_xi", "_p_xi"),
}


#: those that are used here; each has its step
Integrator = VelocityVerlet | Langevin | NoseHooverChainNVT | IsotropicMTKNPT | MTKNPT


def integrator(atoms: Atoms, dynamics: Dynamics) -> Integrator:
    """The integrator of a run, at its first step.

    Args:
        atoms: with momenta and a calculator; Langevin dynamics of free atoms keeps their centre where it is.
        dynamics: what is to be run.
    """
    dt = dynamics.timestep * units.fs
    if dynamics.ensemble == "nve":
        return VelocityVerlet(atoms, dt)
    assert dynamics.temperature is not None
    if dynamics.ensemble == "nvt" and dynamics.thermostat == "langevin":
        if not atoms.constraints:
            atoms.set_constraint(FixCom())
        return Langevin(
            atoms,
            dt,
            temperature_K=dynamics.temperature,
            friction=dynamics.friction / (1000 * units.fs),
            fixcm=False,
            rng=np.random.default_rng([dynamics.seed, 1]),
        )
    temperature = dynamics.temperature * (len(atoms) - 1) / len(atoms)
    damping = dt * 100 if dynamics.damping is None else dynamics.damping * units.fs
    if dynamics.ensemble == "nvt":
        return NoseHooverChainNVT(atoms, dt, temperature_K=temperature, tdamp=damping)
    barostat = dt * 1000 if dynamics.pressure_damping is None else dynamics.pressure_damping * units.fs
    kind = IsotropicMTKNPT if dynamics.cell == "isotropic" else MTKNPT
    return kind(
        atoms,
        dt,
        temperature_K=temperature,
        pressure_au=(dynamics.pressure or 0.0) * units.GPa,
        tdamp=damping,
        pdamp=barostat,
    )


def set_temperature(md: Integrator, temperature: float | None) -> None:
    """Another temperature for Langevin's noise, K; nothing for the others."""
    if isinstance(md, Langevin) and temperature is not None:
        md.set_temperature(temperature_K=temperature)


def conserved(md: Integrator) -> float | None:
    """The energy that the equations of motion keep, eV; ``None`` for Langevin, which has none."""
    if isinstance(md, Langevin):
        return None
    if isinstance(md, VelocityVerlet):
        return float(md.atoms.get_total_energy())
    return float(md.get_conserved_energy())


def memory(md: Integrator) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What an integrator remembers: arrays, and the state of its random numbers."""
    arrays = {
        f"{part}.{name}": np.asarray(getattr(owner, name), dtype=np.float64)
        for part, names in _MEMORY.items()
        if (owner := getattr(md, part, None) if part else md) is not None
        for name in names
        if hasattr(owner, name)
    }
    return arrays, {"rng": md.rng.bit_generator.state} if isinstance(md, Langevin) else {}


def remember(md: Integrator, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Give an integrator, made around the atoms as they were, what :func:`memory` has returned."""
    for key, value in arrays.items():
        part, _, name = key.rpartition(".")
        # numbers stay numbers: ASE's code makes others of them
        setattr(getattr(md, part) if part else md, name, value.copy() if value.ndim else float(value))
    if isinstance(md, Langevin):
        md.rng.bit_generator.state = meta["rng"]
