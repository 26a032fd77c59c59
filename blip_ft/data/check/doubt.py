"""Labels that are wrong beyond doubt, whatever model they are compared with.

A model's error must never be taken for a wrong label, so a large residual alone proves nothing: a model may fail on a
frame as badly as it likes. Beside a residual that is many times the usual one there has to be evidence that the
model has no part in:

- forces: the forces of a structure without an external field sum to zero. A net force about as large as the error,
  where the other frames have none, comes from the label alone. Or the label is tens of eV/Å where everything that is
  predicted for the frame is ten times smaller.
- energies: frames of the same atoms agree with each other, and the forces of this frame are as good as those
of the others.
  A model that fails on a structure fails on both; a constant per composition, which references leave open, moves
  all frames of it.
- stress: larger by ten than anything predicted, and beyond what solids have.

The rules act on gross errors only; what is left is for ``label_faults``, which warns.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from blip_ft.data.robust import spread

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: a label is wrong beyond doubt only if it is off by so many times what is usual ...
TIMES = 30.0
#: ... and by at least this much: eV/Å, eV/atom (beside good forces), eV/Å^3
FORCE_FLOOR, ENERGY_FLOOR, STRESS_FLOOR = 1.0, 0.5, 0.5
#: what no error of a model explains by itself, eV/Å and eV/atom, where the frame's predictions are this many
#: times smaller
ABSURD_FORCE, ABSURD_ENERGY, SMALLER = 10.0, 10.0, 10.0
#: share of the error that a net force has to have, and how many times what other frames have
NET_SHARE, NET_TIMES = 0.5, 10.0
#: errors that are as good as none: eV/Å, eV/atom, eV/Å^3
_FORCE_NOISE, _ENERGY_NOISE, _STRESS_NOISE = 0.02, 2e-3, 1e-3
#: forces this many times worse than usual are not as good as those of the others
_GOOD = 5.0
#: other frames that say what is usual, of the same atoms for energies
_OTHERS = 3
#: share of the frames beyond which nothing is an exception
_MOST = 1 / 3


def wrong_forces(labels: Sequence[Floats | None], predictions: Sequence[Floats]) -> Bools:
    """(F,) frames with a force that is wrong beyond doubt.

    Args:
        labels: (n, 3) of each frame, eV/Å; ``None`` or not finite where there is none.
        predictions: (n, 3) of each frame.
    """
    out = np.zeros(len(labels), dtype=bool)
    known = [i for i, f in enumerate(labels) if f is not None and len(f) and np.isfinite(f).all()]
    pairs = [(np.asarray(labels[i], dtype=float), np.asarray(predictions[i], dtype=float)) for i in known]
    error = np.array([_rms(a - b) for a, b in pairs])
    net = np.array([float(np.abs(a.sum(axis=0)).max()) for a, _ in pairs])
    for k, (label, predicted) in enumerate(pairs):
        others = np.arange(len(pairs)) != k
        if others.sum() < _OTHERS or not np.isfinite(predicted).all():
            continue
        worst = float(np.abs(label - predicted).max())
        usual = max(float(np.median(error[others])), _FORCE_NOISE)
        if worst < max(FORCE_FLOOR, TIMES * usual):
            continue
        unbalanced = net[k] >= max(NET_SHARE * worst, NET_TIMES * float(np.median(net[others])))
        absurd = worst >= ABSURD_FORCE and worst >= SMALLER * float(np.abs(predicted).max())
        out[known[k]] = (unbalanced and len(label) > 1) or absurd
    return _exceptions(out, len(known))


def wrong_energies(
    numbers: Sequence[NDArray[np.int64]],
    error: Floats,
    force_error: Floats | None = None,
    states: Sequence[Hashable] | None = None,
) -> Bools:
    """(F,) frames with an energy that is wrong beyond doubt.

    Args:
        numbers: atomic numbers of each frame.
        error: (F,) label minus prediction, eV/atom; NaN without a label.
        force_error: (F,) rms error of the forces of each frame, eV/Å; NaN where there are none.
        states: charge and spin of each frame, of which a model may know nothing: other states are not the same atoms.
    """
    out = np.zeros(len(error), dtype=bool)
    known: list[int] = np.flatnonzero(np.isfinite(error)).tolist()
    forces = np.full(len(error), np.nan) if force_error is None else force_error
    alike: dict[Hashable, list[int]] = {}
    shares: dict[Hashable, list[int]] = {}
    for i in known:
        counts = np.bincount(numbers[i])
        state = None if states is None else states[i]
        alike.setdefault((counts.tobytes(), state), []).append(i)
        shares.setdefault(((counts // np.gcd.reduce(counts)).tobytes(), state), []).append(i)
    finite = forces[np.isfinite(forces)]
    good = _GOOD * max(float(np.median(finite)), _FORCE_NOISE) if finite.size else 0.0
    for groups, floor in ((alike, ENERGY_FLOOR), (shares, ABSURD_ENERGY)):
        for members in groups.values():
            centre = float(np.median(error[members]))
            for i in members:
                if len(members) <= _OTHERS or len(numbers[i]) < 2 or abs(error[i] - centre) < floor / 2:
                    continue
                others = error[[j for j in members if j != i]]
                off = abs(float(error[i] - np.median(others)))
                usual = max(spread(others), _ENERGY_NOISE)
                enough = floor if np.isfinite(forces[i]) and forces[i] <= good else ABSURD_ENERGY
                out[i] |= off >= max(enough, TIMES * usual)
    return _exceptions(out, len(known))


def wrong_stress(labels: Floats, predictions: Floats) -> Bools:
    """(F,) frames with a stress that is wrong beyond doubt.

    Args:
        labels: (F, 6) eV/Å^3; NaN where there is none.
        predictions: (F, 6), likewise.
    """
    known = np.isfinite(labels).all(axis=1) & np.isfinite(predictions).all(axis=1)
    out = np.zeros(len(labels), dtype=bool)
    index = np.flatnonzero(known)
    off = labels[index] - predictions[index]
    off = off - np.median(off, axis=0) if len(index) else off  # another level of theory shifts all alike
    error = np.sqrt(np.mean(off**2, axis=1))
    for k, i in enumerate(index):
        others = np.arange(len(index)) != k
        if others.sum() < _OTHERS:
            continue
        worst = float(np.abs(off[k]).max())
        usual = max(float(np.median(error[others])), _STRESS_NOISE)
        largest = float(np.abs(predictions[i]).max())
        out[i] = worst >= max(STRESS_FLOOR, TIMES * usual, SMALLER * largest)
    return _exceptions(out, len(index))


def _exceptions(found: Bools, n: int) -> Bools:
    """``found``, or none of them where they are too many to be exceptions."""
    return found if found.sum() <= max(1, _MOST * n) else np.zeros_like(found)


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
