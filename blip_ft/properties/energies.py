"""Differences of energies at minima, and of a minimum and a saddle point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.mep import NEB
from ase.optimize import BFGS
from rich.console import Console

from blip_ft.errors import BlipError, DataError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.properties.estimate import Estimate, Floats
from blip_ft.properties.members import Members, checked, members_of, over_draws
from blip_ft.properties.minima import FMAX, STEPS, minimum

#: eV/Å, largest force on a path of the mean model; a saddle point is stationary, so its energy is off by the square
NEB_FMAX = 5e-3


@dataclass(frozen=True)
class Difference:
    """A difference of energies, and what it is a difference of.

    Attributes:
        energy: eV.
        parts: energies by name, eV, of the same draws; their error bars are mostly common to all and cancel.
    """

    energy: Estimate
    parts: Mapping[str, Estimate]

    @property
    def uncorrelated_std(self) -> Floats:
        """What the std would be if the parts' errors had nothing to do with each other, eV."""
        return np.asarray(np.sqrt(sum(part.std**2 for part in self.parts.values())))


def reaction_energy(
    potential: BayesianPotential | Members,
    reactants: Sequence[tuple[float, Atoms]],
    products: Sequence[tuple[float, Atoms]],
    *,
    n_draws: int | None = None,
    fmax: float = FMAX,
    console: Console | None = None,
) -> Difference:
    """Energy of the products minus that of the reactants, each at its minimum; positive: uphill.

    Args:
        potential: with a posterior.
        reactants: number and structure of each; cells of those that are periodic in all directions are relaxed.
        products: likewise.
        n_draws: K; by default those of the model.
        fmax: eV/Å, largest force at a minimum of the mean model.
        console: for progress; by default standard error.

    Raises:
        DataError: the two sides do not hold the same atoms.
        BlipError: as :func:`blip_ft.properties.relax`.
    """
    sides = [*((-n, a, "reactant") for n, a in reactants), *((n, a, "product") for n, a in products)]
    balance: dict[int, float] = {}
    for n, atoms, _ in sides:
        for z in atoms.numbers.tolist():
            balance[z] = balance.get(z, 0.0) + n
    if any(abs(n) > 1e-9 for n in balance.values()):
        raise DataError(
            "the two sides of the reaction do not hold the same atoms",
            field="reactants, products",
            remedy="give the number of each structure: [(2, hydrogen), (1, oxygen)], [(2, water)]",
        )
    members = members_of(potential, n_draws)
    starts = [checked(members, a, cell=bool(a.pbc.all()), name=f"{side}s") for _, a, side in sides]
    names = _names([f"{side} {a.get_chemical_formula()}" for _, a, side in sides])

    def work(calculator: Calculator, start: list[Atoms] | None) -> tuple[dict[str, Any], list[Atoms]]:
        ends = [
            minimum(members, calculator, a, cell=bool(a.pbc.all()), fmax=fmax, draw=start)
            for a in (starts if start is None else start)
        ]
        parts = {
            name: abs(n) * end.get_potential_energy()
            for (n, _, _), name, end in zip(sides, names, ends, strict=True)
        }
        return parts, ends

    found, _ = over_draws(members, work, dict.fromkeys(names, "eV"), "reaction energy", console)
    signs = [np.sign(n) for n, _, _ in sides]
    terms = [float(s) * found[name] for s, name in zip(signs, names, strict=True)]
    return Difference(_sum(terms), found)


def vacancy_formation_energy(
    potential: BayesianPotential | Members,
    atoms: Atoms,
    index: int = 0,
    *,
    supercell: tuple[int, int, int] = (1, 1, 1),
    reservoir: Atoms | None = None,
    n_draws: int | None = None,
    fmax: float = FMAX,
    console: Console | None = None,
) -> Difference:
    """E(with a vacancy) + E(one atom of the reservoir) - E(perfect), in the cell of the perfect crystal.

    Args:
        potential: with a posterior.
        atoms: the perfect crystal; its cell is relaxed.
        index: atom of ``atoms`` that is taken out of the supercell.
        supercell: repetitions of it.
        reservoir: where the atom goes: a structure of this element alone; by default the crystal itself, where that has
            one element.
        n_draws: K; by default those of the model.
        fmax: eV/Å, largest force at a minimum of the mean model.
        console: for progress; by default standard error.

    Raises:
        DataError: no such atom, a compound without a reservoir, a reservoir of another element.
        BlipError: as :func:`blip_ft.properties.relax`.
    """
    members = members_of(potential, n_draws)
    perfect = checked(members, atoms, cell=True)
    if not 0 <= index < len(perfect):
        raise DataError(f"there is no atom {index} of {len(perfect)}", field="index")
    if len(perfect) * np.prod(supercell) < 2:
        raise DataError("nothing is left of one atom", field="supercell", remedy="repeat the cell")
    source = perfect if reservoir is None else checked(members, reservoir, cell=bool(reservoir.pbc.all()))
    if set(source.numbers.tolist()) != {int(perfect.numbers[index])}:
        raise DataError(
            f"the atom {perfect[index].symbol} has to go to a structure of that element alone",
            field="reservoir",
            remedy="give reservoir=, for instance the elemental crystal or molecule",
        )

    def work(calculator: Calculator, start: list[Atoms] | None) -> tuple[dict[str, Any], list[Atoms]]:
        first = [perfect, source] if start is None else start
        crystal = minimum(members, calculator, first[0], cell=True, fmax=fmax, draw=start)
        rest = crystal
        if reservoir is not None:
            free = bool(source.pbc.all())
            rest = minimum(members, calculator, first[1], cell=free, fmax=fmax, draw=start)
        defect = crystal.repeat(supercell)
        del defect[index]
        if start is not None:  # the mean's relaxed vacancy, in this draw's cell
            defect.set_scaled_positions(start[2].get_scaled_positions())
        defect = minimum(members, calculator, defect, cell=False, fmax=fmax, draw=start)
        repeated = float(np.prod(supercell)) * crystal.get_potential_energy()
        return {
            "vacancy": defect.get_potential_energy(),
            "reservoir": rest.get_potential_energy() / len(rest),
            "perfect": repeated,
        }, [crystal, rest, defect]

    names = dict.fromkeys(("vacancy", "reservoir", "perfect"), "eV")
    found, _ = over_draws(members, work, names, "vacancy", console)
    return Difference(found["vacancy"] + found["reservoir"] - found["perfect"], found)


@dataclass(frozen=True)
class Barrier:
    """A path of least energy between two minima.

    Attributes:
        forward: from the initial minimum to the saddle point, eV.
        reverse: from the final minimum, eV.
        path: (images,) energies of the mean model above the initial minimum, eV. Where an image lies between two
            stationary points is a matter of springs, so it has no error bar.
        images: of the mean model, without calculators.
    """

    forward: Estimate
    reverse: Estimate
    path: Floats
    images: Sequence[Atoms]


def barrier(
    potential: BayesianPotential | Members,
    initial: Atoms,
    final: Atoms,
    *,
    images: int = 5,
    guess: Sequence[Atoms] | None = None,
    n_draws: int | None = None,
    fmax: float = NEB_FMAX,
    console: Console | None = None,
) -> Barrier:
    """Nudged elastic band with a climbing image, by ASE; minima, path and saddle point are those of each draw.

    Henkelman, Uberuaga and Jonsson, J. Chem. Phys. 113, 9901 (2000). Cells stay as they are.

    Args:
        potential: with a posterior.
        initial: near one minimum.
        final: near the other, atoms in the same order.
        images: between the minima; the first path is interpolated (image dependent pair potential).
        guess: images of the first path in place of the interpolation, without the minima.
        n_draws: K; by default those of the model.
        fmax: eV/Å, largest force on the path of the mean model.
        console: for progress; by default standard error.

    Raises:
        DataError: the two have other atoms or another order of them, or no image between them.
        BlipError: as :func:`blip_ft.properties.relax`; the path does not converge.
    """
    members = members_of(potential, n_draws)
    ends = [checked(members, a, name=n) for a, n in ((initial, "initial"), (final, "final"))]
    inner = None if guess is None else [checked(members, a, name="guess") for a in guess]
    for other in (ends[1], *(inner or ())):
        if not np.array_equal(other.numbers, ends[0].numbers):
            raise DataError(
                "the structures have to hold the same atoms in the same order", field="initial, final, guess"
            )
    if (len(inner) if inner is not None else images) < 1:
        raise DataError("a path needs an image between its ends", field="images", remedy="images=5")

    def work(calculator: Calculator, start: list[Atoms] | None) -> tuple[dict[str, Any], list[Atoms]]:
        # a stationary energy is off by the square of the force, and differences are divided by the amplitude
        precision = fmax if start is None else fmax * np.sqrt(members.amplitude)
        first, last = (
            minimum(members, calculator, a, cell=False, fmax=min(FMAX, fmax), draw=start)
            for a in (ends if start is None else (start[0], start[-1]))
        )
        if start is not None:
            between = [a.copy() for a in start[1:-1]]
        else:
            between = [first.copy() for _ in range(images)] if inner is None else [a.copy() for a in inner]
        path = [first, *between, last]
        for image in between:
            image.calc = calculator
        molecule = not first.pbc.any()
        band: Any = NEB(
            path,
            climb=True,
            method="improvedtangent",
            allow_shared_calculator=True,
            remove_rotation_and_translation=molecule,
        )
        if start is None and inner is None:
            band.interpolate("idpp")
        if not BFGS(band, logfile=None).run(fmax=precision, steps=STEPS):
            raise BlipError(
                f"the path does not converge to {precision:.1e} eV/Å in {STEPS} steps",
                remedy="give a guess= of the path, other images=, or a larger fmax",
            )
        energies = np.array([a.get_potential_energy() for a in path])
        top = energies.max()
        return {"forward": top - energies[0], "reverse": top - energies[-1]}, path

    names = dict.fromkeys(("forward", "reverse"), "eV")
    found, path = over_draws(members, work, names, "barrier", console)
    energies = np.array([a.get_potential_energy() for a in path])
    for atoms in path:
        atoms.calc = None
    return Barrier(path=energies - energies[0], images=path, **found)


def _names(names: Sequence[str]) -> list[str]:
    """The same names, numbered where several are equal."""
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _sum(terms: Sequence[Estimate]) -> Estimate:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
