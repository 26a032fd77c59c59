"""What a simulation is told, and what of it can be refused before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from blip_ft.errors import BlipError

Ensemble = Literal["nve", "nvt", "npt"]
#: steps for which one draw of error bars is paid: their cost is then a fifth of a plain run's, and the energy's
STEPS_PER_DRAW = 5
#: time steps above this are a mistake, fs
LONGEST_STEP = 20.0


@dataclass(frozen=True)
class Dynamics:
    """A run of molecular dynamics.

    Attributes:
        ensemble: ``nve`` (velocity Verlet), ``nvt`` or ``npt`` (Martyna-Tobias-Klein).
        steps: number of steps.
        temperature: K; of the thermostat and of first velocities; ``None`` with ``nve`` for those of the structure.
        heat_to: K; the thermostat's temperature goes there in equal steps (Langevin only).
        pressure: GPa, ``npt``.
        timestep: fs.
        every: steps between frames, lines of the log and error bars.
        draws: posterior draws of each error bar; ``None`` for one per :data:`STEPS_PER_DRAW` steps of ``every``.
        seed: of velocities and of Langevin's noise.
        thermostat: ``langevin`` or ``nose-hoover``, a chain of three (``nvt``; ``npt`` has the chain).
        cell: what ``npt`` lets fluctuate: the volume (``isotropic``) or all of the cell (``full``).
        friction: of Langevin, 1/ps.
        damping: time of the chain, fs; ``None`` for 100 steps.
        pressure_damping: time of the barostat, fs; ``None`` for 1000 steps.
    """

    ensemble: Ensemble
    steps: int
    temperature: float | None = None
    heat_to: float | None = None
    pressure: float | None = None
    timestep: float = 1.0
    every: int = 20
    draws: int | None = None
    seed: int = 0
    thermostat: Literal["langevin", "nose-hoover"] = "langevin"
    cell: Literal["isotropic", "full"] = "isotropic"
    friction: float = 10.0
    damping: float | None = None
    pressure_damping: float | None = None

    def __post_init__(self) -> None:
        for name, remedy in _POSITIVE.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise _refused(name, f"{value:g} is not above 0", remedy)
        if self.pressure is not None and not math.isfinite(self.pressure):
            raise _refused("pressure", f"{self.pressure} is no number", "give it in GPa, 0 for none")
        if self.seed < 0:
            raise _refused("seed", f"{self.seed} is no seed", "0 or a whole number above")
        if self.timestep > LONGEST_STEP:
            raise _refused(
                "timestep",
                f"a step of {self.timestep:g} fs is longer than any vibration",
                "give it in fs: 0.5 with hydrogen, 1 to 2 without",
            )
        if self.draws == 1 or (self.draws is not None and self.draws < 0):
            raise _refused("draws", f"{self.draws} draws have no spread", "0 for no error bars, or 2 or more")
        if self.ensemble != "nve" and self.temperature is None:
            raise _refused("temperature", f"'{self.ensemble}' needs one", "add --temperature 300")
        if self.ensemble != "npt" and self.pressure is not None:
            raise _refused(
                "pressure",
                f"'{self.ensemble}' keeps the cell as it is and has no pressure",
                "--ensemble npt, or leave it out",
            )
        if self.heat_to is not None and (self.ensemble, self.thermostat) != ("nvt", "langevin"):
            raise _refused(
                "heat_to",
                "only Langevin dynamics is heated step by step",
                "--ensemble nvt --thermostat langevin",
            )

    @property
    def n_draws(self) -> int:
        """Draws of each error bar."""
        return max(2, self.every // STEPS_PER_DRAW) if self.draws is None else self.draws

    def temperature_at(self, step: int) -> float | None:
        """The thermostat's temperature in a step, K."""
        if self.heat_to is None or self.temperature is None:
            return self.temperature
        return self.temperature + (self.heat_to - self.temperature) * step / self.steps

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


_POSITIVE = {
    "steps": "give the number of steps, 1 or more",
    "temperature": "give it in K, above 0; frozen atoms need a relaxation, not dynamics",
    "heat_to": "give it in K, above 0",
    "timestep": "give it in fs: 0.5 with hydrogen, 1 to 2 without",
    "every": "give the steps between frames, 1 or more",
    "friction": "give it in 1/ps: 1 to 50; for no friction --ensemble nve",
    "damping": "give it in fs, for instance 100 times the time step",
    "pressure_damping": "give it in fs, for instance 1000 times the time step",
}


def _refused(name: str, problem: str, remedy: str) -> BlipError:
    return BlipError(problem, field=f"--{name.replace('_', '-')}", remedy=remedy)
