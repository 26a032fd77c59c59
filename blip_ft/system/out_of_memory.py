"""Work that does not fit into memory, done by halves.

No structure of a batch feels another, so a batch that is too large is two batches, and their results together are
its own, to rounding. What says that memory has run out differs by device: torch's ``OutOfMemoryError`` on a
GPU, a plain
``RuntimeError`` of its allocator on a CPU, ``MemoryError`` where numpy or Python asked.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from blip_ft.system.side_by_side import cut

T = TypeVar("T")
R = TypeVar("R")

#: what torch's allocators say without a type of their own: CPU (POSIX, Windows), MPS, cuBLAS, cuDNN and the driver
_SAYS = (
    "DefaultCPUAllocator",
    "not enough memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)

log = logging.getLogger("blip_ft")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAYS)


def release() -> None:
    """Give back what nothing needs any more, after the exception that held it has been dealt with."""
    gc.collect()  # graphs and the frames of a trace-back refer to each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def by_halves(
    work: Callable[[range], R],
    items: range,
    sizes: Sequence[int],
    *,
    what: str,
    said: Callable[[str], object] | None = None,
) -> list[R]:
    """``[work(items)]``; where memory runs out, what ``work`` gives for its halves, or their halves, in order.

    Args:
        work: must leave nothing behind when it fails.
        items: consecutive numbers.
        sizes: of each of these items, in their order (atoms); halves are of about equal size.
        what: is being done, for the log.
        said: told in a sentence when a batch is halved; by default the log.

    Raises:
        Exception: whatever ``work`` raises; a single item that does not fit.
    """
    try:
        return [work(items)]
    except Exception as error:
        if len(items) < 2 or not is_out_of_memory(error):
            raise
    # outside the handler, whose exception holds the frames that hold the tensors
    release()
    (said or log.warning)(
        f"out of memory in {what} of {len(items)} structures ({sum(sizes)} atoms): going on with halves"
    )
    out: list[R] = []
    for half in cut(sizes, 2):
        some = items[half.start : half.stop]
        out += by_halves(work, some, sizes[half.start : half.stop], what=what, said=said)
    return out
