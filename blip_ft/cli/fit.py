"""``blip-finetune fit``."""

from __future__ import annotations

import argparse

from blip_ft.cli.arguments import add_overrides, overrides
from blip_ft.cli.console import announce

#: what `blip-finetune --help` says
HELP = "fine-tune by a recipe and write the run's folder"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Fine-tune by a recipe."""
    from blip_ft.config import load_recipe
    from blip_ft.config.loggers import require_loggers

    recipe = load_recipe(args.recipe, overrides(args))  # a wrong key is told before the long imports
    require_loggers(recipe.trainer.get("logger"))
    announce(f"loading {recipe.model.adapter}:{recipe.model.checkpoint} ...")
    from blip_ft.training.fit import fit as run

    run(recipe)
