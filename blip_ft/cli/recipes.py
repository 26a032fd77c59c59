"""``blip-finetune recipes``."""

from __future__ import annotations

import argparse

from blip_ft.cli.console import new_table, show

#: what `blip-finetune --help` says
HELP = "list the shipped recipes"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments: none."""


def run(args: argparse.Namespace) -> None:
    """List the shipped recipes."""
    del args
    from blip_ft.config import recipe_summary, shipped

    table = new_table("recipe", "model", "about", title="shipped recipes")
    for name, path in shipped().items():
        table.add_row(name, *recipe_summary(path))
    show(table)
    print("A run starts with: blip-finetune fit NAME. Every key: docs/recipes.md")
