"""How far ``blip-finetune predict`` is: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from blip_ft.cli.predict_file import Say
from blip_ft.system.duration import duration

#: least seconds between two lines
EVERY = 60.0


@contextmanager
def shown(console: Console | None = None) -> Iterator[Say]:
    """Show it on standard error.

    A log that nobody reads any more, or that is full, is no reason to stop: such a line is lost.

    Args:
        console: another place.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.completed} structures"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, kept: bar.update(task, completed=done, total=total)
        return
    started = said = time.monotonic()

    def say(done: int, total: int | None, kept: int) -> None:
        nonlocal said
        now = time.monotonic()
        if done == kept or now - said < EVERY:
            return
        said = now
        with suppress(OSError):
            print(line(done, total, kept, now - started), file=sys.stderr, flush=True)

    yield say


def line(done: int, total: int | None, kept: int, seconds: float) -> str:
    """A line of a log.

    Args:
        done: structures that are dealt with.
        total: of all; ``None`` if that is not known.
        kept: done by an earlier call, in no time.
        seconds: since this one has begun.
    """
    rate = (done - kept) / seconds
    if total is None:
        return f"predicting: {done} structures, {rate:.3g} per second"
    left = (total - done) / rate
    return f"predicting: {done}/{total} structures, {duration(left)} left"
