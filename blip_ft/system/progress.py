"""Progress and time left of long work that has no epochs: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

#: least seconds between two lines
EVERY = 30.0


@contextmanager
def progress(
    console: Console, what: str, total: int, *, bar: bool = True, unit: str = "frames"
) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is.

    Args:
        console: where; nothing remains on a terminal once the work is done.
        what: is being done.
        total: number of units.
        bar: ``False`` for lines on a terminal too, where a training draws its own bar.
        unit: of what is counted.

    Yields:
        To be called with the number of units that were done since the last call, from any thread.
    """
    if bar and console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as drawn:
            task = drawn.add_task(what, total=total)
            yield lambda n: drawn.advance(task, n)
        return
    started = said = time.monotonic()
    done, lock = 0, threading.Lock()

    def advance(n: int) -> None:
        nonlocal done, said
        with lock:
            done += n
            now = time.monotonic()
            if now - said >= EVERY and done < total:
                said = now
                left = (now - started) / done * (total - done)
                console.print(f"{what}: {done}/{total} {unit}  {left:.0f} s left")

    yield advance
