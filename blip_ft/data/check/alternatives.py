"""What could have happened to forces that do not fit their structure.

Every alternative undoes one mistake and is accepted if what remains is about as small as it is in
frames without a mistake.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from scipy.optimize import linear_sum_assignment

from blip_ft.data.robust import Floats

#: an alternative must leave less than this share of the error ...
GAIN = 0.5
#: ... and at most this many times the usual error
CLOSE = 2.5
#: atoms up to which the best order is looked for (the time grows with the third power)
MAX_ATOMS = 1000
#: frames whose labels are tried in place of the frame's own
MAX_OTHERS = 5000

#: signed permutations of the axes without the identity, fewest changes first
_AXES = sorted(
    (
        (order, signs)
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
        if (order, signs) != ((0, 1, 2), (1, 1, 1))
    ),
    key=lambda a: (sum(k != i for i, k in enumerate(a[0])) + sum(s < 0 for s in a[1]), a),
)


@dataclass(frozen=True)
class Explanation:
    """A mistake that would explain wrong forces.

    Attributes:
        cause: ``axes``, ``factor``, ``frame`` (labels of another one), ``atoms`` (their order) or
            ``unknown``.
        text: the cause in words.
        other: the frame whose labels these are, for ``frame``.
    """

    cause: str
    text: str = ""
    other: int | None = None


def explain_forces(
    frame: int, structures: Sequence[Atoms], labels: Sequence[Floats], models: Sequence[Floats], usual: Floats
) -> Explanation:
    """What one frame with wrong forces looks like.

    Args:
        frame: the one with wrong forces.
        structures: all frames.
        labels: (n, 3) forces of each.
        models: (n, 3) predicted forces of each.
        usual: (m,) usual error of each, eV/Å.
    """
    label, model = labels[frame], models[frame]
    error = _rms(label - model)
    limit = min(GAIN * error, CLOSE * float(usual[frame]))
    best = min(_AXES, key=lambda axes: _rms(_turned(label, axes) - model))
    if _rms(_turned(label, best) - model) < limit:
        return Explanation("axes", _axes_text(best))
    square = float(np.sum(model**2))
    slope = float(np.sum(label * model)) / square if square else 0.0
    if slope > 0 and _rms(label / slope - model) < limit:
        return Explanation("factor", f"{slope:.3g} times what they should be")
    other = _other_frame(frame, structures, labels, models, usual)
    if other is not None:
        return Explanation("frame", other=other)
    if 1 < len(label) <= MAX_ATOMS:
        cost = np.sum((label[:, None, :] - model[None, :, :]) ** 2, axis=2)
        rows, columns = linear_sum_assignment(cost)
        ordered = np.empty_like(label)
        ordered[columns] = label[rows]
        if _rms(ordered - model) < limit:
            moved = int(np.sum(columns != rows))
            return Explanation("atoms", f"{moved} of {len(label)} atoms are in another order")
    return Explanation("unknown")


def _other_frame(
    frame: int, structures: Sequence[Atoms], labels: Sequence[Floats], models: Sequence[Floats], usual: Floats
) -> int | None:
    """The frame whose predicted forces are those that this one is labelled with."""
    numbers = structures[frame].numbers
    alike = [
        i
        for i, atoms in enumerate(structures)
        if i != frame and len(atoms) == len(numbers) and np.array_equal(atoms.numbers, numbers)
    ][:MAX_OTHERS]
    if not alike:
        return None
    errors = np.array([_rms(labels[frame] - models[i]) for i in alike])
    k = int(np.argmin(errors))
    own = _rms(labels[frame] - models[frame])
    return alike[k] if errors[k] < min(GAIN * own, CLOSE * float(usual[alike[k]])) else None


def _turned(forces: Floats, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Floats:
    order, signs = axes
    turned: Floats = forces[:, list(order)] * np.array(signs)
    return turned


def _axes_text(axes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    order, signs = axes
    parts = []
    if order != (0, 1, 2):
        parts.append("the axes are in the order " + "".join("xyz"[k] for k in order))
    inverted = ["xyz"[i] for i, s in enumerate(signs) if s < 0]
    if inverted:
        parts.append(f"the sign of {' and '.join(inverted)} is inverted")
    return ", ".join(parts)


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
