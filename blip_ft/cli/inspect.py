"""``blip-finetune inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from blip_ft.cli.arguments import add_overrides, overrides
from blip_ft.cli.console import module_table, show, show_json
from blip_ft.errors import BlipError

if TYPE_CHECKING:
    from blip_ft.backbones.protocol import Backbone
    from blip_ft.variational.convert import ConversionReport


#: what `blip-finetune --help` says
HELP = "list which modules are converted, and which are left and why"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("spec", metavar="SPEC", help="a recipe, a run's folder, or ADAPTER:CHECKPOINT")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """List the modules of a model and what becomes of them."""
    backbone, report = _conversion(args.spec, overrides(args))
    if args.json:
        about = {"adapter": backbone.name, "base": backbone.origin, "counts": report.counts}
        show_json({**about, "modules": report.rows})
        return
    show(module_table(f"{backbone.name}: {backbone.origin.get('checkpoint', '')}", report.rows))
    print("weights: " + ", ".join(f"{n:,} {what}" for what, n in report.counts.items()))


def _conversion(spec: str, changes: list[str]) -> tuple[Backbone, ConversionReport]:
    """Backbone and table of modules of a run, a recipe or a bare model."""
    from blip_ft.backbones.registry import get_adapter
    from blip_ft.config import apply_override, load_recipe, parse_recipe, shipped
    from blip_ft.potential.checkpoint import load_model
    from blip_ft.variational.convert import plan

    if Path(spec).is_dir():
        potential = load_model(spec)
        return potential.backbone, potential.converted.report
    adapter, colon, checkpoint = spec.partition(":")
    if colon and not Path(spec).exists():
        tree = {
            "name": "inspect",
            "data": {"train": "-"},
            "model": {"adapter": adapter, "checkpoint": checkpoint},
        }
        for change in changes:
            apply_override(tree, change)
        model = parse_recipe(tree).model
    elif spec in shipped() or Path(spec).exists():
        model = load_recipe(spec, changes, frames=False).model
    else:
        raise BlipError(
            f"'{spec}' is neither a recipe nor a run nor a model",
            remedy="give a shipped recipe, a YAML file, a run's folder, or a model such as sevennet:7net-0",
        )
    backbone = get_adapter(model.adapter).load(model.checkpoint, trust=model.trust, **model.options)
    return backbone, plan(backbone, train=model.train, noise=model.noise)
