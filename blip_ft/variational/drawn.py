"""Weights of correlated families, made once for many uses.

A sample of such a family is a product with the matrix that holds its covariance: 130 MB are read for 1 MB of
weights (``pathwise``, SevenNet-0). The weights of the fixed draws are kept, and samples of training noise are made for
many structures of an epoch at once, as long as nothing that they are made of has changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: bytes of weights that are kept; draws that come after are made anew each time
LIMIT = 256_000_000
#: bytes of the samples that are made at once, unless one batch needs more
AHEAD = 64_000_000

#: one draw: {site name: (*site.shape)}; several samples: {site name: (B, *site.shape)}
Draw = dict[str, Tensor]


class _Origin:
    """What kept weights are made of, as it was when they were made.

    Tensors are compared by identity, place in memory and the count of changes that torch keeps, which sees everything
    but writing through ``tensor.data``.
    """

    def __init__(self, tensors: Sequence[Tensor], values: Hashable) -> None:
        self.values = values
        self.tensors = [(weakref.ref(t), _mark(t)) for t in tensors]

    def is_still(self, tensors: Sequence[Tensor], values: Hashable) -> bool:
        """Whether these are the same, unchanged."""
        return (
            values == self.values
            and len(tensors) == len(self.tensors)
            and all(
                ref() is t and mark == _mark(t) for t, (ref, mark) in zip(tensors, self.tensors, strict=True)
            )
        )


class SamplesAhead:
    """Samples of the structures of an epoch, made in blocks.

    Args:
        limit: bytes of a block.
    """

    def __init__(self, limit: float = AHEAD) -> None:
        self.limit = limit
        self._lock = threading.RLock()
        self.expect(())

    def __reduce__(self) -> tuple[type[SamplesAhead], tuple[float]]:
        """Copies expect nothing."""
        return SamplesAhead, (self.limit,)

    def expect(self, structures: Sequence[int]) -> None:
        """Say in which order the structures of the next batches come, by their keys; none: no batch is expected."""
        with self._lock:
            self._order = list(structures)
            self._place = {key: n for n, key in enumerate(self._order)}
            self._origin: _Origin | None = None
            self._rows: dict[tuple[int, Hashable], int] = {}
            self._samples: Draw = {}

    def get(
        self,
        structures: Sequence[int],
        of: Hashable,
        make: Callable[[Sequence[int]], Draw],
        *,
        size: int,
        tensors: Callable[[], Sequence[Tensor]],
        values: Hashable,
    ) -> Draw | None:
        """Samples of some structures, ``None`` where they were not expected.

        Blocks start at fixed places of the order, so that what is made together does not depend on where an epoch
        was begun.

        Args:
            structures: keys.
            of: further parts of the samples' keys.
            make: samples of structures.
            size: bytes of a sample.
            tensors: gives all that they depend on; not asked where nothing was expected.
            values: numbers that they depend on.
        """
        with self._lock:
            if not all(key in self._place for key in structures):
                return None
            made_of = tensors()
            if any(t.requires_grad for t in made_of):  # gradients are wanted through every sample
                return None
            if self._origin is None or not self._origin.is_still(made_of, values):
                self._rows, self._origin = {}, _Origin(made_of, values)
            if not all((key, of) in self._rows for key in structures):
                self._make(structures, of, make, size)
            rows = [self._rows[key, of] for key in structures]
            if rows == list(range(rows[0], rows[0] + len(rows))):
                return {name: w[rows[0] : rows[0] + len(rows)] for name, w in self._samples.items()}
            return {name: w[rows] for name, w in self._samples.items()}

    def _make(
        self, structures: Sequence[int], of: Hashable, make: Callable[[Sequence[int]], Draw], size: int
    ) -> None:
        """The blocks that the structures lie in, in place of what there was."""
        block = max(1, int(self.limit // size))
        blocks = sorted({self._place[key] // block for key in structures})
        wanted = [key for n in blocks for key in self._order[n * block : (n + 1) * block]]
        with torch.no_grad():
            self._samples = make(wanted)
        self._rows = {(key, of): n for n, key in enumerate(wanted)}


class DrawnWeights:
    """A bounded memory of draws.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._draws: dict[int, Draw] = {}
        self._bytes = 0
        self._origin: _Origin | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies start empty: what is kept belongs to the tensors of the original."""
        return {"limit": self.limit}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]

    def get(
        self, number: int, make: Callable[[], Draw], *, tensors: Iterable[Tensor], values: Hashable
    ) -> Draw:
        """The weights of a draw; made where they are not known, or where something has changed.

        Args:
            number: of the draw.
            make: makes its weights.
            tensors: all that they depend on.
            values: numbers that they depend on.
        """
        with self._lock:
            return self._get(number, make, list(tensors), values)

    def _get(self, number: int, make: Callable[[], Draw], tensors: list[Tensor], values: Hashable) -> Draw:
        if any(t.is_inference() for t in tensors):  # of these no changes are counted
            self.clear()
            return make()
        if self._origin is None or not self._origin.is_still(tensors, values):
            self.clear()
            self._origin = _Origin(tensors, values)
        if number in self._draws:
            return dict(self._draws[number])
        draw = make()
        size = sum(w.numel() * w.element_size() for w in draw.values())
        if self._bytes + size <= self.limit and not any(w.requires_grad for w in draw.values()):
            # no views of a larger tensor, which would stay with them
            self._draws[number] = {name: w.clone() if w._is_view() else w for name, w in draw.items()}
            self._bytes += size
        return draw


def _mark(tensor: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device
