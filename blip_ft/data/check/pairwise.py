"""A pair potential between a pretrained model and the labels.

A pretrained model is wrong in smooth ways: a bond that is a little too long, dispersion that one
of the two levels of theory lacks. Such an error is nearly the same function of the distances in
every frame, so a pair potential fitted to ``label - model`` of all frames takes most of it away
(a third of it on crystals, two thirds and more on molecules), and a label that belongs to another
frame, atom or axis stands out from what is left. With distances r_ij and element pairs ab,

    dE = sum_{i<j} sum_k c_{ab,k} g_k(r_ij),        dF_i = -d(dE)/dx_i,

g_k Gaussians of distance times a smooth cutoff. dF is linear in c.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from ase import Atoms

from blip_ft.data.neighbours import pairs_within
from blip_ft.data.robust import Floats

#: Å; beyond it the error of a pretrained model is no longer pairwise
CUTOFF = 5.0
#: Gaussians per pair of elements
N_RADIAL = 12
#: pairs of elements with functions of their own: the most frequent ones
MAX_PAIRS = 24
#: rows of forces (components) that the coefficients are fitted to
MAX_ROWS = 30_000
#: numbers held in memory while fitting
MAX_NUMBERS = 10_000_000
_CENTRES = np.linspace(0.7, CUTOFF - 0.3, N_RADIAL)
_WIDTH = _CENTRES[1] - _CENTRES[0]
_RIDGE, _STEPS = 1e-3, 10
#: frames this many times worse than the median frame lose their weight
_FAR = 3.0


class PairFunctions:
    """The functions of one set: which pairs of elements have their own.

    Args:
        frames: structures of the set; pairs are counted on at most 200 of them.
    """

    def __init__(self, frames: Sequence[Atoms]) -> None:
        counts: dict[tuple[int, int], int] = {}
        for atoms in frames[:: max(1, len(frames) // 200)]:
            zs, n = np.unique(atoms.numbers, return_counts=True)
            for (a, na), (b, nb) in itertools.combinations_with_replacement(zip(zs, n, strict=True), 2):
                counts[int(a), int(b)] = counts.get((int(a), int(b)), 0) + int(na * nb)
        kept = sorted(counts, key=lambda pair: (-counts[pair], pair))[:MAX_PAIRS]
        self.index = {pair: k for k, pair in enumerate(sorted(kept))}

    @property
    def size(self) -> int:
        """Number of functions."""
        return len(self.index) * N_RADIAL

    def _bonds(self, atoms: Atoms) -> tuple[np.ndarray, np.ndarray, Floats, Floats]:
        """Centre atom, pair of elements, distance and vector of every bond that has functions."""
        i, j, d, vector = pairs_within(atoms, CUTOFF)
        pairs = np.sort(atoms.numbers[np.stack([i, j], axis=1)], axis=1)
        kinds, place = np.unique(pairs, axis=0, return_inverse=True)
        known = np.array([self.index.get((int(a), int(b)), -1) for a, b in kinds], dtype=int)
        kind = known[place.reshape(-1)] if len(kinds) else np.zeros(0, dtype=int)
        keep = (kind >= 0) & (d > 1e-3)
        return i[keep], kind[keep], d[keep], vector[keep]

    def energies(self, atoms: Atoms) -> Floats:
        """(size,) sums over pairs of every function, per atom: what dE/n is linear in."""
        _, kind, d, _ = self._bonds(atoms)
        out = np.zeros((len(self.index), N_RADIAL))
        np.add.at(out, kind, _radial(d)[0])
        return 0.5 * out.reshape(-1) / len(atoms)

    def forces(self, atoms: Atoms) -> Floats:
        """(3n, size) forces of every function, 1/Å times its coefficient in eV."""
        i, kind, d, vector = self._bonds(atoms)
        # vectors point from i to j: a rising function pulls i towards j
        pull = _radial(d)[1][:, :, None] * (vector / d[:, None])[:, None, :]
        out = np.zeros((len(atoms), len(self.index), N_RADIAL, 3))
        np.add.at(out, (i, kind), pull)
        return out.transpose(0, 3, 1, 2).reshape(3 * len(atoms), self.size)


def _radial(d: Floats) -> tuple[Floats, Floats]:
    """(bonds, N_RADIAL) functions of distance and their derivatives, 1/Å."""
    u = (d[:, None] - _CENTRES) / _WIDTH
    gauss = np.exp(-0.5 * u**2)
    inside = (1.0 - (d[:, None] / CUTOFF) ** 2).clip(0.0)
    value = gauss * inside**2
    slope = -u / _WIDTH * value - gauss * 4.0 * inside * d[:, None] / CUTOFF**2
    return value, slope


def pair_corrections(
    frames: Sequence[Atoms], residuals: Sequence[Floats | None], functions: PairFunctions
) -> list[Floats]:
    """Forces that the fitted pair potential adds to the model in every frame.

    Frames count with weights 1/error^2, so that those near equilibrium, where errors are small,
    are fitted as well in proportion; frames far from the rest lose their weight.

    Args:
        frames: the structures.
        residuals: (n, 3) label minus model of each frame, eV/Å; ``None`` without forces.
        functions: of this set.

    Returns:
        (n, 3) per frame, eV/Å; zeros where there are too few labels to fit anything.
    """
    designs: dict[int, Floats] = {}
    coefficients = _fit(frames, residuals, functions, designs)
    if coefficients is None:
        return [np.zeros((len(atoms), 3)) for atoms in frames]
    out = []
    for i, atoms in enumerate(frames):
        design = designs.pop(i) if i in designs else functions.forces(atoms)
        out.append((design @ coefficients).reshape(-1, 3))
    return out


def _fit(
    frames: Sequence[Atoms],
    residuals: Sequence[Floats | None],
    functions: PairFunctions,
    designs: dict[int, Floats],
) -> Floats | None:
    """Coefficients, eV; leaves the designs that it made in ``designs``."""
    known = [i for i, r in enumerate(residuals) if r is not None]
    rows = sum(3 * len(frames[i]) for i in known)
    if not functions.size or rows < 10 * functions.size or len(known) < 5:
        return None
    rng = np.random.default_rng(0)
    share = min(1.0, MAX_ROWS / rows, MAX_NUMBERS / (rows * functions.size))
    chosen = (
        known if share == 1.0 else sorted(rng.choice(known, max(5, int(share * len(known))), replace=False))
    )
    parts = []
    for i in chosen:
        residual = residuals[i]
        assert residual is not None
        designs[i] = functions.forces(frames[i])
        parts.append((designs[i], residual.reshape(-1)))
    grams = [x.T @ x / len(x) for x, _ in parts] if functions.size <= 100 else None
    sides = [x.T @ y / len(x) for x, y in parts]
    weight: Floats = np.ones(len(parts))
    coefficients = np.zeros(functions.size)
    for step in range(_STEPS):
        gram = np.zeros((functions.size, functions.size))
        for k, (x, _) in enumerate(parts):
            gram += weight[k] * (grams[k] if grams is not None else x.T @ x / len(x))
        gram += _RIDGE * max(np.trace(gram) / functions.size, 1e-12) * np.eye(functions.size)
        coefficients = np.linalg.solve(gram, sum(w * s for w, s in zip(weight, sides, strict=True)))
        error = np.array([np.sqrt(np.mean((y - x @ coefficients) ** 2)) for x, y in parts])
        middle = max(float(np.median(error)), 1e-6)
        if step < _STEPS // 2:
            weight = 1.0 / np.maximum(error, 0.5 * middle) ** 2
        else:
            far = np.minimum(1.0, (_FAR * middle / np.maximum(error, 1e-12)) ** 4)
            weight = far / np.maximum(error, 0.3 * middle) ** 2
        weight /= weight.max()
    return coefficients
