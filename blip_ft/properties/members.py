"""The mean model and the draws of one posterior, as calculators, and what they give together.

A property q of a draw at a fraction a of the posterior's width is q(theta + a s). Draws in pairs give the derivative
along s, [q(theta + a s) - q(theta - a s)] / 2a, which is the deviation of q at full width as predictions have it
(docs/uncertainty.md): the same linearisation, with every structure at the minimum of its own draw. Times the scale that
calibration has found. Draws of other families are single and have the full width, or what ``posterior.amplitude`` says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from rich.console import Console

from blip_ft.backbones.calculator import ModelCalculator, results_of
from blip_ft.data.neighbours import contact
from blip_ft.errors import BlipError, DataError
from blip_ft.families.model import drawing
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.potential.fingerprint import fingerprint
from blip_ft.properties.estimate import Estimate, Floats
from blip_ft.system.progress import progress
from blip_ft.variational.noise import OFF, Noise

S = TypeVar("S")
#: atoms closer than this share of their bond length lie on each other
OVERLAP = 0.3


@dataclass(frozen=True)
class Members:
    """One model K + 1 times.

    Attributes:
        mean: calculator of the mean model.
        draws: calculators of the draws; where they are ``paired``, number 2k + 1 is opposite to number 2k.
        amplitude: width of the draws in units of the posterior's.
        scale: calibrated factor of all epistemic stds.
        paired: see ``draws``.
        source: name of these draws, the same for the same draws.
        has_stress: whether there is a stress for periodic structures.
        check: raises an error for a structure that the model cannot describe.
    """

    mean: Calculator
    draws: Sequence[Calculator]
    amplitude: float = 1.0
    scale: float = 1.0
    paired: bool = True
    source: str = ""
    has_stress: bool = True
    check: Callable[[Atoms], None] = lambda atoms: None

    def estimate(self, mean: Floats, draws: Sequence[Floats], unit: str) -> Estimate:
        """A quantity of the mean model and of each draw, at full width."""
        values = np.stack(draws)
        if self.paired:
            half = (values[::2] - values[1::2]) / 2
            off = np.stack([half, -half], axis=1).reshape(values.shape)
        else:
            mean = values.mean(axis=0)
            off = values - mean
        mean = np.asarray(mean, dtype=float)
        return Estimate(mean, mean + self.scale / self.amplitude * off, unit, self.source)


def members_of(potential: BayesianPotential | Members, n_draws: int | None = None) -> Members:
    """Calculators in float64 of a potential with a posterior; the potential is not changed.

    Args:
        potential: from ``blip_ft.load``; members are returned as they are.
        n_draws: K; by default those of the model.

    Raises:
        BlipError: it has no posterior, or K does not suit it.
    """
    if isinstance(potential, Members):
        return potential
    if not potential.posterior.ready:
        raise BlipError(
            "this model has no posterior, so its properties have no error bar",
            remedy="fit it with a posterior (posterior.family), or use an ordinary calculator",
        )
    if potential.backbone.dtype != torch.float64:  # small differences of minima are wanted
        potential = copy.deepcopy(potential).to_dtype("float64")
    n = potential.n_draws if n_draws is None else n_draws
    potential.draw_latents(n)  # raises where n does not suit
    amplitude = potential.amplitude
    calibration = potential.calibration or Calibration.identity()
    return Members(
        DrawCalculator(potential, None, n, amplitude),
        [DrawCalculator(potential, k, n, amplitude) for k in range(n)],
        amplitude,
        # one scale belongs to the posterior; it is fitted on forces where there are any (docs/uncertainty.md)
        (calibration.forces if calibration.forces.measured else calibration.energy).scale,
        potential.posterior.paired,
        f"{fingerprint(potential)}, {n} draws",
        potential.backbone.has_stress,
        potential.backbone.check,
    )


class DrawCalculator(ModelCalculator):
    """Energy (eV), forces (eV/Å) and, where the model has one and the structure is periodic, stress (eV/Å^3) of a draw.

    Args:
        potential: in float64.
        draw: its number, ``None`` for the mean weights.
        n_draws: K, on which each of them depends.
        amplitude: width of the draws.
    """

    def __init__(
        self, potential: BayesianPotential, draw: int | None, n_draws: int, amplitude: float
    ) -> None:
        super().__init__()
        self.potential, self.n_draws, self.amplitude = potential, n_draws, amplitude
        self.noise = OFF if draw is None else Noise.of_draw(draw)

    def evaluated(self, atoms: Atoms) -> dict[str, Any]:
        """``results`` of a structure."""
        backbone = self.potential.backbone
        stress = backbone.has_stress and bool(atoms.pbc.all())
        batch = backbone.batch([atoms]).to(backbone.device)
        with torch.no_grad(), drawing(self.potential, self.n_draws, self.amplitude):
            found = self.potential(batch, self.noise, stress=stress)
        return results_of(found, stress=stress)


def over_draws(
    members: Members,
    work: Callable[[Calculator, S | None], tuple[Mapping[str, Any], S]],
    units: Mapping[str, str],
    what: str,
    console: Console | None,
) -> tuple[dict[str, Estimate], S]:
    """Quantities of the mean model and of each draw, with what the mean model has come to.

    Args:
        members: the models.
        work: of one calculator, from a start or, for the mean model, from nothing; gives quantities and an end, which
            is the start of the draws.
        units: of each quantity.
        what: is being done.
        console: for progress; by default standard error.
    """
    console = Console(stderr=True) if console is None else console
    with progress(console, what, len(members.draws) + 1, unit="models") as advance:
        mean, end = work(members.mean, None)
        advance(1)
        draws = []
        for calculator in members.draws:
            draws.append(work(calculator, end)[0])
            advance(1)
    found = {
        name: members.estimate(
            np.asarray(mean[name], dtype=float), [np.asarray(d[name], dtype=float) for d in draws], unit
        )
        for name, unit in units.items()
    }
    return found, end


def checked(members: Members, atoms: Atoms, *, cell: bool = False, name: str = "atoms") -> Atoms:
    """A copy without calculator and constraints, once the model can describe it.

    Args:
        members: the models.
        atoms: a structure.
        cell: its stress is needed.
        name: of the argument.

    Raises:
        DataError: an unknown element, atoms on each other, a cell where there is none.
        BlipError: the model has no stress.
    """
    members.check(atoms)
    if (closest := contact(atoms)) < OVERLAP:
        raise DataError(
            f"two atoms are at {100 * closest:.0f} % of their bond length",
            field=name,
            remedy="give a structure without overlapping atoms",
        )
    if cell and not atoms.pbc.all():
        raise DataError(
            "a structure that is not periodic in all directions has no cell to relax and no stress",
            field=name,
            remedy="set pbc and a cell, or ask for what needs no cell",
        )
    if cell and not members.has_stress:
        raise BlipError(
            "this model gives no stress", remedy="relax positions alone (cell=False), or take another model"
        )
    out: Atoms = atoms.copy()
    out.set_constraint()
    return out
