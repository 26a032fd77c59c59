"""The commands of ``blip-finetune``: each takes the parsed arguments, prints, and returns an exit code other than 0 or nothing.

They import what they need when they run, so that ``--help`` is instant. What the input caused is a
:class:`~blip_ft.errors.BlipError`; :mod:`blip_ft.cli` makes messages and exit codes of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blip_ft.console import announce, cost_table, metrics_table, module_table, new_table, show, show_json
from blip_ft.errors import BlipError

#: an output that is whole but for frames that could not be predicted
EXIT_LEFT_OUT = 3

if TYPE_CHECKING:
    from blip_ft.backbone import Backbone
    from blip_ft.data.findings import Finding
    from blip_ft.potential import BayesianPotential
    from blip_ft.variational.convert import ConversionReport


def fit(args: argparse.Namespace) -> None:
    """Fine-tune by a recipe."""
    from blip_ft.config import load_recipe
    from blip_ft.config.loggers import require_loggers

    recipe = load_recipe(args.recipe, _overrides(args))  # a wrong key is told before the long imports
    require_loggers(recipe.trainer.get("logger"))
    announce(f"loading {recipe.model.adapter}:{recipe.model.checkpoint} ...")
    from blip_ft.training.fit import fit as run

    run(recipe)


def _overrides(args: argparse.Namespace) -> list[str]:
    """The ``KEY=VALUE`` arguments, with what ``--trust`` stands for."""
    return [*args.overrides, "model.trust=true"] if args.trust else list(args.overrides)


def check(args: argparse.Namespace) -> None:
    """Report on the data of a recipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from blip_ft.config import load_recipe
    from blip_ft.files import check_target

    recipe = load_recipe(args.recipe, _overrides(args))
    page = None if args.html is None else check_target(args.html, overwrite=True)
    model = f"{recipe.model.adapter}:{recipe.model.checkpoint}"
    announce(f"loading {model} ...")
    from blip_ft.check_data import check_run
    from blip_ft.report.data_tables import print_report

    console = Console(stderr=True)
    columns = TextColumn("comparing frames with the model"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        checked = check_run(
            recipe,
            lambda done, total: bar.update(task, completed=done, total=total),
            cost=not args.no_cost,
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


def evaluate(args: argparse.Namespace) -> None:
    """Compare a model with labelled structures."""
    from blip_ft.files import check_target, whole_file

    output = None if args.output is None else check_target(args.output, overwrite=args.overwrite)
    potential = _load(args)
    from blip_ft.data import FrameDataset, load_source
    from blip_ft.data.set_aside import SetAside
    from blip_ft.data.unused import unmatched_labels
    from blip_ft.uncertainty.metrics import set_metrics
    from blip_ft.uncertainty.predict import predict_set

    aside = SetAside()
    rows = aside.examples(load_source(args.source))
    _say(aside.places, unmatched_labels({args.source: rows}))
    frames = FrameDataset(rows, potential.backbone)
    prediction = predict_set(
        potential,
        frames,
        args.source,
        batch_size=args.batch_size,
        batch_atoms=args.batch_atoms,
        n_draws=args.draws,
        method=args.method,
    )
    metrics = set_metrics(prediction, potential.calibration)
    if output is not None:
        with whole_file(output, overwrite=args.overwrite) as file:
            json.dump(metrics, file, indent=1)
    show(metrics_table(args.source, metrics))


def predict(args: argparse.Namespace) -> int:
    """Predict structures into a file; the exit code is 3 where some were left out."""
    from blip_ft.kept_batches import how_to_go_on
    from blip_ft.signals import terminable

    potential = _load(args)  # says so before the long imports
    from blip_ft.predict_file import predict_file
    from blip_ft.predict_progress import shown

    try:
        with terminable(), shown() as progress:
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
    except BaseException:
        announce(how_to_go_on(Path(args.output)))
        raise
    for place, reason in done.left_out:
        announce(f"left out: {place}: {reason}")
    aside = f", {len(done.left_out)} left out" if done.left_out else ""
    print(f"{args.output}: {done.written} structures{aside}")
    return EXIT_LEFT_OUT if done.left_out else 0


def _load(args: argparse.Namespace) -> BayesianPotential:
    """The model of ``evaluate`` and ``predict``, on the device that was asked for."""
    announce(f"loading {args.model} ...")
    import torch

    from blip_ft.checkpoint import load_model

    try:
        torch.empty(0, device=args.device, dtype=getattr(torch, args.dtype))
    except (RuntimeError, AssertionError, TypeError) as error:  # as builds of torch differ
        raise BlipError(
            f"torch cannot use {args.dtype} on the device '{args.device}': {str(error).partition(chr(10))[0]}",
            remedy="blip-finetune doctor shows the device of this machine; mps needs --dtype float32",
        ) from error
    return load_model(args.model, device=args.device, dtype=args.dtype)


def inspect(args: argparse.Namespace) -> None:
    """List the modules of a model and what becomes of them."""
    backbone, report = _conversion(args.spec, _overrides(args))
    if args.json:
        about = {"adapter": backbone.name, "base": backbone.origin, "counts": report.counts}
        show_json({**about, "modules": report.rows})
        return
    show(module_table(f"{backbone.name}: {backbone.origin.get('checkpoint', '')}", report.rows))
    print("weights: " + ", ".join(f"{n:,} {what}" for what, n in report.counts.items()))


def _conversion(spec: str, overrides: list[str]) -> tuple[Backbone, ConversionReport]:
    """Backbone and table of modules of a run, a recipe or a bare model."""
    from blip_ft.backbone import get_adapter
    from blip_ft.checkpoint import load_model
    from blip_ft.config import apply_override, load_recipe, parse_recipe, shipped
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
        for override in overrides:
            apply_override(tree, override)
        model = parse_recipe(tree).model
    elif spec in shipped() or Path(spec).exists():
        model = load_recipe(spec, overrides).model
    else:
        raise BlipError(
            f"'{spec}' is neither a recipe nor a run nor a model",
            remedy="give a shipped recipe, a YAML file, a run's folder, or a model such as sevennet:7net-0",
        )
    backbone = get_adapter(model.adapter).load(model.checkpoint, trust=model.trust, **model.options)
    return backbone, plan(backbone, train=model.train, noise=model.noise)


def doctor(args: argparse.Namespace) -> None:
    """Show the backends of this environment."""
    from blip_ft.doctor import examine, render

    report = examine()
    if args.json:
        show_json(report)
    else:
        show(render(report))


def recipes(args: argparse.Namespace) -> None:
    """List the shipped recipes."""
    del args
    from blip_ft.config import recipe_summary, shipped

    table = new_table("recipe", "model", "about", title="shipped recipes")
    for name, path in shipped().items():
        table.add_row(name, *recipe_summary(path))
    show(table)
    print("A run starts with: blip-finetune fit NAME. Every key: docs/recipes.md")


def export(args: argparse.Namespace) -> None:
    """Write a model in the vendor's format."""
    from blip_ft.checkpoint import find_model, load_model
    from blip_ft.export import META, export_native

    folder = Path(args.output) if args.output else find_model(args.model).parent / f"export-{args.to}"
    potential = load_model(args.model)
    done = export_native(
        potential,
        folder,
        draws=args.draws,
        amplitude=args.amplitude,
        references=args.references == "file",
        overwrite=args.overwrite,
        progress=lambda name: print(
            f"{name} written, read back by the vendor's loader and compared", file=sys.stderr
        ),
    )
    columns = "eV/atom", "eV/Å", "as used: eV/atom", "eV/Å"
    table = new_table("file", *columns, title=f"{folder}: largest differences from the trained model")
    for item in done:
        table.add_row(
            item.file,
            f"{item.energy_ev_per_atom:.1e}",
            f"{item.forces_ev_per_ang:.1e}",
            f"{item.energy_as_used_ev_per_atom:.1e}",
            f"{item.forces_as_used_ev_per_ang:.1e}",
        )
    show(table)
    for note in json.loads((folder / META).read_text(encoding="utf-8"))["notes"]:
        print(note)
    if args.references == "beside" and potential.references:
        print("Energies of the files are without references: add those of export.json, atom by atom.")
    width = potential.amplitude if args.amplitude is None else args.amplitude
    if args.draws and width != 1:
        print(
            f"The draws have {width:.3g} of the posterior's width, where the model is linear in its weights: "
            f"multiply the spread of their outputs by {1 / width:.3g} (export.json)."
        )


def report(args: argparse.Namespace) -> None:
    """Write the report of a run again."""
    from blip_ft.rewrite_report import rewrite_report

    print(rewrite_report(args.run_folder))


def runs(args: argparse.Namespace) -> None:
    """List the runs in a folder."""
    from blip_ft.run_folders import read_runs

    found = read_runs(args.folder)
    if args.json:
        print(json.dumps([run.to_json() for run in found], indent=1))
        return
    if not found:
        print(f"no runs in {args.folder}")
        return
    from blip_ft.report.comparison import runs_table

    show(runs_table(found, f"runs in {args.folder}"))


def compare(args: argparse.Namespace) -> None:
    """Metrics and recipes of two runs side by side."""
    from rich.console import Console

    from blip_ft.compare_runs import compare as compared
    from blip_ft.files import check_target
    from blip_ft.run_folders import finished_run

    page = None if args.html is None else check_target(args.html, overwrite=True)
    comparison = compared(finished_run(args.run_folder), finished_run(args.other_folder))
    from blip_ft.report.comparison import print_comparison, to_json, write_comparison

    if page is not None:
        announce(f"comparison: {write_comparison(page, comparison)}")
    if args.json:
        show_json(to_json(comparison))
        return
    print_comparison(Console(width=None if sys.stdout.isatty() else 240, highlight=False), comparison)


def data_convert(args: argparse.Namespace) -> None:
    """Write a source in another format."""
    from pydantic import ValidationError

    from blip_ft.config import SourceConfig
    from blip_ft.config.loading import problems_of
    from blip_ft.data.card import Card
    from blip_ft.data.convert import convert
    from blip_ft.data.set_aside import SetAside
    from blip_ft.data.sources import load_source, mappings
    from blip_ft.data.unused import unmatched_labels
    from blip_ft.files import check_target

    check_target(args.target, overwrite=args.overwrite)  # told before anything is read
    given = {
        "path": args.source,
        "config": args.config,
        "revision": args.revision,
        "split": args.split,
        "fields": _pairs(args.field),
        "units": _pairs(args.unit),
        "stress_order": args.stress_order,
    }
    tree = {k: v for k, v in given.items() if v}
    try:
        source = SourceConfig.model_validate(tree)
    except ValidationError as error:
        raise BlipError(
            "; ".join(problems_of(error, tree, SourceConfig).values()),
            remedy="see blip-finetune data convert --help",
        ) from error
    aside = SetAside()
    frames = aside.converged(load_source(source, labels=not args.unlabelled))
    _say(aside.places, [] if args.unlabelled else unmatched_labels({args.source: frames}, use_stress=True))
    for line in mappings(frames):
        print(f"labels of {line}")
    card = Card(Path(args.target).name, args.license or "", args.about or "")
    print(f"{convert(frames, args.target, overwrite=args.overwrite, card=card)}: {len(frames)} frames")


def _say(left_out: Sequence[str], findings: Sequence[Finding]) -> None:
    """Tell which frames were set aside, and which numbers nothing uses."""
    for place in left_out:
        print(f"left out: {place}", file=sys.stderr)
    for finding in findings:
        print(finding, file=sys.stderr)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    """``{"energy": "E"}`` of ``["energy=E"]``."""
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise BlipError(
                f"cannot read '{text}'", remedy="write QUANTITY=VALUE, for instance energy=kcal/mol"
            )
        pairs[key] = value
    return pairs
