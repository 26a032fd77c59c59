"""Let the C library keep the memory that it has, or give it back.

glibc maps every large block anew and gives it back when it is freed, so that each intermediate tensor of a
call is made of fresh pages: 25,000 to 60,000 page faults in one call of SevenNet-0, a fifth to a third of its
time. Two settings keep blocks up to :data:`MAPPED` in the heap, and the heap's end with the process until
:data:`KEPT` of it are free. Numbers do not change; a process holds what it needed at most, up to that.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache

#: blocks from this size on are mapped by themselves, bytes: as large as glibc allows
MAPPED = 32 * 2**20
#: free memory at the heap's end that is kept, bytes: below 2^31, as it is given as an int
KEPT = 2**31 - 1
#: parameters of mallopt (malloc.h)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: what a user sets is left alone
_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@cache
def keep_memory() -> bool:
    """Make the settings, once per process.

    Returns:
        Whether they were made: not without glibc, nor where the environment sets the allocator
        (``MALLOC_..._``, ``glibc.malloc`` in ``GLIBC_TUNABLES``) or replaces it (``LD_PRELOAD``).
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or "malloc" in os.environ.get(
        "LD_PRELOAD", ""
    )
    if tuned or any(name in os.environ for name in _USERS):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 other C libraries lack it, and musl's mallopt does nothing
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: there is no such library on Windows
        return False
    # the first call ends the threshold's own growth, so both are needed
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT))


def trim() -> None:
    """Give free memory of the heap back to the system, where glibc holds any."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
