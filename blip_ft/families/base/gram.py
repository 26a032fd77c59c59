"""Products of gradient rows, in float64 and by blocks: the only work on arrays as large as the rows.

Rows are in the model's precision, as they are the largest thing that a fit holds; the small eigenvalues of
their Gram matrix, and combinations of rows that cancel, need sums in float64. A block is converted at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from scipy.linalg.blas import dsyrk
from torch import Tensor

#: bytes of a block in float64
BLOCK_BYTES = 2**26


def blocks(rows: Tensor) -> Iterator[slice]:
    """Columns of (m, P) rows that are converted at a time."""
    width = max(64, BLOCK_BYTES // (8 * max(1, len(rows))))
    for start in range(0, rows.shape[1], width):
        yield slice(start, start + width)


def gram_matrix(rows: Tensor) -> np.ndarray:
    """(m, P) -> (m, m) G G^T in float64.

    On a CPU only half of it is computed (BLAS ``dsyrk``: .55 of the time of a general product).
    """
    m = len(rows)
    if rows.device.type != "cpu":
        total = torch.zeros(m, m, dtype=torch.float64, device=rows.device)
        for b in blocks(rows):
            block = rows[:, b].double()
            total.addmm_(block, block.T)
        on_device: np.ndarray = total.cpu().numpy()
        return on_device
    out = np.zeros((m, m), order="F")
    with as_many_threads_as_torch():
        for b in blocks(rows) if m else ():
            out = added(out, rows[:, b].detach().double().numpy())
    return mirrored(out)


def self_product(a: np.ndarray) -> np.ndarray:
    """(m, k) -> (m, m) a a^T, both float64."""
    return mirrored(added(np.zeros((len(a), len(a)), order="F"), a))


def added(total: np.ndarray, a: np.ndarray, sign: float = 1.0) -> np.ndarray:
    """The upper half of total + a a^T, or total - a a^T, in the memory of total, which lies by columns."""
    if not a.shape[1]:
        return total
    # BLAS reads columns: an array that lies by columns as it is, another one as its transpose
    turned = not a.flags.f_contiguous
    out: np.ndarray = dsyrk(
        sign, a.T if turned else a, beta=1.0, c=total, trans=int(turned), lower=0, overwrite_c=1
    )
    return out


def mirrored(half: np.ndarray) -> np.ndarray:
    """The lower half filled in, without a copy of the whole."""
    for i in range(len(half)):
        half[i + 1 :, i] = half[i, i + 1 :]
    return half


def combine(mix: np.ndarray, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(k, m) combinations of (m, P) rows, in their precision or another, but summed in float64, where they cancel."""
    coefficients = torch.from_numpy(np.ascontiguousarray(mix)).to(rows.device)
    out = rows.new_empty(len(mix), rows.shape[1], dtype=dtype or rows.dtype)
    for b in blocks(rows):
        out[:, b] = (coefficients @ rows[:, b].double()).to(out)
    return out


@contextmanager
def as_many_threads_as_torch() -> Iterator[None]:
    """Let the BLAS of numpy and scipy, which have threads of their own, use as many as torch has been given."""
    wanted = torch.get_num_threads()
    before = [(put, get()) for get, put in _libraries()]
    for put, _ in before:
        put(wanted)
    try:
        yield
    finally:
        for put, count in before:
            put(count)


@cache
def _libraries() -> tuple[tuple[Callable[[], int], Callable[[int], None]], ...]:
    """How to read and set the number of threads of OpenBLAS as the wheels of scipy and numpy bring it.

    Other builds (MKL, Accelerate) have no such functions and follow their own rules.
    """
    import numpy.linalg._umath_linalg as of_numpy
    import scipy.linalg._fblas as of_scipy

    found = []
    for module in (of_scipy, of_numpy):
        for name in ("openblas_{}_num_threads", "openblas_{}_num_threads64_"):
            for prefix in ("scipy_", ""):
                try:
                    library = ctypes.CDLL(module.__file__)
                    get, put = (getattr(library, prefix + name.format(what)) for what in ("get", "set"))
                except (OSError, AttributeError):
                    continue
                found.append((get, put))
                break
    return tuple(found)
