"""Weights of the fixed draws, made once and not in every batch.

A draw of a correlated family is a product with the matrix that holds its covariance: 130 MB are read for 1 MB of
weights (``pathwise``, SevenNet-0). The weights are kept as long as nothing that they are made of has changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

#: bytes of weights that are kept; draws that come after are made anew each time
LIMIT = 256_000_000

#: one draw: {site name: (*site.shape)}
Draw = dict[str, Tensor]


class DrawnWeights:
    """A bounded memory of draws.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._draws: dict[int, Draw] = {}
        self._bytes = 0
        self._values: Hashable = None
        self._tensors: list[tuple[weakref.ref[Tensor], Hashable]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies start empty: what is kept belongs to the tensors of the original."""
        return {"limit": self.limit}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.limit = state["limit"]
        self.clear()

    def get(
        self, number: int, make: Callable[[], Draw], *, tensors: Iterable[Tensor], values: Hashable
    ) -> Draw:
        """The weights of a draw; made where they are not known, or where something has changed.

        Args:
            number: of the draw.
            make: makes its weights.
            tensors: all that they depend on. They are compared by identity, place in memory and the count of changes
                that torch keeps, which sees everything but writing through ``tensor.data``.
            values: numbers that they depend on.
        """
        tensors = list(tensors)
        if any(t.is_inference() for t in tensors):  # of these no changes are counted
            self.clear()
            return make()
        if not self._unchanged(tensors, values):
            self.clear()
            self._values = values
            self._tensors = [(weakref.ref(t), _mark(t)) for t in tensors]
        if number in self._draws:
            return dict(self._draws[number])
        draw = make()
        size = sum(w.numel() * w.element_size() for w in draw.values())
        if self._bytes + size <= self.limit and not any(w.requires_grad for w in draw.values()):
            # no views of a larger tensor, which would stay with them
            self._draws[number] = {name: w.clone() if w._is_view() else w for name, w in draw.items()}
            self._bytes += size
        return draw

    def _unchanged(self, tensors: list[Tensor], values: Hashable) -> bool:
        return (
            values == self._values
            and len(tensors) == len(self._tensors)
            and all(
                ref() is t and mark == _mark(t) for t, (ref, mark) in zip(tensors, self._tensors, strict=True)
            )
        )


def _mark(tensor: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device
