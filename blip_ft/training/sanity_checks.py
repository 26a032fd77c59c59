"""Checks that must pass before the first training step.

Step 0: the converted potential with noise off must be the pretrained one, frame by frame, as the
vendor's own calculator gives it. References: after the shift, the assembled model (not the
fit on paper) must have the residual that the fit promised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase import Atoms

from blip_ft.backbones import edges
from blip_ft.data.references import References
from blip_ft.errors import SanityCheckError, readable
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.uncertainty.predict import predict_atoms

#: largest differences allowed: (eV/atom, eV/Å), by precision of the weights
TOLERANCE = {"float32": (1e-5, 1e-4), "float64": (1e-9, 1e-9)}

#: frames on which the references are checked in the assembled model, spread evenly over the training set
REFERENCE_FRAMES = 8


@dataclass(frozen=True)
class StepZero:
    """Largest differences between converted and stock model over all compared frames."""

    n_frames: int
    energy_ev_per_atom: float
    forces_ev_per_ang: float
    stress_ev_per_ang3: float
    frame_errors: list[tuple[float, float]]
    n_checked_in_float64: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For the receipt."""
        return asdict(self)


def stock_predictions(calculator: Any, atoms: Sequence[Atoms]) -> list[dict[str, Any]]:
    """Energy, forces and stress (None if the vendor gives none) from the vendor's calculator.

    It is given each structure as :func:`blip_ft.backbones.edges.bare` describes it, since what the vendor
    rounds, or gets wrong in left-handed cells (the sign of CHGNet's stress), is no property of the model; and it
    starts anew for each, since not every vendor notices that the charge has changed.
    """
    out = []
    for a in atoms:
        copy, plain = a.copy(), edges.bare(a)
        copy.set_cell(plain.cell)
        copy.set_positions(plain.positions, apply_constraint=False)
        if hasattr(calculator, "reset"):
            calculator.reset()
        copy.calc = calculator
        item: dict[str, Any] = {
            "energy": copy.get_potential_energy(),
            "forces": copy.get_forces(),
            "stress": None,
        }
        if copy.pbc.all() and "stress" in calculator.implemented_properties:
            item["stress"] = copy.get_stress()
        out.append(item)
    return out


def check_step_zero(
    potential: BayesianPotential,
    atoms: Sequence[Atoms],
    stock: Sequence[dict[str, Any]],
    stock_double: Callable[[Sequence[Atoms]], list[dict[str, Any]]] | None = None,
) -> StepZero:
    """Compare the converted potential, noise off, with stored predictions of the stock model.

    A float32 vendor can differ from itself by more than the limit when its atoms are merely
    permuted (CHGNet: some 1e-4 eV/Å). Frames that miss the float32 limit are therefore compared
    again with both sides in float64, where only a true difference is left.

    Args:
        potential: converted; its precision is the same afterwards.
        atoms: frames.
        stock: the vendor's predictions in the precision of ``potential``.
        stock_double: the vendor's predictions in float64.

    Raises:
        SanityCheckError: a frame differs by more than ``TOLERANCE``.
    """
    dtype = str(potential.backbone.dtype).removeprefix("torch.")
    errors, stress = _differences(potential, atoms, stock)
    bad = _beyond(errors, dtype)
    again: list[int] = []
    if bad and dtype == "float32" and stock_double is not None:
        again = bad
        frames = [atoms[i] for i in again]
        potential.to_dtype("float64")
        double, _ = _differences(potential, frames, stock_double(frames))
        potential.to_dtype("float32")
        bad = [again[i] for i in _beyond(double, "float64")]
    worst = [float(np.max([e[k] for e in errors], initial=0.0)) for k in (0, 1)]  # NaN stays NaN
    if bad:
        raise SanityCheckError(
            f"step 0 is not the pretrained model: {len(bad)} of {len(errors)} frames differ, by up to "
            f"{readable(worst[0], '.2e')} eV/atom and {readable(worst[1], '.2e')} eV/Å (allowed: {TOLERANCE[dtype]})",
            frame=bad[0],
            remedy="this is a defect of the adapter or an untested version of its backend: see "
            "'blip-finetune doctor', and try model.dtype=float64",
        )
    return StepZero(len(errors), worst[0], worst[1], stress, errors, len(again))


def _differences(
    potential: BayesianPotential, atoms: Sequence[Atoms], stock: Sequence[dict[str, Any]]
) -> tuple[list[tuple[float, float]], float]:
    """(eV/atom, eV/Å) per frame, and the largest stress difference, eV/Å^3."""
    ours = predict_atoms(potential, atoms, n_draws=0)
    errors, stress = [], 0.0
    for a, mine, theirs in zip(atoms, ours, stock, strict=True):
        shift = sum(potential.references.get(int(z), 0.0) for z in a.numbers)
        e = abs(mine["energy"] - shift - theirs["energy"]) / len(a)
        f = float(np.abs(mine["forces"] - theirs["forces"]).max(initial=0.0))
        errors.append((float(e), f))
        if mine["stress"] is not None and theirs["stress"] is not None:
            stress = max(stress, float(np.abs(mine["stress"] - theirs["stress"]).max()))
    return errors, stress


def _beyond(errors: Sequence[tuple[float, float]], dtype: str) -> list[int]:
    """Frames beyond the limits of a precision; NaN is beyond."""
    e_limit, f_limit = TOLERANCE[dtype]
    return [i for i, (e, f) in enumerate(errors) if not (e <= e_limit and f <= f_limit)]


def check_references(
    potential: BayesianPotential,
    atoms: Sequence[Atoms],
    labels: np.ndarray,
    pretrained: np.ndarray,
    references: References,
) -> dict[str, float]:
    """Residual of the assembled potential on :data:`REFERENCE_FRAMES` of the frames the shift was fitted on, eV/atom.

    Args:
        potential: with its references.
        atoms: all frames of the fit.
        labels: (F,) energies, eV.
        pretrained: (F,) energies of the pretrained model, eV.
        references: the fit.

    Raises:
        SanityCheckError: it is not the residual that the fit promised for these frames.
    """
    chosen = np.unique(np.linspace(0, len(atoms) - 1, min(len(atoms), REFERENCE_FRAMES)).round().astype(int))
    few, residual = [atoms[i] for i in chosen], labels[chosen] - pretrained[chosen]
    n = np.array([len(a) for a in few])
    shift = np.array([sum(references.shift.get(int(z), 0.0) for z in a.numbers) for a in few])
    energies = np.array([p["energy"] for p in predict_atoms(potential, few, n_draws=0)])
    rms, promised = (
        float(np.sqrt(np.mean((e / n) ** 2))) for e in (labels[chosen] - energies, residual - shift)
    )
    if not abs(rms - promised) <= 1e-5 + 1e-3 * promised:  # NaN does not pass
        raise SanityCheckError(
            f"the energy references do not act in the assembled model: residual {readable(rms, '.6f')} eV/atom, "
            f"the fit promised {readable(promised, '.6f')}",
            remedy="set data.references=keep and report this, with the adapter's version",
        )
    return {"rms_before": references.rms_before, "rms_after": references.rms_after}
