"""``blip-finetune compare``."""

from __future__ import annotations

import argparse
import sys

from blip_ft.cli.console import announce, show_json

#: what `blip-finetune --help` says
HELP = "show metrics and differences of the recipes of two runs side by side"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder")
    parser.add_argument("other_folder", metavar="RUN", help="that of another one")
    parser.add_argument("--html", metavar="FILE", help="also write it as an HTML page")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Metrics and recipes of two runs side by side."""
    from rich.console import Console

    from blip_ft.files import check_target
    from blip_ft.report.compare_runs import compare
    from blip_ft.report.run_folders import finished_run

    page = None if args.html is None else check_target(args.html, overwrite=True)
    comparison = compare(finished_run(args.run_folder), finished_run(args.other_folder))
    from blip_ft.report.comparison import print_comparison, to_json, write_comparison

    if page is not None:
        announce(f"comparison: {write_comparison(page, comparison)}")
    if args.json:
        show_json(to_json(comparison))
        return
    print_comparison(Console(width=None if sys.stdout.isatty() else 240, highlight=False), comparison)
