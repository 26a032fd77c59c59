"""``blip-finetune runs``."""

from __future__ import annotations

import argparse
import json

from blip_ft.cli.console import show

#: what `blip-finetune --help` says
HELP = "list the runs in a folder: model, frames, state, figures, time"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument(
        "folder", metavar="DIR", nargs="?", default="runs", help="where recipes write them (runs)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """List the runs in a folder."""
    from blip_ft.report.run_folders import read_runs

    found = read_runs(args.folder)
    if args.json:
        print(json.dumps([run.to_json() for run in found], indent=1))
        return
    if not found:
        print(f"no runs in {args.folder}")
        return
    from blip_ft.report.comparison import runs_table

    show(runs_table(found, f"runs in {args.folder}"))
