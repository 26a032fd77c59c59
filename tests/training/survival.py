"""Runs that are killed and resumed, each start in a process of its own; a program that test_resume.py calls.

    python survival.py SPEC.json

A fresh interpreter imports everything once and forks a child for every start, so that a start costs no imports and
SIGKILL is real. The child kills itself at a given call of a function of the package: the n-th start of a chain at the
n-th call, until the run is whole or has been killed often enough. Prints JSON: for every chain the signals and
exit codes of its starts.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blip_ft.cli import main
from blip_ft.report import html
from blip_ft.training import loop, pieces  # noqa: F401 imported before the forks

#: starts of one chain at most
STARTS = 40


def kill_at(hook: str, number: int) -> None:
    """Let this process end by SIGKILL at the n-th call of ``module:Class.function``, or after it (``... after``)."""
    path, _, when = hook.partition(" ")
    module, _, name = path.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, last = name.split(".")
    for part in owners:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, last)
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        out = original(*args, **kwargs)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    setattr(owner, last, counted)


def start(arguments: list[str], hook: str | None, number: int, log: Path, share: float) -> int:
    """One start in a child; its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            torch.set_num_threads(1)
            html.to_svg = lambda figure, title: "<svg></svg>"  # what takes longest, and is tested elsewhere
            pieces.SHARE = share
            if hook is not None:
                kill_at(hook, number)
            code = main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def chain(spec: dict[str, Any], folder: Path) -> list[int]:
    """A run that is killed up to ``kills`` times, and resumed until it is whole."""
    run = folder / "runs" / spec["name"]
    codes: list[int] = []
    kills = 0
    while len(codes) < STARTS:
        begun = (run / "run.json").exists() or Path(f"{run}.new").exists()
        arguments = (
            ["resume", str(run)] if begun else ["fit", str(folder / "recipe.yaml"), f"name={spec['name']}"]
        )
        if not begun:
            arguments += spec.get("overrides", [])
        hook = spec.get("hook") if kills < spec.get("kills", 0) else None
        log = folder / f"{spec['name']}.log"
        number = spec.get("first", 1) + kills * spec.get("step", 1)
        code = start(arguments, hook, number, log, spec.get("share", float("inf")))
        codes.append(code)
        if code >= 0:
            return codes
        kills += 1
    return codes


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    place = Path(sys.argv[1]).parent
    print(json.dumps({one["name"]: chain(one, place) for one in given}))
