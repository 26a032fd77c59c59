"""``blip-finetune resume``."""

from __future__ import annotations

import argparse
from pathlib import Path

from blip_ft.cli.arguments import add_overrides
from blip_ft.cli.console import announce

#: what `blip-finetune --help` says
HELP = "go on with a run that was ended, from what is kept of it"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder")
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Go on with a run."""
    announce(f"going on with {args.run_folder} ...")
    from blip_ft.training.fit import resume

    resume(Path(args.run_folder), trust=args.trust, changes=args.overrides)
