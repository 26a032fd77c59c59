"""Equation of state and elastic constants of a crystal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.stress import voigt_6_to_full_3x3_strain
from rich.console import Console

from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.properties.estimate import Estimate, Floats
from blip_ft.properties.members import Members, checked, members_of, over_draws
from blip_ft.properties.minima import FMAX, minimum


@dataclass(frozen=True)
class EquationOfState:
    """Birch-Murnaghan, of third order.

    Attributes:
        energy: at the minimum, eV.
        volume: there, Å^3.
        bulk_modulus: GPa.
        bulk_modulus_derivative: dB/dP.
        volumes: (m,) Å^3 that were computed, around each draw's own minimum.
        energies: (m,) of these, eV.
    """

    energy: Estimate
    volume: Estimate
    bulk_modulus: Estimate
    bulk_modulus_derivative: Estimate
    volumes: Estimate
    energies: Estimate


def equation_of_state(
    potential: BayesianPotential | Members,
    atoms: Atoms,
    *,
    strain: float = 0.03,
    points: int = 7,
    n_draws: int | None = None,
    fmax: float = FMAX,
    console: Console | None = None,
) -> EquationOfState:
    """Energy against volume: each draw's own cell scaled in all directions, positions at their minimum.

    Args:
        potential: with a posterior.
        atoms: near its minimum.
        strain: largest linear strain.
        points: volumes, 5 or more.
        n_draws: K; by default those of the model.
        fmax: eV/Å, largest force at a minimum of the mean model.
        console: for progress; by default standard error.

    Raises:
        BlipError: as :func:`blip_ft.properties.relax`; too few points, or no minimum among them.
    """
    if points < 5 or not 0 < strain < 0.2:
        raise BlipError("5 points or more, and a strain between 0 and 0.2", field="points, strain")
    members = members_of(potential, n_draws)
    begin = checked(members, atoms, cell=True)
    strains = np.linspace(-strain, strain, points)

    def work(calculator: Calculator, start: list[Atoms] | None) -> tuple[dict[str, Any], list[Atoms]]:
        near = begin if start is None else start[points // 2]
        best = minimum(members, calculator, near, cell=True, fmax=fmax, draw=start)
        frames = [best.copy() for _ in strains] if start is None else [a.copy() for a in start]
        for frame, s in zip(frames, strains, strict=True):
            frame.set_cell(best.cell * (1 + s), scale_atoms=True)
        ends = [minimum(members, calculator, f, cell=False, fmax=fmax, draw=start) for f in frames]
        volumes = np.array([a.get_volume() for a in ends])
        energies = np.array([a.get_potential_energy() for a in ends])
        energy, volume, modulus, derivative = birch_murnaghan(volumes, energies)
        return {
            "energy": energy,
            "volume": volume,
            "bulk_modulus": modulus / units.GPa,
            "bulk_modulus_derivative": derivative,
            "volumes": volumes,
            "energies": energies,
        }, ends

    names = {
        "energy": "eV",
        "volume": "Å^3",
        "bulk_modulus": "GPa",
        "bulk_modulus_derivative": "",
        "volumes": "Å^3",
        "energies": "eV",
    }
    found, _ = over_draws(members, work, names, "equation of state", console)
    return EquationOfState(**found)


def birch_murnaghan(volumes: Floats, energies: Floats) -> tuple[float, float, float, float]:
    """Minimum of E (eV), V (Å^3), B (eV/Å^3) and dB/dP of a fit in which E is cubic in V^(-2/3).

    Birch, Phys. Rev. 71, 809 (1947). Linear in its coefficients, so small differences of energies stay smooth.

    Raises:
        BlipError: the energies have no minimum there.
    """
    x0 = float(np.mean(volumes ** (-2 / 3)))
    series = np.polynomial.Polynomial(np.polynomial.polynomial.polyfit(volumes ** (-2 / 3) / x0, energies, 3))
    first, second, third = (series.deriv(n) for n in (1, 2, 3))
    ends = sorted((volumes ** (-2 / 3) / x0)[[0, -1]].tolist())
    roots = [float(r.real) for r in first.roots() if abs(r.imag) < 1e-9 and second(r.real) > 0]
    inside = [r for r in roots if ends[0] <= r <= ends[1]]
    if not inside:
        raise BlipError(
            "the energy has no minimum among these volumes", remedy="a larger strain, or start nearer to it"
        )
    u = inside[0]
    volume = float((u * x0) ** (-3 / 2))
    # E'(V) = E_u u_V with u = V^(-2/3) / x0
    u1, u2, u3 = (-2 / 3) * u / volume, (10 / 9) * u / volume**2, (-80 / 27) * u / volume**3
    e2 = second(u) * u1**2
    e3 = third(u) * u1**3 + 3 * second(u) * u1 * u2 + first(u) * u3
    return float(series(u)), volume, float(volume * e2), float(-1 - volume * e3 / e2)


@dataclass(frozen=True)
class ElasticConstants:
    """Stiffness with relaxed ions, and averages over orientations (Voigt-Reuss-Hill).

    Attributes:
        stiffness: (6, 6) GPa, order xx yy zz yz xz xy, engineering strains.
        bulk_modulus: GPa.
        shear_modulus: GPa.
    """

    stiffness: Estimate
    bulk_modulus: Estimate
    shear_modulus: Estimate


def elastic_constants(
    potential: BayesianPotential | Members,
    atoms: Atoms,
    *,
    strain: float = 0.005,
    n_draws: int | None = None,
    fmax: float = FMAX,
    console: Console | None = None,
) -> ElasticConstants:
    """Central differences of the stress around each draw's own cell.

    Args:
        potential: with a posterior.
        atoms: near its minimum.
        strain: to either side.
        n_draws: K; by default those of the model.
        fmax: eV/Å, largest force at a minimum of the mean model.
        console: for progress; by default standard error.

    Raises:
        BlipError: as :func:`blip_ft.properties.relax`.
    """
    members = members_of(potential, n_draws)
    begin = checked(members, atoms, cell=True)

    def work(calculator: Calculator, start: Atoms | None) -> tuple[dict[str, Any], Atoms]:
        best = minimum(members, calculator, start or begin, cell=True, fmax=fmax, draw=start)
        stiffness = np.empty((6, 6))
        for i in range(6):
            stresses = []
            for sign in (1, -1):
                voigt = np.zeros(6)
                voigt[i] = sign * strain
                frame = best.copy()
                deformed = best.cell.array @ voigt_6_to_full_3x3_strain(voigt)  # with the identity
                frame.set_cell(deformed, scale_atoms=True)
                end = minimum(members, calculator, frame, cell=False, fmax=fmax, draw=start)
                stresses.append(end.get_stress())
            stiffness[:, i] = (stresses[0] - stresses[1]) / (2 * strain) / units.GPa
        stiffness = (stiffness + stiffness.T) / 2
        bulk, shear = voigt_reuss_hill(stiffness)
        return {"stiffness": stiffness, "bulk_modulus": bulk, "shear_modulus": shear}, best

    names = dict.fromkeys(("stiffness", "bulk_modulus", "shear_modulus"), "GPa")
    found, _ = over_draws(members, work, names, "elastic constants", console)
    return ElasticConstants(**found)


def voigt_reuss_hill(stiffness: Floats) -> tuple[float, float]:
    """Bulk and shear modulus of a polycrystal, in the unit of the (6, 6) stiffness.

    Hill, Proc. Phys. Soc. A 65, 349 (1952).
    """

    def averages(m: Floats, diagonal: float, shear: float) -> tuple[float, float]:
        normal, across, twist = np.trace(m[:3, :3]), m[0, 1] + m[1, 2] + m[0, 2], np.trace(m[3:, 3:])
        return normal + 2 * across, diagonal * (normal - across) + shear * twist

    voigt_bulk, voigt_shear = averages(stiffness, 1.0, 3.0)
    reuss_bulk, reuss_shear = averages(np.asarray(np.linalg.inv(stiffness), dtype=float), 4.0, 3.0)
    return (voigt_bulk / 9 + 1 / reuss_bulk) / 2, (voigt_shear / 15 + 15 / reuss_shear) / 2
