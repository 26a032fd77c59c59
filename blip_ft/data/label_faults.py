"""Which labels do not belong to their structures, judged by what a pretrained model leaves over.

The model's own error must not hide a wrong label nor make a right one look wrong: it may be of
another level of theory, and worse in one phase than in another. So residuals (label minus model)
are first explained as far as smooth functions of the structure explain them,

- energies per atom by composition and the model's invariant features (robust regression, each
  frame left out of its own fit),
- forces by a pair potential (:mod:`blip_ft.data.pairwise`),

and what is left is compared with what is usual for frames like this one. A frame is named if it is
both far outside the usual (`RATIO`, `ENERGY_Z`) and wrong by an amount that matters (`SHARE`,
`ENERGY_FLOOR`). For forces that are wrong the alternatives are tried: another order of atoms,
exchanged or inverted axes, a factor, the labels of another frame.

The constants were set on seven sets and tested on others, see docs/data.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ase import Atoms
from scipy.spatial import KDTree

from blip_ft.data.alternatives import explain_forces
from blip_ft.data.pairwise import PairFunctions, pair_corrections
from blip_ft.data.robust import Floats, robust_fit, spread, trimmed_rms

#: fewer frames say nothing about what is usual
MIN_FRAMES = 8
#: an energy is wrong if its residual is this many local spreads ...
ENERGY_Z = 4.5
#: ... and at least this large, eV/atom
ENERGY_FLOOR = 0.02
#: forces are wrong if their residual is this many times the usual one ...
RATIO = 2.5
#: ... and this share of what two unrelated sets of forces would differ by
SHARE = 0.25
#: stresses likewise; models err more on them
STRESS_RATIO, STRESS_SHARE = 4.0, 0.5
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
        features: (f,) sum of the model's atomic features per element, or ``None``.
    """

    atoms: Atoms
    energy: float | None
    forces: Floats | None
    stress: Floats | None
    model_energy: float
    model_forces: Floats
    model_stress: Floats | None = None
    features: dict[int, Floats] | None = None


@dataclass(frozen=True)
class LabelFault:
    """One label that does not belong to its structure.

    Attributes:
        index: of the frame.
        label: which one.
        cause: ``offset``, ``atoms`` (order), ``axes``, ``factor``, ``frame`` (labels of another
            one) or ``unknown``.
        size: error in eV/atom (energy, signed), eV/Å (forces, rms) or eV/Å^3 (stress, rms).
        usual: what is usual for such frames, same unit.
        text: the cause in words.
    """

    index: int
    label: Label
    cause: str
    size: float
    usual: float
    text: str = ""


def find_label_faults(frames: Sequence[Compared]) -> list[LabelFault]:
    """Name the labels that are wrong.

    Args:
        frames: of one set, in one unit.

    Returns:
        Faults in the order of the frames; at most one per frame and label. Empty for fewer than
        :data:`MIN_FRAMES` frames.
    """
    if len(frames) < MIN_FRAMES:
        return []
    space = _Space(frames)
    faults = [*_force_faults(frames, space), *_energy_faults(frames, space), *_stress_faults(frames, space)]
    return sorted(faults, key=lambda fault: (fault.index, fault.label))


# ---- what frames are like --------------------------------------------------------------------


class _Space:
    """Coordinates of structures in which alike frames are near each other.

    Attributes:
        composition: (m, elements) share of each element, centred.
        components: (m, k) principal components of the features, unit variance, strongest first.
        weights: (k,) their strength relative to the first.
        functions: pair functions of the set.
    """

    def __init__(self, frames: Sequence[Compared]) -> None:
        structures = [f.atoms for f in frames]
        elements = sorted({int(z) for atoms in structures for z in np.unique(atoms.numbers)})
        shares = np.array([[np.mean(atoms.numbers == z) for z in elements] for atoms in structures])
        self.composition = shares - shares.mean(axis=0)
        self.functions = PairFunctions(structures)
        features = _features(frames, elements, self.functions)
        features = features - features.mean(axis=0)
        u, s, _ = np.linalg.svd(features, full_matrices=False)
        strong = s > 1e-6 * max(s[0], 1e-300) if s.size else np.zeros(0, dtype=bool)
        self.components = u[:, strong] * np.sqrt(len(frames))
        self.weights = s[strong] / s[0] if strong.any() else s[strong]

    def usual(self, residual: Floats, members: Floats) -> Floats:
        """Spread of the residuals of the frames most like each one, at least that of all."""
        k = min(_NEIGHBOURS, len(members) - 1)
        near = (self.components * self.weights)[members, :_NEIGHBOURS]
        if k < 5 or not near.shape[1]:
            return np.full(len(members), spread(residual))
        _, neighbours = KDTree(near).query(near, k=k + 1)
        local = 1.4826 * np.median(np.abs(residual)[neighbours[:, 1:]], axis=1)
        return np.maximum(local, spread(residual))


def _features(frames: Sequence[Compared], elements: list[int], functions: PairFunctions) -> Floats:
    """(m, f) smooth invariants of every structure, per atom."""
    if any(f.features is None for f in frames):
        return np.array([functions.energies(f.atoms) for f in frames])
    width = max(len(v) for f in frames if f.features is not None for v in f.features.values())
    rows = np.zeros((len(frames), len(elements), width))
    for row, frame in zip(rows, frames, strict=True):
        for z, value in (frame.features or {}).items():
            row[elements.index(z)] = value / len(frame.atoms)
    if len(elements) > _MAX_ELEMENTS:
        return rows.sum(axis=1)
    return rows.reshape(len(frames), -1)


# ---- energies ----------------------------------------------------------------------------------


def _energy_faults(frames: Sequence[Compared], space: _Space) -> list[LabelFault]:
    members = np.array([i for i, f in enumerate(frames) if f.energy is not None], dtype=int)
    if len(members) < MIN_FRAMES:
        return []
    target = np.array([_energy_residual(frames[i]) for i in members])
    residual = _smooth_residual(target, space, members)
    usual = np.maximum(space.usual(residual, members), _ENERGY_NOISE)
    wrong = (np.abs(residual) > ENERGY_Z * usual) & (np.abs(residual) > ENERGY_FLOOR)
    return [
        LabelFault(
            int(members[k]),
            "energy",
            "offset",
            float(residual[k]),
            float(usual[k]),
            f"off by {1e3 * residual[k]:+.0f} meV/atom where {1e3 * usual[k]:.1f} is usual",
        )
        for k in np.flatnonzero(wrong)
    ]


def _energy_residual(frame: Compared) -> float:
    assert frame.energy is not None
    return (frame.energy - frame.model_energy) / len(frame.atoms)


def _smooth_residual(target: Floats, space: _Space, members: Floats) -> Floats:
    """What the best of a few regressions on composition and features leaves over, eV/atom."""
    target = target - np.median(target)
    best, best_score = target, np.inf
    for k in _COMPONENTS:
        if k and (k > len(members) // _FRAMES_PER_COMPONENT or k > space.components.shape[1]):
            break
        design = np.concatenate(
            [space.composition, space.components[:, :k] * np.sqrt(space.weights[:k])], axis=1
        )
        residual = robust_fit(design[members], target).residual
        score = trimmed_rms(residual)
        if score < best_score:
            best, best_score = residual, score
    return best


# ---- forces ------------------------------------------------------------------------------------


def _force_faults(frames: Sequence[Compared], space: _Space) -> list[LabelFault]:
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
    usual = _usual_error(error, size, space, np.array(members), _FORCE_NOISE)
    apart = np.array([np.hypot(_rms(a), _rms(b)) for a, b in zip(labels, models, strict=True)])
    wrong = np.flatnonzero((error > RATIO * usual) & (error > SHARE * np.maximum(apart, 3 * _FORCE_NOISE)))
    faults = []
    for k in wrong:
        cause, text = explain_forces(int(k), structures, labels, models, usual)
        if cause == "frame":
            other = int(text)
            text = f"look like those of frame #{members[other]}"  # replaced by its name in a report
            faults.append(
                LabelFault(
                    members[k], "forces", cause, float(error[k]), float(usual[k]), str(members[other])
                )
            )
            continue
        faults.append(LabelFault(members[k], "forces", cause, float(error[k]), float(usual[k]), text))
    return faults


def _usual_error(error: Floats, size: Floats, space: _Space, members: Floats, floor: float) -> Floats:
    """Error that is usual for the size of the predicted values and the kind of structure.

    Logarithms are regressed on log size, its square, composition and features, robustly.
    """
    log_error = np.log(np.maximum(error, 0.2 * floor))
    log_size = np.log(np.maximum(size, 2.0 * floor))
    k = min(8, len(members) // 10, space.components.shape[1])
    design = np.column_stack(
        [
            log_size - log_size.mean(),
            log_size**2 - np.mean(log_size**2),
            space.composition[members],
            (space.components[:, :k] * np.sqrt(space.weights[:k]))[members],
        ]
    )
    return np.maximum(np.exp(log_error - robust_fit(design, log_error, ridge=1e-3).residual), floor)


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
    usual = _usual_error(error, size, space, members, _STRESS_NOISE)
    apart = np.array([np.hypot(_rms(a), _rms(b)) for a, b in zip(labels, models, strict=True)])
    wrong = (error > STRESS_RATIO * usual) & (error > STRESS_SHARE * np.maximum(apart, 3 * _STRESS_NOISE))
    return [
        LabelFault(int(members[k]), "stress", "unknown", float(error[k]), float(usual[k]))
        for k in np.flatnonzero(wrong)
    ]


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
