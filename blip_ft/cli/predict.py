"""``blip-finetune predict``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip_ft.cli.arguments import add_model, add_prediction
from blip_ft.cli.console import announce
from blip_ft.cli.model import load

#: an output that is whole but for frames that could not be predicted
EXIT_LEFT_OUT = 3
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
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the finished batches that an earlier call has left beside OUT",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out frames that cannot be predicted, say which, and end with exit code 3",
    )


def run(args: argparse.Namespace) -> int:
    """Predict structures into a file; the exit code is 3 where some were left out."""
    from blip_ft.cli.kept_batches import how_to_go_on
    from blip_ft.system.signals import Interrupts, Stopped

    potential = load(args)  # says so before the long imports
    from blip_ft.cli.predict_file import predict_file
    from blip_ft.cli.predict_progress import shown

    try:
        with Interrupts().handled(), shown() as progress:
            done = predict_file(
                potential,
                args.source,
                args.output,
                batch_size=args.batch_size,
                batch_atoms=args.batch_atoms,
                n_draws=args.draws,
                method=args.method,
                overwrite=args.overwrite,
                resume=args.resume,
                skip_bad=args.skip_bad,
                progress=progress,
            )
    except BaseException as error:
        if isinstance(error, Stopped):
            announce(f"{error}: ended")
        announce(how_to_go_on(Path(args.output)))
        raise
    for place, reason in done.left_out:
        announce(f"left out: {place}: {reason}")
    if potential.reference_sets is not None:
        print(potential.reference_sets.describe(), file=sys.stderr)
    aside = f", {len(done.left_out)} left out" if done.left_out else ""
    print(f"{args.output}: {done.written} structures{aside}")
    return EXIT_LEFT_OUT if done.left_out else 0
