"""What may still be chosen: frames, atoms, and frames of every group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


class Budget:
    """Counts down as frames are taken.

    Args:
        sizes: (N,) atoms of the candidates.
        groups: their groups.
        frames: most frames; ``None`` for no bound.
        atoms: most atoms of all of them together; ``None`` for no bound.
        per_group: most frames of a group; ``None`` for no bound.

    Attributes:
        taken: numbers of the candidates that were taken, in their order.
    """

    def __init__(
        self,
        sizes: NDArray[np.int64],
        groups: Sequence[str],
        *,
        frames: int | None = None,
        atoms: int | None = None,
        per_group: int | None = None,
    ) -> None:
        self.sizes, self.per_group = sizes, per_group
        names = {name: k for k, name in enumerate(dict.fromkeys(groups))}
        self._group = np.array([names[name] for name in groups], dtype=np.int64)
        self._in_group = np.zeros(len(names), dtype=np.int64)
        self._free = np.ones(len(sizes), dtype=bool)
        self.frames, self.atoms = frames, atoms
        self.taken: list[int] = []

    @property
    def most(self) -> int:
        """Frames that could be taken if there were no bound on atoms and frames."""
        counts = np.bincount(self._group[self._free], minlength=len(self._in_group))
        if self.per_group is None:
            return int(counts.sum())
        return int(np.minimum(counts, self.per_group - self._in_group).sum())

    def open(self) -> NDArray[np.bool_]:
        """(N,) whether each may be taken now."""
        if self.frames is not None and self.frames <= 0:
            return np.zeros(len(self._free), dtype=bool)
        out = self._free.copy()
        if self.per_group is not None:
            out &= (self._in_group < self.per_group)[self._group]
        if self.atoms is not None:
            out &= self.sizes <= self.atoms
        return out

    def close(self, numbers: Iterable[int]) -> None:
        """Never take some of them."""
        self._free[list(numbers)] = False

    def take(self, i: int) -> None:
        """Take one."""
        self._free[i] = False
        self._in_group[self._group[i]] += 1
        if self.frames is not None:
            self.frames -= 1
        if self.atoms is not None:
            self.atoms -= int(self.sizes[i])
        self.taken.append(i)
