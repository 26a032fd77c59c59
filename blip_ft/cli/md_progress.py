"""How far ``blip-finetune md`` is, and its least certain atom: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from blip_ft.simulate.guard import Guard
from blip_ft.simulate.run import Say
from blip_ft.system.duration import duration

#: least seconds between two lines
EVERY = 60.0


@contextmanager
def shown(console: Console | None = None, what: str = "md") -> Iterator[Say]:
    """Show it on standard error; a line that nobody reads any more is lost, and stops nothing.

    Args:
        console: another place.
        what: is run.
    """
    console = console or Console(stderr=True)
    first: tuple[int, float] | None = None
    if console.is_terminal:
        columns = (
            TextColumn("{task.description} {task.completed}/{task.total} steps"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[worst]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None, worst="")
            yield lambda done, total, guard: bar.update(task, completed=done, total=total, worst=worst(guard))
        return
    said = time.monotonic()

    def say(done: int, total: int, guard: Guard) -> None:
        nonlocal first, said
        now = time.monotonic()
        if first is None:  # steps of an earlier call took no time
            first = done, now
        elif now - said >= EVERY:
            said = now
            left = (now - first[1]) / (done - first[0]) * (total - done)
            with suppress(OSError):
                print(line(what, done, total, left, guard), file=sys.stderr, flush=True)

    yield say


def line(what: str, done: int, total: int, left: float, guard: Guard) -> str:
    """A line of a log.

    Args:
        what: is run.
        done: steps.
        total: of how many.
        left: seconds.
        guard: of the run.
    """
    parts = [f"{what}: {done}/{total} steps, {duration(left)} left", worst(guard)]
    return ", ".join(p for p in parts if p)


def worst(guard: Guard) -> str:
    """The least certain atom at the last error bars."""
    return "" if guard.now is None else f"worst atom {guard.now[0]}: {guard.now[1]:.3f} eV/Å"
