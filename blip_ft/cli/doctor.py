"""``blip-finetune doctor``."""

from __future__ import annotations

import argparse

from blip_ft.cli.console import show, show_json

#: what `blip-finetune --help` says
HELP = "show which backends this environment has, and how to get the others"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Show the backends of this environment."""
    from blip_ft.cli.environment import examine, render

    report = examine()
    if args.json:
        show_json(report)
    else:
        show(render(report))
