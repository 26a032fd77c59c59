"""Which labels do not belong to their structures, judged by what a pretrained model leaves over.

The model's own error must not hide a wrong label nor make a right one look wrong: it may be of
another level of theory, and worse in one phase than in another. So residuals (label minus model)
are first explained as far as smooth functions of the structure explain them,

- energies per atom by composition and the model's invariant features (robust regression, each
  frame left out of its own fit),
- forces by a pair potential (:mod:`blip_ft.data.check.pairwise`),

and what is left is compared with what is usual for frames like this one. A frame is named if it is
both far outside the usual (`RATIO`, `ENERGY_Z`) and wrong by an amount that matters (`SHARE`,
`FORCE_FLOOR`, `ENERGY_FLOOR`). For forces that are wrong the alternatives are tried: another order of atoms,
exchanged or inverted axes, a factor, the labels of another frame.

How often they are right is measured by ``benchmarks/label_faults.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from ase import Atoms
from numpy.typing import NDArray
from scipy.spatial import KDTree

from blip_ft.backbones import electrons
from blip_ft.data.check.alternatives import explain_forces
from blip_ft.data.check.doubt import ABSURD_ENERGY, wrong_energies, wrong_forces, wrong_stress
from blip_ft.data.check.pairwise import PairFunctions, pair_corrections
from blip_ft.data.references import far_energies
from blip_ft.data.robust import Floats, robust_fit, spread, trimmed_rms

#: fewer frames say nothing about what is usual
MIN_FRAMES = 8
#: an energy is wrong if its residual is this many local spreads ...
ENERGY_Z = 4.5
#: ... and at least this large, eV/atom
ENERGY_FLOOR = 0.025
#: forces are wrong if their residual is this many times the usual one ...
RATIO = 2.5
#: ... this share of what two unrelated sets of forces would differ by, and at least so large, eV/Å
SHARE, FORCE_FLOOR = 0.25, 0.05
#: stresses likewise (eV/Å^3); models err more on them
STRESS_RATIO, STRESS_SHARE, STRESS_FLOOR = 4.0, 0.5, 3e-3
#: residuals so many spreads beyond the bulk take no part in any further fit; errors of forces,
#: so many times what is usual for their size
GROSS, _GROSS_RATIO = 10.0, 4.0
#: below these a residual is as good as none: spread of energies, eV/atom; forces, eV/Å; stress, eV/Å^3
_ENERGY_NOISE, _FORCE_NOISE, _STRESS_NOISE = 2e-3, 1e-2, 1e-3
#: principal components of the features that the energy may be regressed on
_COMPONENTS = (0, 2, 4, 8, 16, 32, 64)
#: frames per component, at least
_FRAMES_PER_COMPONENT = 6
#: frames that count as alike when the usual residual is estimated
_NEIGHBOURS = 15
#: elements with features of their own; sets with more use the mean over all atoms
_MAX_ELEMENTS = 8
#: states of charge and spin with constants of their own
_MOST_STATES = 8

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Label = Literal["energy", "forces", "stress"]


@dataclass
class Compared:
    """A frame with its labels and what the pretrained model says; eV and Å.

    Attributes:
        atoms: the structure.
        energy: label, total, or ``None``.
        forces: (n, 3) label or ``None``.
        stress: (6,) label or ``None``.
        model_energy: predicted energy.
        model_forces: (n, 3).
        model_stress: (6,) or ``None``.
        features: {element: (f,) sum of the model's features of its atoms}, or ``None``.
        group: trajectory, phase, ... or ``""``.
    """

    atoms: Atoms
    energy: float | None
    forces: Floats | None
    stress: Floats | None
    model_energy: float
    model_forces: Floats
    model_stress: Floats | None = None
    features: dict[int, Floats] | None = None
    group: str = ""


@dataclass(frozen=True)
class LabelFault:
    """One label that does not belong to its structure.

    Attributes:
        index: of the frame.
        label: which one.
        cause: ``offset`` (energies), ``group`` (energies that are off in all frames of a group, which may be
            the model's error), ``atoms`` (order), ``axes``, ``factor``, ``frame`` (labels of another one) or
            ``unknown``.
        size: error in eV/atom (energy, signed), eV/Å (forces, rms) or eV/Å^3 (stress, rms).
        usual: what is usual for such frames, same unit.
        text: details of the cause.
        other: the frame whose labels these are, for ``frame``.
        certain: wrong beyond doubt (``data.doubt``), not only by what the model leaves over.
    """

    index: int
    label: Label
    cause: str
    size: float
    usual: float
    text: str = ""
    other: int | None = None
    certain: bool = False


@dataclass
class LabelCheck:
    """The faults, and what they were judged by; arrays are NaN where there is no label.

    Attributes:
        faults: in the order of the frames, at most one per frame and label.
        energy: (m,) residual that composition and features do not explain, eV/atom.
        energy_usual: (m,) its usual size.
        forces: (m,) rms residual that the pair potential does not explain, eV/Å.
        forces_usual: (m,) its usual size.
    """

    faults: list[LabelFault]
    energy: Floats
    energy_usual: Floats
    forces: Floats
    forces_usual: Floats


def check_labels(frames: Sequence[Compared]) -> LabelCheck:
    """Judge the labels of one set and name those that are wrong.

    Args:
        frames: all in one unit. Fewer than :data:`MIN_FRAMES` say nothing about what is usual,
            and no fault is found then but what is beyond doubt.
    """
    none = [np.full(len(frames), np.nan) for _ in range(4)]
    check = LabelCheck([], *none)
    if len(frames) < MIN_FRAMES:  # what is beyond doubt needs no more than a few others
        check.faults = _certain(frames, check)
        return check
    space = _Space(frames)
    check.faults += _force_faults(frames, space, check)
    check.faults += _energy_faults(frames, space, check)
    check.faults += _stress_faults(frames, space)
    check.faults = _certain(frames, check)
    check.faults.sort(key=lambda fault: (fault.index, fault.label))
    return check


def _certain(frames: Sequence[Compared], check: LabelCheck) -> list[LabelFault]:
    """The faults with a mark on those that are beyond doubt, and those that only show beside it.

    One wrong component among hundreds hardly changes the rms error of a frame.
    """
    nothing = np.full(6, np.nan)
    labels = [None if f.forces is None else np.asarray(f.forces, dtype=float) for f in frames]
    energy = np.array([np.nan if f.energy is None else energy_residual(f) for f in frames])
    stress = np.array([nothing if f.stress is None or not f.atoms.pbc.all() else f.stress for f in frames])
    model_stress = np.array([nothing if f.model_stress is None else f.model_stress for f in frames])
    stress, model_stress = stress.reshape(-1, 6), model_stress.reshape(-1, 6)  # of no frames too
    states = [electrons.state_of(f.atoms.info) for f in frames]
    found: dict[Label, Bools] = {
        "forces": wrong_forces(labels, [f.model_forces for f in frames]),
        "energy": wrong_energies([f.atoms.numbers for f in frames], energy, check.forces, states),
        "stress": wrong_stress(stress, model_stress),
    }
    # among other compositions only what no chemistry explains; a lone atom is a reference
    several = [i for i, e in enumerate(energy) if np.isfinite(e) and len(frames[i].atoms) > 1]
    for state in dict.fromkeys(states):
        own = [i for i in several if states[i] == state]
        total = np.array([energy[i] * len(frames[i].atoms) for i in own])
        found["energy"][own] |= far_energies([frames[i].atoms.numbers for i in own], total, ABSURD_ENERGY)
    faults = [replace(f, certain=bool(found[f.label][f.index])) for f in check.faults]
    known = {(f.index, f.label) for f in faults}
    for label, wrong in found.items():
        for i in (int(i) for i in np.flatnonzero(wrong) if (int(i), label) not in known):
            if label == "forces":
                size = float(np.abs(np.asarray(labels[i]) - frames[i].model_forces).max())
                fault = LabelFault(i, label, "unknown", size, float(check.forces_usual[i]), certain=True)
            elif label == "energy":
                usual = float(check.energy_usual[i])
                size = float(energy[i] - np.nanmedian(energy))
                fault = LabelFault(i, label, "offset", size, usual, certain=True)
            else:
                size = float(np.abs(stress[i] - model_stress[i]).max())
                fault = LabelFault(
                    i, label, "unknown", size, float(np.nanmedian(np.abs(stress))), certain=True
                )
            faults.append(fault)
    return faults


# ---- what frames are like --------------------------------------------------------------------


class _Space:
    """Coordinates of structures in which alike frames are near each other.

    Attributes:
        composition: (m, elements + states) share of each element, and a constant per charge state, centred.
        components: (m, k) principal components of the features, unit variance, strongest first.
        weights: (k,) their strength relative to the first.
        functions: pair functions of the set.
    """

    def __init__(self, frames: Sequence[Compared]) -> None:
        structures = [f.atoms for f in frames]
        elements = sorted({int(z) for atoms in structures for z in np.unique(atoms.numbers)})
        shares = np.array([[np.mean(atoms.numbers == z) for z in elements] for atoms in structures])
        shares = np.concatenate([shares, state_columns(structures)], axis=1)
        self.composition = shares - shares.mean(axis=0)
        self.functions = PairFunctions(structures)
        features = _features(frames, elements, self.functions)
        features = features - features.mean(axis=0)
        u, s, _ = np.linalg.svd(features, full_matrices=False)
        strong = s > 1e-6 * max(s[0], 1e-300) if s.size else np.zeros(0, dtype=bool)
        self.components = u[:, strong] * np.sqrt(len(frames))
        self.weights = s[strong] / s[0] if strong.any() else s[strong]

    def usual(self, residual: Floats, members: Ints, gross: Bools) -> Floats:
        """Spread of the residuals of the frames most like each one, at least that of all.

        Frames that are ``gross`` are nobody's neighbours: bad frames may well be alike.
        """
        good = np.flatnonzero(~gross)
        everywhere = spread(residual[good])
        near = (self.components * self.weights)[members, :_NEIGHBOURS]
        k = min(_NEIGHBOURS + 1, len(good))
        if k < 6 or not near.shape[1]:
            return np.full(len(members), everywhere)
        _, neighbours = KDTree(near[good]).query(near, k=k)
        neighbours = good[neighbours]
        other = neighbours != np.arange(len(members))[:, None]
        other[other.all(axis=1), -1] = False  # gross frames do not find themselves
        size = np.abs(residual)[neighbours[other].reshape(len(members), k - 1)]
        usual: Floats = np.maximum(1.4826 * np.median(size, axis=1), everywhere)
        return usual


def _features(frames: Sequence[Compared], elements: list[int], functions: PairFunctions) -> Floats:
    """(m, f) smooth invariants of every structure, per atom."""
    if any(f.features is None for f in frames):
        return np.array([functions.energies(f.atoms) for f in frames])
    width = max(len(v) for f in frames if f.features is not None for v in f.features.values())
    rows = np.zeros((len(frames), len(elements), width))
    for row, frame in zip(rows, frames, strict=True):
        for z, value in (frame.features or {}).items():
            row[elements.index(z)] = value / len(frame.atoms)
    flat: Floats = rows.sum(axis=1) if len(elements) > _MAX_ELEMENTS else rows.reshape(len(frames), -1)
    return flat


def state_columns(structures: Sequence[Atoms]) -> Floats:
    """(m, k) for each state of charge and spin but the commonest: 1 / atoms in its frames, of about unit size.

    A constant of the total energy per state: electron affinities and ionisation energies, of which the model may
    know nothing. States of fewer than three frames have none, and none at all where all frames are alike.
    """
    states = [electrons.state_of(atoms.info) for atoms in structures]
    others = [s for s, n in Counter(states).most_common(_MOST_STATES)[1:] if n >= 3]
    sizes = np.array([len(atoms) for atoms in structures], dtype=float)
    columns = [np.array([s == other for s in states]) * (sizes.mean() / sizes) for other in others]
    return np.stack(columns, axis=1) if columns else np.zeros((len(structures), 0))


# ---- energies ----------------------------------------------------------------------------------


def _energy_faults(frames: Sequence[Compared], space: _Space, check: LabelCheck) -> list[LabelFault]:
    # a lone atom is a reference, not a structure that the model was trained on
    members = np.array(
        [i for i, f in enumerate(frames) if f.energy is not None and (len(f.atoms) > 1 or f.atoms.pbc.any())],
        dtype=int,
    )
    if len(members) < MIN_FRAMES:
        return []
    target = np.array([energy_residual(frames[i]) for i in members])
    plain = robust_fit(space.composition[members], target).residual
    gross = np.abs(plain) > max(GROSS * spread(plain), 4 * ENERGY_FLOOR)
    residual = _smooth_residual(target, space, members, gross)
    usual = np.maximum(space.usual(residual, members, gross), _ENERGY_NOISE)
    check.energy[members], check.energy_usual[members] = residual, usual
    wrong = (np.abs(residual) > ENERGY_Z * usual) & (np.abs(residual) > ENERGY_FLOOR)
    shared, own = _shared_residual(frames, members, residual)
    alone = np.abs(residual - shared) > np.maximum(ENERGY_FLOOR, ENERGY_Z * own)
    alone |= np.abs(shared) < ENERGY_FLOOR / 2
    return [
        LabelFault(
            int(members[k]),
            "energy",
            "offset" if alone[k] else "group",
            float(residual[k]),
            float(usual[k]),
        )
        for k in np.flatnonzero(wrong)
    ]


def _shared_residual(frames: Sequence[Compared], members: Ints, residual: Floats) -> tuple[Floats, Floats]:
    """(m,) median residual of the other frames of the same group and atoms, and their spread.

    A structure that the model and the smooth functions describe badly is off in all its frames.
    Both are 0 where there are fewer than three others, except that in a group with a name one or two others say what
    they have in common, within :data:`ENERGY_FLOOR`.
    """
    alike: dict[tuple[str, bytes], list[int]] = {}
    for k, i in enumerate(members):
        alike.setdefault((frames[i].group, np.sort(frames[i].atoms.numbers).tobytes()), []).append(k)
    shared, own = np.zeros(len(members)), np.zeros(len(members))
    for (name, _), group in alike.items():
        if len(group) > 3 or (name and len(group) > 1):
            for k in group:
                others = residual[[other for other in group if other != k]]
                shared[k], own[k] = np.median(others), spread(others) if len(group) > 3 else 0.0
    return shared, own


def energy_residual(frame: Compared) -> float:
    """Label minus prediction of a frame that has an energy, eV/atom."""
    assert frame.energy is not None
    return (frame.energy - frame.model_energy) / len(frame.atoms)


def _smooth_residual(target: Floats, space: _Space, members: Ints, gross: Bools) -> Floats:
    """What the best of a few regressions on composition and features leaves over, eV/atom."""
    target = target - np.median(target)
    best, best_score = target, np.inf
    for k in _COMPONENTS:
        if k and (k > len(members) // _FRAMES_PER_COMPONENT or k > space.components.shape[1]):
            break
        design = np.concatenate(
            [space.composition, space.components[:, :k] * np.sqrt(space.weights[:k])], axis=1
        )
        residual = robust_fit(design[members], target, exclude=gross).residual
        score = trimmed_rms(residual[~gross])
        if score < best_score:
            best, best_score = residual, score
    return best


# ---- forces ------------------------------------------------------------------------------------


def _force_faults(frames: Sequence[Compared], space: _Space, check: LabelCheck) -> list[LabelFault]:
    members = [i for i, f in enumerate(frames) if f.forces is not None and len(f.atoms) > 1]
    if len(members) < MIN_FRAMES:
        return []
    structures = [frames[i].atoms for i in members]
    labels = [np.asarray(frames[i].forces, dtype=float) for i in members]
    models = [frames[i].model_forces for i in members]
    added = pair_corrections(
        structures, [a - b for a, b in zip(labels, models, strict=True)], space.functions
    )
    models = [a + b for a, b in zip(models, added, strict=True)]
    error = np.array([_rms(a - b) for a, b in zip(labels, models, strict=True)])
    size = np.array([_rms(b) for b in models])
    apart = np.array([np.hypot(_rms(a), _rms(b)) for a, b in zip(labels, models, strict=True)])
    large = error > np.maximum(SHARE * apart, FORCE_FLOOR)
    usual = _usual_error(error, size, large, space, np.array(members), _FORCE_NOISE)
    wrong = np.flatnonzero((error > RATIO * usual) & large)
    check.forces[members], check.forces_usual[members] = error, usual
    faults = []
    for k in wrong:
        why = explain_forces(int(k), structures, labels, models, usual)
        other = None if why.other is None else members[why.other]
        faults.append(
            LabelFault(members[k], "forces", why.cause, float(error[k]), float(usual[k]), why.text, other)
        )
    return faults


def _usual_error(
    error: Floats, size: Floats, large: Bools, space: _Space, members: Ints, floor: float
) -> Floats:
    """Error that is usual for the size of the predicted values and the kind of structure.

    Logarithms are regressed on log size, its square, composition and features, robustly; without
    the features first, and frames that are ``large`` and far off then are left out of the second
    fit, which could explain them: bad frames may well be alike.
    """
    log_error = np.log(np.maximum(error, 0.2 * floor))
    log_size = np.log(np.maximum(size, 2.0 * floor))
    k = min(8, len(members) // 10, space.components.shape[1])
    plain = np.column_stack(
        [log_size - log_size.mean(), log_size**2 - np.mean(log_size**2), space.composition[members]]
    )
    first = robust_fit(plain, log_error, ridge=1e-3)
    gross = large & (first.residual > np.log(_GROSS_RATIO))
    if gross.mean() > 0.5:
        gross[:] = False
    design = np.column_stack([plain, (space.components[:, :k] * np.sqrt(space.weights[:k]))[members]])
    fit = robust_fit(design, log_error, ridge=1e-3, exclude=gross)
    return np.maximum(np.exp(log_error - fit.residual), floor)


# ---- stress ------------------------------------------------------------------------------------


def _stress_faults(frames: Sequence[Compared], space: _Space) -> list[LabelFault]:
    members = np.array(
        [
            i
            for i, f in enumerate(frames)
            if f.stress is not None and f.model_stress is not None and f.atoms.pbc.all()
        ],
        dtype=int,
    )
    if len(members) < MIN_FRAMES:
        return []
    labels = np.array([frames[i].stress for i in members])
    models = np.array([frames[i].model_stress for i in members])
    # another level of theory shifts the pressure of all frames alike
    models = models + np.median(labels - models, axis=0)
    error = np.array([_rms(a - b) for a, b in zip(labels, models, strict=True)])
    size = np.array([_rms(b) for b in models])
    apart = np.array([np.hypot(_rms(a), _rms(b)) for a, b in zip(labels, models, strict=True)])
    large = error > np.maximum(STRESS_SHARE * apart, STRESS_FLOOR)
    usual = _usual_error(error, size, large, space, members, _STRESS_NOISE)
    wrong = (error > STRESS_RATIO * usual) & large
    return [
        LabelFault(int(members[k]), "stress", "unknown", float(error[k]), float(usual[k]))
        for k in np.flatnonzero(wrong)
    ]


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
