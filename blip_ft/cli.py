"""The command line, ``blip-finetune``: its arguments, and what becomes of errors.

The commands themselves are in :mod:`blip_ft.commands`. An error that the input caused
(:class:`~blip_ft.errors.BlipError`, a backend that is not installed) is one message on standard error
and exit code 2; anything else is a defect and keeps its trace-back.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from blip_ft import commands
from blip_ft.errors import BlipError
from blip_ft.signals import Terminated

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
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
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if more:  # argparse takes one run of KEY=VALUE only: these stand behind an option such as --trust
        if "overrides" not in args or any(text.startswith("-") for text in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        args.overrides += more
    try:
        code = args.run(args)
        sys.stdout.flush()
    except Terminated:
        _complain("terminated")
        return EXIT_TERMINATED
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip-finetune",
        description="Turn a pretrained interatomic potential into a Bayesian one and fine-tune it on few frames.",
        epilog="Start with: blip-finetune fit sio2_sevennet name=demo",
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str
    ) -> argparse.ArgumentParser:
        sub = group.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=run)
        return sub

    fit = command("fit", commands.fit, "fine-tune by a recipe and write the run's folder")
    fit.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    _add_overrides(fit)

    check = command(
        "check",
        commands.check,
        "report on the data of a recipe, labels beside the pretrained model, and predict what fit would take",
    )
    check.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    _add_overrides(check)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--html", metavar="FILE", help="also write the report with its plots as an HTML page")
    check.add_argument(
        "--no-cost", action="store_true", help="do not time steps to predict time, memory and disk of fit"
    )
    check.add_argument("--strict", action="store_true", help="exit code 2 if fit would refuse the data")

    evaluate = command("evaluate", commands.evaluate, "compare a trained model with labelled structures")
    _add_model(evaluate)
    evaluate.add_argument(
        "source", metavar="IN", help="labelled structures: a file, glob, hub id or data set name"
    )
    evaluate.add_argument("-o", "--output", metavar="FILE", help="also write the metrics as JSON")
    _add_prediction(evaluate)

    predict = command(
        "predict", commands.predict, "predict structures with error bars into an extended XYZ file"
    )
    _add_model(predict)
    predict.add_argument(
        "source",
        metavar="IN",
        help="as for fit: a file, glob, set, each with @selector; labels are not needed",
    )
    predict.add_argument("-o", "--output", metavar="OUT", required=True, help="the .extxyz file to write")
    _add_prediction(predict)
    predict.add_argument(
        "--resume",
        action="store_true",
        help="go on from the finished batches that an earlier call has left beside OUT",
    )
    predict.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out frames that cannot be predicted, say which, and end with exit code 3",
    )

    inspect = command(
        "inspect", commands.inspect, "list which modules are converted, and which are left and why"
    )
    inspect.add_argument("spec", metavar="SPEC", help="a recipe, a run's folder, or ADAPTER:CHECKPOINT")
    _add_overrides(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")

    doctor = command(
        "doctor", commands.doctor, "show which backends this environment has, and how to get the others"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")

    command("recipes", commands.recipes, "list the shipped recipes")

    export = command(
        "export", commands.export, "write the mean and draws as files that the vendor's programs open"
    )
    _add_model(export)
    export.add_argument(
        "--to", choices=("native",), default="native", help="the vendor's own format (native)"
    )
    export.add_argument(
        "--draws", type=_draws, default=0, metavar="K", help="also K posterior draws, at least 2 (0)"
    )
    export.add_argument(
        "--amplitude",
        type=_amplitude,
        metavar="A",
        help="width of the draws, 1 for the posterior's own (by default the width that predict draws at)",
    )
    export.add_argument(
        "--references",
        choices=("file", "beside"),
        default="file",
        help="energy references in the files, or beside them in export.json alone, where float32 would lose their "
        "digits (file)",
    )
    export.add_argument("-o", "--output", metavar="DIR", help="new folder (RUN/export-native)")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")

    data = group.add_parser("data", help="convert data sets", description="Work on data sets.")
    _add_data(data)

    report = command("report", commands.report, "write the report of a run again")
    report.add_argument("run_folder", metavar="RUN", help="a run's folder")

    runs = command("runs", commands.runs, "list the runs in a folder: model, frames, state, figures, time")
    runs.add_argument(
        "folder", metavar="DIR", nargs="?", default="runs", help="where recipes write them (runs)"
    )
    runs.add_argument("--json", action="store_true", help="print JSON")

    compare = command(
        "compare", commands.compare, "show metrics and differences of the recipes of two runs side by side"
    )
    compare.add_argument("run_folder", metavar="RUN", help="a run's folder")
    compare.add_argument("other_folder", metavar="RUN", help="that of another one")
    compare.add_argument("--html", metavar="FILE", help="also write it as an HTML page")
    compare.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_data(data: argparse.ArgumentParser) -> None:
    """Subcommands of ``blip-finetune data``."""
    group = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "write a source in another format, in eV and Å"
    convert = group.add_parser("convert", help=text, description=f"{text[0].upper()}{text[1:]}.")
    convert.set_defaults(run=commands.data_convert)
    convert.add_argument("source", metavar="IN", help="a file, folder, glob, hub id or data set name")
    convert.add_argument(
        "target",
        metavar="OUT",
        help=".extxyz .xyz (also .gz) .traj .db .aselmdb .parquet .json .jsonl .npz; a name without an ending "
        "is a folder as on the Hugging Face hub, with a data card",
    )
    convert.add_argument("--split", metavar="NAME", help="only this split of the source")
    convert.add_argument("--field", metavar="LABEL=NAME", action="append", default=[], help="as data.fields")
    convert.add_argument("--unit", metavar="LABEL=UNIT", action="append", default=[], help="as data.units")
    convert.add_argument("--stress-order", choices=("ase", "vasp"), help="of six stress components in IN")
    convert.add_argument("--config", metavar="NAME", help="configuration of a hub set")
    convert.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub set")
    convert.add_argument("--unlabelled", action="store_true", help="accept frames without energy and forces")
    convert.add_argument("--license", metavar="ID", help="for the data card: cc-by-4.0, cc0-1.0, mit, ...")
    convert.add_argument("--about", metavar="TEXT", help="for the data card: origin and level of theory")
    convert.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, or a model folder")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="open a pickled model file that is not a published release; it can run code",
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="replace a value of the recipe: trainer.max_epochs=5",
    )


def _add_prediction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=_count, default=16, metavar="N", help="structures per call, at most (16)"
    )
    parser.add_argument(
        "--batch-atoms",
        type=_count,
        metavar="N",
        help="atoms per call, at most; a larger structure comes alone (2048 on a GPU; on a CPU 64 per thread, at least 128)",
    )
    parser.add_argument(
        "--method",
        choices=("draws", "energy", "linear"),
        default="draws",
        help="error bars from posterior draws; from the gradient that gives the forces, of energies alone; or exact "
        "ones of the linearised model (draws)",
    )
    parser.add_argument(
        "--draws",
        type=_draws,
        metavar="K",
        help="posterior draws, 0 for none and no error bars; with --method linear random directions (draws: those "
        "of the recipe; linear: all)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (cpu)")
    # Error bars are small differences of large numbers: in float32 they lose their invariance.
    parser.add_argument("--dtype", default="float64", choices=("float32", "float64"), help="(float64)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not '{text}'")
    return int(text)


def _draws(text: str) -> int:
    if not text.isdecimal() or int(text) == 1:
        raise argparse.ArgumentTypeError(f"0, or at least 2 since one draw has no spread, not '{text}'")
    return int(text)


def _amplitude(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and up to 1, not '{text}'")
    return value


class _Version(argparse.Action):
    """``--version``, read from the installed metadata only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit."""
        import blip_ft

        print(f"{parser.prog} {blip_ft.__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
