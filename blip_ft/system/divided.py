"""Work that is divided among the ranks of a run, beside what Lightning divides.

Every rank gets all results in their order, so that what follows is the same on each of them, and the same as with one:
pieces are cut without regard to the number of ranks. Before Lightning has started its ranks there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


def world_size() -> int:
    """Number of ranks that are there."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this one."""
    return dist.get_rank() if world_size() > 1 else 0


def own(pieces: Sequence[T]) -> list[T]:
    """The share of this rank: every n-th piece."""
    return list(pieces[rank() :: world_size()])


def divided(work: Callable[[list[T]], list[R]], pieces: Sequence[T]) -> list[R]:
    """``work(pieces)``, of which every rank does its share.

    Args:
        work: gives a result for each of the pieces that it is given; on a CPU, or without tensors.
        pieces: the same on all ranks.
    """
    results = work(own(pieces))
    if world_size() == 1:
        return results
    shares: list[list[R]] = [[]] * world_size()
    dist.all_gather_object(shares, results)
    return [shares[k % len(shares)][k // len(shares)] for k in range(len(pieces))]


def exchange(parts: Sequence[Tensor]) -> None:
    """Give each other the parts of a tensor, in place: that of number k is known to rank k modulo their number."""
    if world_size() > 1:
        for k, part in enumerate(parts):
            dist.broadcast(part, src=k % world_size())
