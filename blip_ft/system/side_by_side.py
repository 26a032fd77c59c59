"""Structures side by side: pieces of a batch in threads of their own.

torch's threads share one operation among them. Structures of ten to a hundred atoms make operations too small for that:
its second core shortens a training step of SevenNet-0 by a seventh and burns as much as the first. No structure feels
another, so pieces of a batch can be evaluated, and differentiated, at the same time instead, each by one
thread; torch's operations and the kernels of the adapters run without Python's lock.

What a model keeps for the length of one evaluation (``variational.NoiseState``) belongs to the thread. Numbers
are those of the whole batch to rounding, as they are for any other size of batches.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import accumulate, pairwise
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}
_LOCK = threading.Lock()
_INSIDE = contextvars.ContextVar("inside", default=False)


def width(device: torch.device | str) -> int:
    """How many pieces can be worked on at the same time: torch's threads on a CPU, 1 elsewhere and within a piece."""
    return torch.get_num_threads() if torch.device(device).type == "cpu" and not _INSIDE.get() else 1


def side_by_side(work: Callable[[T], R], pieces: Sequence[T], *, threads: int | None = None) -> list[R]:
    """``[work(piece) for piece in pieces]``, the pieces at the same time.

    Each is worked on with its share of torch's threads, in the caller's grad mode and context variables. Pieces are
    begun in their order; where one fails, the others are waited for, and the first error is raised.

    Args:
        work: may evaluate and differentiate models, and write where no other piece does.
        pieces: inputs.
        threads: at most so many at the same time; by default as many as torch has.
    """
    have = torch.get_num_threads()
    many = min(have if threads is None else threads, len(pieces))
    if many < 2 or _INSIDE.get():
        return [work(piece) for piece in pieces]
    share, grad = max(1, have // many), torch.is_grad_enabled()
    queue = iter(list(enumerate(pieces)))
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}

    def run() -> None:
        _INSIDE.set(True)
        with torch.set_grad_enabled(grad):
            while not errors:
                with _LOCK:
                    number, piece = next(queue, (None, None))
                if number is None:
                    return
                try:
                    results[number] = work(piece)  # type: ignore[arg-type]
                except BaseException as error:  # noqa: BLE001 raised below
                    errors[number] = error

    def helper() -> None:
        torch.set_num_threads(share)  # OpenMP counts for each thread that asks
        run()

    torch.set_num_threads(share)
    try:
        pool = _pool(many - 1)
        others = [pool.submit(contextvars.copy_context().run, helper) for _ in range(many - 1)]
        contextvars.copy_context().run(run)
        wait(others)
    finally:
        torch.set_num_threads(have)
    if errors:
        raise errors[min(errors)]
    return [results[i] for i in range(len(pieces))]


def _pool(threads: int) -> ThreadPoolExecutor:
    key = os.getpid(), threads  # threads do not survive a fork
    with _LOCK:
        if key not in _POOLS:
            _POOLS[key] = ThreadPoolExecutor(threads, thread_name_prefix="side_by_side")
        return _POOLS[key]


def cut(sizes: Sequence[int], pieces: int) -> list[range]:
    """Consecutive pieces of about equal size, none empty.

    Args:
        sizes: of each item.
        pieces: how many at most.
    """
    pieces = min(pieces, len(sizes))
    after = [0, *accumulate(sizes)]
    ends = [0]
    for k in range(1, pieces):
        possible = range(ends[-1] + 1, len(sizes) - pieces + k + 1)
        ends.append(min(possible, key=lambda n, k=k: abs(after[n] - k * after[-1] / pieces)))  # type: ignore[misc]
    ends.append(len(sizes))
    return [range(a, b) for a, b in pairwise(ends) if b > a]
