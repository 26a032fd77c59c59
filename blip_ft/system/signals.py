"""Signals that end a run: SIGTERM with exit code 143, Ctrl-C with 130, SLURM's SIGUSR1 with a place in its queue.

Lightning's handlers swallow SIGTERM and leave checkpoints of their own in the working directory, so ours are put back
when a training has set its own up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: exit code of a program that a signal has ended, minus the signal's number
BASE = 128


class Stopped(BaseException):
    """A signal has ended the run. No ``Exception``: nothing but the command line has an answer.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """As shells have it."""
        return BASE + self.number


class Interrupts:
    """Turns signals into :class:`Stopped`, at once, or where the work is ready for it.

    Attributes:
        waits: a signal is remembered and raised by :meth:`check`, which the work calls at good places; a second one is
            raised at once.
        received: number of a signal that has come.
    """

    def __init__(self) -> None:
        self.waits = False
        self.received: int | None = None

    @property
    def signals(self) -> tuple[int, ...]:
        """That are handled; SIGUSR1 where SLURM runs this program and can start it again."""
        usual = (signal.SIGTERM, signal.SIGINT)
        return (*usual, signal.SIGUSR1) if job() is not None else usual

    def install(self) -> None:
        """Handle the signals from now on; nothing outside the main thread, where Python does not handle any."""
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._handle)

    @contextmanager
    def handled(self) -> Iterator[Interrupts]:
        """Handle the signals for the length of a block."""
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in self.signals} if main else {}
        self.install()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise what has come while the work could not be ended.

        Raises:
            Stopped: a signal has come.
        """
        if self.received is not None:
            raise Stopped(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        again, self.received = self.received is not None, number
        if again or not self.waits:
            raise Stopped(number)


def job() -> str | None:
    """The SLURM job that this process belongs to, as ``scontrol`` names it; ``None`` outside of one."""
    if not os.environ.get("SLURM_JOB_ID"):
        return None
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def requeue() -> str:
    """Ask SLURM to start this job again.

    Returns:
        What came of it, in words.
    """
    try:
        done = subprocess.run(
            ["scontrol", "requeue", str(job())], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM cannot be asked to start job {job()} again: {error}"
    if done.returncode:
        return f"SLURM does not start job {job()} again: {(done.stderr or done.stdout).strip()}"
    return f"SLURM starts job {job()} again, and it goes on by itself"
