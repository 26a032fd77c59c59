"""``blip-finetune check``."""

from __future__ import annotations

import argparse
import sys

from blip_ft.cli.arguments import add_overrides, overrides
from blip_ft.cli.console import announce, cost_table, show, show_json
from blip_ft.errors import BlipError

#: what `blip-finetune --help` says
HELP = "report on the data of a recipe, labels beside the pretrained model, and predict what fit would take"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="also write the report with its plots as an HTML page")
    parser.add_argument(
        "--no-cost", action="store_true", help="do not time steps to predict time, memory and disk of fit"
    )
    parser.add_argument(
        "--largest",
        action="store_true",
        help="with the cost, find the largest structure that fits into memory",
    )
    parser.add_argument("--strict", action="store_true", help="exit code 2 if fit would refuse the data")


def run(args: argparse.Namespace) -> None:
    """Report on the data of a recipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from blip_ft.config import load_recipe
    from blip_ft.files import check_target

    if args.largest and args.no_cost:
        raise BlipError("--largest is a part of the cost", remedy="leave out --no-cost", field="--largest")
    recipe = load_recipe(args.recipe, overrides(args))
    page = None if args.html is None else check_target(args.html, overwrite=True)
    model = f"{recipe.model.adapter}:{recipe.model.checkpoint}"
    announce(f"loading {model} ...")
    from blip_ft.cli.check_data import check_run
    from blip_ft.report.data_tables import print_report

    console = Console(stderr=True)
    columns = TextColumn("comparing frames with the model"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        checked = check_run(
            recipe,
            lambda done, total: bar.update(task, completed=done, total=total),
            cost=not args.no_cost,
            largest=args.largest,
        )
    report, cost = checked.report, checked.cost
    if page is not None:
        from blip_ft.report import write_data_report

        write_data_report(page, name=recipe.name, model=model, report=report)
        print(f"data report: {page}", file=sys.stderr)
    if args.json:
        tree = {"recipe": recipe.name, "model_name": model, **report.to_json()}
        show_json(tree | {"cost": None if cost is None else cost.to_json()})
    else:
        out = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
        print_report(out, f"{recipe.name}, {model}", report.summary, report.model, report.findings)
        if cost is not None:
            show(cost_table(cost.to_json()))
    errors = [f for f in report.findings if f.severity == "error"]
    if errors and (args.strict or not report.summary):
        where = f"{errors[0].frames[0]}: " if errors[0].frames else ""
        raise BlipError(f"{where}{errors[0].message}", remedy=errors[0].remedy)
