"""Where the gradient rows of some structures stand among those of a batch: all first outputs, then all second ones, ...

A batch that does not fit into memory is made by halves; its rows come to stand where they would have without, since
what is drawn for a row is drawn for its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


def places(part: range, some: range, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers, within a batch, of the rows of some of its structures.

    Args:
        part: structures of the batch.
        some: those of them that are wanted.
        counts: (all structures,) rows of each.

    Returns:
        In the order in which ``some``, as a batch of its own, has its rows.
    """
    owner = np.repeat(np.array(part), counts[part.start : part.stop])
    output = np.concatenate([np.arange(counts[i]) for i in part])
    sorted_owner = owner[np.lexsort((owner, output))]
    return np.flatnonzero((sorted_owner >= some.start) & (sorted_owner < some.stop))


def merged(pieces: Sequence[tuple[NDArray[np.int64], T]]) -> T:
    """What belongs to the rows of a batch, of what belongs to those of its pieces.

    Args:
        pieces: places, and a data class whose fields are arrays or lists with an entry per row.
    """
    if len(pieces) == 1:
        return pieces[0][1]
    order = np.argsort(np.concatenate([at for at, _ in pieces]))
    values: dict[str, Any] = {}
    for field in fields(pieces[0][1]):  # type: ignore[arg-type]
        joined = [v for _, piece in pieces for v in getattr(piece, field.name)]
        first = getattr(pieces[0][1], field.name)
        ordered = [joined[i] for i in order]
        values[field.name] = ordered if isinstance(first, list) else np.array(ordered, dtype=first.dtype)
    return type(pieces[0][1])(**values)
