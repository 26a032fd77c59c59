"""The command line, ``blip-finetune``: its arguments, and what becomes of errors.

Each command is a file here: its line of help (``HELP``), its arguments (``add``), and what it does (``run``,
which returns an exit code other than 0, or nothing). It imports what it needs when it runs, so that ``--help`` is
instant. An error that the input caused (:class:`~blip_ft.errors.BlipError`, a backend that is not installed) is one
message on standard error and exit code 2; anything else is a defect and keeps its trace-back.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from blip_ft.cli import (
    check,
    compare,
    data,
    doctor,
    evaluate,
    export,
    fit,
    inspect,
    lammps,
    md,
    predict,
    recipes,
    report,
    resume,
    runs,
    select,
    verify,
)
from blip_ft.errors import BlipError
from blip_ft.system.signals import Stopped

#: in the order of the help
COMMANDS: tuple[Any, ...] = (
    fit,
    resume,
    check,
    evaluate,
    predict,
    lammps,
    md,
    verify,
    select,
    inspect,
    doctor,
    recipes,
    export,
    data,
    report,
    runs,
    compare,
)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
#: failures of the machine rather than of the program: full disk, quota, no permission
_USERS_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0, 2 after an error that the user can mend, 3 if frames were left out, 130 after an interrupt,
        143 where the program was told to end.
    """
    parser = make_parser()
    args, more = parser.parse_known_args(argv)
    if more:  # argparse takes one run of KEY=VALUE only: these stand behind an option such as --trust
        if "overrides" not in args or any(text.startswith("-") for text in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        args.overrides += more
    try:
        code = args.run(args)
        sys.stdout.flush()
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`); the interpreter must not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BlipError, ImportError, OSError) as error:
        if not _is_users(error):
            raise
        _complain(str(error))
        return EXIT_USER_ERROR
    return code or 0


def _is_users(error: Exception) -> bool:
    """True for an error that the user can mend."""
    if isinstance(error, OSError):
        return error.errno in _USERS_ERRNO
    return isinstance(error, BlipError)


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with suppress(OSError):  # nobody may be reading
        console.print(f"[bold red]error:[/] {escape(message)}")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="blip-finetune",
        description="Turn a pretrained interatomic potential into a Bayesian one and fine-tune it on few frames.",
        epilog="Start with: blip-finetune fit sio2_sevennet name=demo",
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        text: str = command.HELP
        sub = group.add_parser(
            command.__name__.rpartition(".")[2], help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        sub.set_defaults(run=command.run)
        command.add(sub)
    return parser


class _Version(argparse.Action):
    """``--version``, read from the installed metadata only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit."""
        from blip_ft.version import __version__

        print(f"{parser.prog} {__version__}")
        parser.exit()
