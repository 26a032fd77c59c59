"""What is verified: anything that gives energies, forces and stress, through ASE."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from numpy.typing import NDArray

from blip_ft.backbones.calculator import ModelCalculator, results_of
from blip_ft.backbones.protocol import Backbone
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.export import member
from blip_ft.system.out_of_memory import by_halves
from blip_ft.uncertainty import batch_limits
from blip_ft.variational.convert import unload

Floats = NDArray[np.float64]


@dataclass
class Verified:
    """A model, by the calculators that it gives.

    Attributes:
        title: what a reader calls it.
        calculators: {precision: makes a calculator}; ``float64``, ``float32``, or ``given`` where nobody can choose.
        energies: energies of many structures at once, eV, where that is cheaper than one by one.
        check: raises an error for a structure that the model cannot describe.
    """

    title: str
    calculators: Mapping[str, Callable[[], Calculator]]
    energies: Callable[[Sequence[Atoms]], Floats] | None = None
    check: Callable[[Atoms], None] = lambda atoms: None
    _made: dict[str, Calculator] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The most precise."""
        return next(p for p in ("float64", "given", "float32") if p in self.calculators)

    def calculator(self, precision: str | None = None) -> Calculator:
        """The calculator of a precision, made once; by default the most precise."""
        wanted = precision or self.best
        if wanted not in self._made:
            self._made[wanted] = self.calculators[wanted]()
        return self._made[wanted]

    def energies_of(self, frames: Sequence[Atoms]) -> Floats:
        """(B,) eV."""
        if self.energies is not None:
            return self.energies(frames)
        return np.array([float(evaluated(a, self.calculator()).get_potential_energy()) for a in frames])


def evaluated(atoms: Atoms, calculator: Calculator) -> Atoms:
    """A copy with a calculator."""
    out: Atoms = atoms.copy()
    out.calc = calculator
    return out


def of_backbone(title: str, backbone: Backbone) -> Verified:
    """A backbone that is not converted; it is not changed."""
    double = copy.deepcopy(backbone).to("cpu", torch.float64)
    return Verified(
        title,
        {
            "float64": lambda: BackboneCalculator(double),
            "float32": lambda: BackboneCalculator(copy.deepcopy(double).float()),
        },
        energies=lambda frames: _energies(double, frames),
    )


def of_potential(title: str, potential: BayesianPotential) -> Verified:
    """The mean weights of a potential, without energy references, which move no atom; it is not changed."""
    return of_backbone(title, member(potential, None))


def pretrained_of(potential: BayesianPotential) -> Verified:
    """The pretrained model that a potential holds; the potential is not changed."""
    starts = {id(parameter): start for parameter, start in potential.prior.rest}
    twin = copy.deepcopy(potential.backbone)
    with torch.no_grad():
        for own, other in zip(potential.backbone.parameters(), twin.parameters(), strict=True):
            if id(own) in starts:
                other.copy_(starts[id(own)])
    unload(twin, merge=False)
    return of_backbone("pretrained", twin.requires_grad_(False).eval())


def relaxed(model: Verified, atoms: Atoms, steps: int = 100) -> Atoms:
    """A copy in a minimum of the model, as far as some steps lead, with its cell where it is periodic."""
    moving = evaluated(atoms, model.calculator())
    free = FrechetCellFilter(moving) if moving.pbc.all() else moving
    FIRE(free, logfile=None).run(fmax=0.05, steps=steps)
    moving.calc = None
    return moving


class BackboneCalculator(ModelCalculator):
    """Energy (eV), forces (eV/Å) and, where the model has one and the structure is periodic, stress (eV/Å^3).

    Args:
        backbone: in the precision that is wanted.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def evaluated(self, atoms: Atoms) -> dict[str, Any]:
        """``results`` of a structure."""
        stress = self.backbone.has_stress and bool(atoms.pbc.all())
        with torch.no_grad():  # the backbone switches autograd on for its own forces
            found = self.backbone(self.backbone.batch([atoms]), forces=True, stress=stress)
        return results_of(found, stress=stress)


def _energies(backbone: Backbone, frames: Sequence[Atoms]) -> Floats:
    """(B,) eV, several structures in one call, by halves where they do not fit into memory."""
    sizes, out = [len(a) for a in frames], list[Floats]()

    def work(some: range) -> Floats:
        batch = backbone.batch(frames[some.start : some.stop])
        with torch.no_grad():
            found: Floats = backbone(batch, forces=False, stress=False).energy.double().numpy()
        return found

    limit = batch_limits.default_atoms(backbone.device)
    while (start := sum(map(len, out))) < len(frames):
        first = batch_limits.ranges(sizes[start:], structures=batch_limits.STRUCTURES, atoms=limit)[0]
        some = range(start, start + first.stop)
        parts = by_halves(work, some, sizes[some.start : some.stop], what="verifying")
        if len(parts) > 1:  # the next ones would not fit either
            limit = max(1, sum(sizes[some.start : some.stop]) // len(parts))
        out += parts
    return np.concatenate(out)
