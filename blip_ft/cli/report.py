"""``blip-finetune report``."""

from __future__ import annotations

import argparse

#: what `blip-finetune --help` says
HELP = "write the report of a run again"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder")


def run(args: argparse.Namespace) -> None:
    """Write the report of a run again."""
    from blip_ft.cli.rewrite_report import rewrite_report

    print(rewrite_report(args.run_folder))
