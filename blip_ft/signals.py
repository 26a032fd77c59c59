"""SIGTERM as an exception, so that what a scheduler ends says what it has kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The program was told to end (SIGTERM); as an interrupt it passes through what catches errors."""


def _raise(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Terminated


@contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises :class:`Terminated`, in the main thread, where Python has its signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
