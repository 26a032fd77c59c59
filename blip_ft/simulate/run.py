"""A simulation from its first step, or from where an earlier call has left it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.errors import BlipError, DataError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.fingerprint import fingerprint
from blip_ft.simulate.forces import ErrorBars, Forces
from blip_ft.simulate.guard import Guard, Limits
from blip_ft.simulate.integrators import Integrator, conserved, integrator, memory, remember, set_temperature
from blip_ft.simulate.options import Dynamics
from blip_ft.simulate.output import Output
from blip_ft.simulate.start import check_start, degrees_of_freedom, digest, with_velocities

#: information about a structure that models and readers know
_KEPT_INFO = ("charge", "spin")


@dataclass(frozen=True)
class Outcome:
    """How a simulation has ended.

    Attributes:
        steps: that were run, of all calls.
        stopped: whether it has ended before its last step.
        reason: why.
        worst_atom: with the largest total std of its force, numbered from 0; ``None`` without error bars.
        largest_std: that std, eV/Å.
        drift: of the conserved energy, meV per atom and ps, by a straight line; ``None`` for Langevin or
            fewer than two frames.
        saved: frames in ``OUT.saved.extxyz``.
    """

    steps: int
    stopped: bool
    reason: str
    worst_atom: int | None
    largest_std: float | None
    drift: float | None
    saved: int

    def to_dict(self) -> dict[str, Any]:
        """As ``blip-finetune md --json`` prints it."""
        return {
            "steps": self.steps,
            "stopped": self.stopped,
            "reason": self.reason,
            "worst_atom": self.worst_atom,
            "largest_std": self.largest_std,
            "drift_mev_per_atom_ps": self.drift,
            "saved": self.saved,
        }


#: told after every error bar: steps that are done, of how many, and the guard
Say = Callable[[int, int, Guard], object]


def simulate(
    potential: BayesianPotential,
    start: Atoms,
    target: str | Path,
    dynamics: Dynamics,
    limits: Limits,
    *,
    file: str = "the structure",
    draw: tuple[int, int, float] | None = None,
    thin_cell: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Say | None = None,
) -> Outcome:
    """Run molecular dynamics into a trajectory.

    The continued run is the uninterrupted one, byte for byte, on one kind of machine with one number of threads.

    Args:
        potential: the model; its mean weights make the forces.
        start: structure; momenta that it has are kept.
        target: the trajectory, ``.extxyz``; see :mod:`blip_ft.simulate.output` for what lies beside it.
        dynamics: ensemble, steps and so on.
        limits: of the guard.
        file: where the structure is from, for messages.
        draw: run on the weights of this draw (number, of how many, width), without error bars.
        thin_cell: allow cells in which atoms see their own images.
        resume: go on from the last whole step of an earlier call, from the start if there is none.
        overwrite: replace what is there.
        progress: called after every error bar.

    Raises:
        BlipError: before the first step, for what cannot be run; while it runs, for what cannot be written.
    """
    check_start(start, dynamics, potential.backbone, file=file, thin_cell=thin_cell)
    potential.eval()
    forces = Forces(potential, stress=dynamics.ensemble == "npt", draw=draw)
    options = dynamics.to_dict()
    if dynamics.heat_to is None:  # a longer run goes on like a shorter one
        del options["steps"]
    header = {
        "model": fingerprint(potential),
        "structure": digest(start),
        "draw": draw,
        "device": potential.backbone.device.type,
        "run": options,
    }
    output = Output(Path(target), header, resume=resume, overwrite=overwrite)
    try:
        run = Run(start, dynamics, limits, forces, output)
        run.begin(file)
        run.go_on(progress)
        return run.outcome()
    finally:
        output.close()


class Run:
    """A run on its way."""

    def __init__(
        self, start: Atoms, dynamics: Dynamics, limits: Limits, forces: Forces, output: Output
    ) -> None:
        self.start, self.dynamics, self.forces, self.output = start, dynamics, forces, output
        self.guard, self.step, self.turn = Guard(limits), 0, 0
        self.n_draws = dynamics.n_draws if forces.has_error_bars else 0
        self.atoms: Atoms
        self.md: Integrator

    # ---- beginning ---------------------------------------------------------------------------
    def begin(self, file: str) -> None:
        """The first frame, or the state of an earlier call."""
        state = self.output.state
        self.atoms = _bare(self.start)
        if state is None:
            with_velocities(self.atoms, self.dynamics)
        else:
            _place(self.atoms, state)
        self.atoms.set_constraint(self.start.constraints)
        self.atoms.calc = self.forces
        if state is not None:
            self._recall(state, self.output.meta)
            return
        self.md = integrator(self.atoms, self.dynamics)
        self.forces.with_energy_std = bool(self.n_draws)
        found = self.atoms.get_forces()
        if not np.isfinite(found).all():
            raise DataError(
                "the model's forces for it are not finite",
                file=file,
                remedy="atoms on top of each other, or far from all that the model knows: relax the structure first",
            )
        if self.forces.stress and "stress" not in self.forces.results:
            raise DataError(
                "this model gives no stress", file=file, field="--ensemble", remedy="--ensemble nvt"
            )
        self._look(frame=True)

    def _recall(self, state: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self.step, self.turn = meta["step"], meta["turn"]
        self.guard = Guard(self.guard.limits, **meta["guard"])
        if self.guard.reason and meta["limits"] != self.guard.limits.to_dict():
            self.guard.reason, self.guard.above = "", 0  # other thresholds: it may go on
        self.forces.atoms = self.atoms.copy()
        results = {k.removeprefix("results."): v for k, v in state.items() if k.startswith("results.")}
        self.forces.results = {k: v if v.ndim else float(v) for k, v in results.items()}
        self.md = integrator(self.atoms, self.dynamics)
        own = {k.removeprefix("md:"): v for k, v in state.items() if k.startswith("md:")}
        remember(self.md, own, meta["md"])

    # ---- running -----------------------------------------------------------------------------
    def go_on(self, progress: Say | None) -> None:
        """Step by step to the end, or to where the guard ends it."""
        dynamics = self.dynamics
        while self.step < dynamics.steps and not self.guard.reason:
            self.step += 1
            frame = self.step % dynamics.every == 0 or self.step == dynamics.steps
            set_temperature(self.md, dynamics.temperature_at(self.step))
            self.forces.with_energy_std = frame and bool(self.n_draws)
            self._advance()
            if self.guard.reason:
                break
            if frame or (self.n_draws and self.guard.due(self.forces.results.get("ood_score"))):
                self._look(frame=frame)
                if progress is not None:
                    progress(self.step, dynamics.steps, self.guard)

    def _advance(self) -> None:
        """One step; numbers that are none end the run."""
        try:
            self.md.step()
            finite = all(np.isfinite(x).all() for x in (self.atoms.get_forces(), self.atoms.positions))
            problem = "" if finite else "the model's forces are not finite"
        except DataError as error:  # coordinates that are no places
            problem = error.problem
        if problem:
            self.guard.reason = f"step {self.step}: the run has exploded: {problem}"
            self.step -= 1
            self._commit(keep=True)

    def _look(self, *, frame: bool) -> None:
        """Error bars of the structure as it is, what the guard says to them, and what is written of it."""
        bars = self.forces.error_bars(self.n_draws, self.turn) if self.n_draws else None
        self.turn += 1
        results, guard = self.forces.results, self.guard
        scores = results.get("ood_score")
        guard.see(self.step, self.atoms.numbers, None if bars is None else bars.forces_total, scores)
        self.output.line(self._line(bars))
        if guard.since_saved == 0:
            self.output.frame(self._frame(bars, why="save"), saved=True)
        if frame or guard.event == "stop":
            self.output.frame(self._frame(bars, why=guard.event))
            self._commit()

    def _frame(self, bars: ErrorBars | None, *, why: str) -> Atoms:
        results = self.forces.results
        frame = _bare(self.atoms)
        frame.set_constraint(self.start.constraints)
        frame.info |= {"step": self.step, "time_fs": self.step * self.dynamics.timestep}
        if bars is not None:
            frame.info |= {"energy_std": bars.energy_std, "std_sampling_error": float(bars.sampling_error)}
            frame.new_array("forces_std_norm", bars.forces_std_norm)
        if "ood_score" in results:
            frame.new_array("ood_score", results["ood_score"])
        if why:
            frame.info["guard"] = self.guard.reason or f"step {self.step}: above the threshold for saving"
        known = {k: results[k] for k in ("energy", "forces", "stress") if k in results}
        frame.calc = SinglePointCalculator(frame, **known)
        return frame

    def _line(self, bars: ErrorBars | None) -> dict[str, Any]:
        atoms, results = self.atoms, self.forces.results
        kinetic = float(atoms.get_kinetic_energy())
        scores, kept = results.get("ood_score"), conserved(self.md)
        stress = results.get("stress")
        volume = float(atoms.get_volume()) if atoms.pbc.all() else None
        pressure = None
        if stress is not None and volume is not None:  # with the motion of the atoms
            pressure = float(-stress[:3].mean() + 2 * kinetic / (3 * volume)) / units.GPa
        worst = None if bars is None else int(np.argmax(bars.forces_total))
        return {
            "step": self.step,
            "time_fs": self.step * self.dynamics.timestep,
            "temperature_K": 2 * kinetic / (degrees_of_freedom(self.start) * units.kB),
            "potential_eV": float(results["energy"]),
            "kinetic_eV": kinetic,
            "conserved_eV": kept,
            "volume_A3": volume,
            "pressure_GPa": pressure,
            "energy_std_eV": None if bars is None else bars.energy_std,
            "worst_atom": worst,
            "worst_forces_std_total_eV_per_A": None if bars is None else float(bars.forces_total.max()),
            "worst_ood_score": None if scores is None else float(scores.max()),
            "guard": self.guard.event,
        }

    def _commit(self, *, keep: bool = False) -> None:
        """Write the state; with ``keep`` that of the last frame once more, with the reason why nothing comes after."""
        meta: dict[str, Any]
        if keep:
            assert self.output.state is not None
            arrays: dict[str, np.ndarray] = dict(self.output.state)
            meta = {k: self.output.meta[k] for k in ("step", "turn", "md")}
        else:
            own, other = memory(self.md)
            results = {
                k: np.asarray(v)
                for k, v in self.forces.results.items()
                if k in ("energy", "free_energy", "forces", "stress")
            }
            arrays = {
                "positions": self.atoms.positions,
                "momenta": self.atoms.get_momenta(),
                "cell": self.atoms.cell.array,
                **{f"md:{k}": v for k, v in own.items()},
                **{f"results.{k}": v for k, v in results.items()},
            }
            meta = {"step": self.step, "turn": self.turn, "md": other}
        meta |= {"guard": self.guard.to_dict(), "limits": self.guard.limits.to_dict()}
        self.output.commit(arrays, meta)

    def outcome(self) -> Outcome:
        """How it has ended."""
        guard = self.guard
        return Outcome(
            steps=self.step,
            stopped=bool(guard.reason),
            reason=guard.reason,
            worst_atom=guard.worst_atom,
            largest_std=guard.largest_std if guard.worst_atom is not None else None,
            drift=drift(self.output.paths["log"], len(self.atoms)),
            saved=guard.saved,
        )


def drift(log: Path, n_atoms: int) -> float | None:
    """Slope of a straight line through the conserved energy of a log, meV per atom and ps; ``None`` without one."""
    with log.open(encoding="utf-8", newline="") as file:
        rows = [
            (float(r["time_fs"]), float(r["conserved_eV"])) for r in csv.DictReader(file) if r["conserved_eV"]
        ]
    if len(rows) < 2:
        return None
    time, energy = np.array(rows).T
    slope = float(np.polyfit(time - time.mean(), energy - energy.mean(), 1)[0])
    return 1e6 * slope / n_atoms if math.isfinite(slope) else None


def _bare(atoms: Atoms) -> Atoms:
    """Without results, constraints and what only files know."""
    out = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    if atoms.has("masses"):
        out.set_masses(atoms.get_masses())
    out.set_momenta(atoms.get_momenta())
    out.info = {k: atoms.info[k] for k in _KEPT_INFO if k in atoms.info}
    return out


def _place(atoms: Atoms, state: Mapping[str, np.ndarray]) -> None:
    """Put atoms, without constraints, where a state has them."""
    if state["positions"].shape != atoms.positions.shape:
        raise BlipError("the state is of another structure", remedy="start anew with --overwrite")
    atoms.set_cell(state["cell"])
    atoms.set_positions(state["positions"])
    atoms.set_momenta(state["momenta"])
