"""Wrong labels put among good ones, to measure how many of them a check finds.

The faults are those that happen: an energy of another setting, results joined to structures in
another order, atoms sorted by another program, an axis that points the other way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blip_ft.data.check.label_faults import Compared

#: what can be planted
KINDS = ("energy", "swap", "atoms", "axis")
#: eV/atom
OFFSET = 0.05


def plant(
    frames: Sequence[Compared], kind: str, seed: int, share: float = 0.05
) -> tuple[list[Compared], set[int]]:
    """Copies with wrong labels in a share of the frames, and the numbers of these frames.

    Args:
        frames: with good labels: energy and forces.
        kind: ``energy`` (:data:`OFFSET` per atom, either sign), ``swap`` (all labels exchanged between
            two frames of the same atoms), ``atoms`` (forces in a random order) or ``axis`` (one
            component of all forces inverted).
        seed: of the choice.
        share: of the frames, at least two.
    """
    rng = np.random.default_rng(seed)
    out = list(frames)
    count = max(2, round(share * len(out)))
    if kind == "swap":
        return out, _swap(out, count, rng)
    chosen = {int(i) for i in rng.choice(len(out), count, replace=False)}
    for i in sorted(chosen):
        frame = out[i]
        assert frame.energy is not None
        assert frame.forces is not None
        if kind == "energy":
            off = float(rng.choice([-1.0, 1.0])) * OFFSET * len(frame.atoms)
            out[i] = replace(frame, energy=frame.energy + off)
        elif kind == "atoms":
            out[i] = replace(frame, forces=frame.forces[rng.permutation(len(frame.atoms))])
        elif kind == "axis":
            signs = np.ones(3)
            signs[rng.integers(3)] = -1.0
            out[i] = replace(frame, forces=frame.forces * signs)
        else:
            raise ValueError(f"kind '{kind}' is none of {', '.join(KINDS)}")
    return out, chosen


def _swap(out: list[Compared], count: int, rng: np.random.Generator) -> set[int]:
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, frame in enumerate(out):
        alike[tuple(frame.atoms.numbers.tolist())].append(i)
    chosen: set[int] = set()
    for i in rng.permutation(len(out)).tolist():
        others = [j for j in alike[tuple(out[i].atoms.numbers.tolist())] if j != i and j not in chosen]
        if len(chosen) >= count or i in chosen or not others:
            continue
        j = int(rng.choice(others))
        a, b = out[i], out[j]
        out[i] = replace(a, energy=b.energy, forces=b.forces, stress=b.stress)
        out[j] = replace(b, energy=a.energy, forces=a.forces, stress=a.stress)
        chosen |= {i, j}
    return chosen
