"""``blip-finetune predict``."""

from __future__ import annotations

import argparse
import sys

from blip_ft.cli.arguments import add_model, add_prediction
from blip_ft.cli.model import load

#: what `blip-finetune --help` says
HELP = "predict structures with error bars into an extended XYZ file"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(parser)
    parser.add_argument(
        "source",
        metavar="IN",
        help="as for fit: a file, glob, set, each with @selector; labels are not needed",
    )
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the .extxyz file to write")
    add_prediction(parser)


def run(args: argparse.Namespace) -> None:
    """Predict structures into a file."""
    potential = load(args)  # says so before the long imports
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from blip_ft.cli.predict_file import predict_file

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.completed} structures"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        done = predict_file(
            potential,
            args.source,
            args.output,
            batch_size=args.batch_size,
            n_draws=args.draws,
            method=args.method,
            overwrite=args.overwrite,
            progress=lambda n: bar.update(task, completed=n),
        )
    if potential.reference_sets is not None:
        print(potential.reference_sets.describe(), file=sys.stderr)
    print(f"{args.output}: {done} structures")
