"""The command line, ``blip-finetune``.

Commands import what they need when they run, so that ``--help`` is instant. An error that the
input caused (:class:`~blip_ft.errors.BlipError`, a backend that is not installed) is one message
on standard error and exit code 2; anything else is a defect and keeps its trace-back.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_ft.errors import BlipError

if TYPE_CHECKING:
    from rich.table import Table

    from blip_ft.backbone import Backbone
    from blip_ft.potential import BayesianPotential
    from blip_ft.variational.convert import ConversionReport

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
#: failures of the machine rather than of the program: full disk, quota, no permission
_USERS_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        The exit code: 0, 2 after an error that the user can mend, 130 after an interrupt.
    """
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if more:  # argparse takes one run of KEY=VALUE only: these stand behind an option such as --trust
        if "overrides" not in args or any(text.startswith("-") for text in more):
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        args.overrides += more
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`| head`); the interpreter must not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BlipError, ImportError, OSError) as error:
        if not _is_users(error):
            raise
        _complain(str(error))
        return EXIT_USER_ERROR
    return 0


def _is_users(error: Exception) -> bool:
    """True for an error that the user can mend."""
    if isinstance(error, OSError):
        return error.errno in _USERS_ERRNO
    return isinstance(error, BlipError)


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] {escape(message)}")


# ---- commands --------------------------------------------------------------------------------


def _fit(args: argparse.Namespace) -> None:
    from blip_ft.config import load_recipe

    recipe = load_recipe(args.recipe, _overrides(args))  # a wrong key is told before the long imports
    from blip_ft.training.fit import fit

    fit(recipe)


def _check(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from blip_ft.config import load_recipe
    from blip_ft.files import check_target

    recipe = load_recipe(args.recipe, _overrides(args))
    page = None if args.html is None else check_target(args.html, overwrite=True)
    from blip_ft.check_data import check_data
    from blip_ft.report.data_tables import print_report

    console = Console(stderr=True)
    columns = TextColumn("comparing frames with the model"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        report = check_data(recipe, lambda done, total: bar.update(task, completed=done, total=total))
    model = f"{recipe.model.adapter}:{recipe.model.checkpoint}"
    if page is not None:
        from blip_ft.report import write_data_report

        write_data_report(page, name=recipe.name, model=model, report=report)
        print(f"data report: {page}", file=sys.stderr)
    if args.json:
        _show_json({"recipe": recipe.name, "model_name": model, **report.to_json()})
    else:
        out = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
        print_report(out, f"{recipe.name}, {model}", report.summary, report.model, report.findings)
    errors = [f for f in report.findings if f.severity == "error"]
    if errors and (args.strict or not report.summary):
        where = f"{errors[0].frames[0]}: " if errors[0].frames else ""
        raise BlipError(f"{where}{errors[0].message}", remedy=errors[0].remedy)


def _evaluate(args: argparse.Namespace) -> None:
    from blip_ft.data import FrameDataset, load_source
    from blip_ft.files import check_target, whole_file
    from blip_ft.uncertainty.metrics import set_metrics
    from blip_ft.uncertainty.predict import predict_set

    output = None if args.output is None else check_target(args.output, overwrite=args.overwrite)
    potential = _load(args)
    frames = FrameDataset(load_source(args.source), potential.backbone)
    prediction = predict_set(potential, frames, args.source, batch_size=args.batch_size)
    metrics = set_metrics(prediction, potential.calibration)
    if output is not None:
        with whole_file(output) as file:
            json.dump(metrics, file, indent=1)
    _show(_metrics_table(args.source, metrics))


def _predict(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from blip_ft.predict_file import predict_file

    potential = _load(args)
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.completed} structures"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        done = predict_file(
            potential,
            args.source,
            args.output,
            batch_size=args.batch_size,
            overwrite=args.overwrite,
            progress=lambda n: bar.update(task, completed=n),
        )
    print(f"{args.output}: {done} structures")


def _load(args: argparse.Namespace) -> BayesianPotential:
    """The model of ``evaluate`` and ``predict``, on the device that was asked for."""
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


def _inspect(args: argparse.Namespace) -> None:
    backbone, report = _conversion(args.spec, _overrides(args))
    if args.json:
        about = {"adapter": backbone.name, "base": backbone.origin, "counts": report.counts}
        _show_json({**about, "modules": report.rows})
        return
    _show(_module_table(f"{backbone.name}: {backbone.origin.get('checkpoint', '')}", report.rows))
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


def _doctor(args: argparse.Namespace) -> None:
    from blip_ft import doctor

    report = doctor.examine()
    if args.json:
        _show_json(report)
    else:
        _show(doctor.render(report))


def _recipes(args: argparse.Namespace) -> None:
    del args
    from blip_ft.config import recipe_summary, shipped

    table = _table("recipe", "model", "about", title="shipped recipes")
    for name, path in shipped().items():
        table.add_row(name, *recipe_summary(path))
    _show(table)
    print("A run starts with: blip-finetune fit NAME. Every key: docs/recipes.md")


def _export(args: argparse.Namespace) -> None:
    from blip_ft.checkpoint import find_model, load_model
    from blip_ft.export import export_native

    folder = Path(args.output) if args.output else find_model(args.model).parent / f"export-{args.to}"
    potential = load_model(args.model)
    done = export_native(
        potential,
        folder,
        draws=args.draws,
        amplitude=args.amplitude,
        overwrite=args.overwrite,
        progress=lambda name: print(
            f"{name} written, read back by the vendor's loader, equal", file=sys.stderr
        ),
    )
    table = _table("file", "eV/atom", "eV/Å", title=f"{folder}: largest differences from the trained model")
    for item in done:
        table.add_row(item.file, f"{item.energy_ev_per_atom:.1e}", f"{item.forces_ev_per_ang:.1e}")
    _show(table)
    width = potential.amplitude if args.amplitude is None else args.amplitude
    if args.draws and width != 1:
        print(
            f"The draws have {width:.3g} of the posterior's width, where the model is linear in its weights: "
            f"multiply the spread of their outputs by {1 / width:.3g} (export.json)."
        )


def _report(args: argparse.Namespace) -> None:
    from blip_ft.rewrite_report import rewrite_report

    print(rewrite_report(args.run_folder))


def _data_convert(args: argparse.Namespace) -> None:
    from blip_ft.config import SourceConfig
    from blip_ft.data.card import Card
    from blip_ft.data.convert import convert
    from blip_ft.data.sources import load_source, mappings
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
    try:
        source = SourceConfig.model_validate({k: v for k, v in given.items() if v})
    except ValueError as error:
        raise BlipError(
            f"bad options: {error}".splitlines()[0], remedy="see blip-finetune data convert --help"
        ) from error
    frames = load_source(source, labels=not args.unlabelled)
    for line in mappings(frames):
        print(f"labels of {line}")
    card = Card(Path(args.target).name, args.license or "", args.about or "")
    print(f"{convert(frames, args.target, overwrite=args.overwrite, card=card)}: {len(frames)} frames")


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


# ---- output ----------------------------------------------------------------------------------


def _table(*columns: str, title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _module_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("module", "type", "weights", "what happens", title=title)
    for row in rows:
        if row["action"] == "converted":
            roles = [word for word, on in (("trained", row["trained"]), ("noisy", row["noisy"])) if on]
            what = ", ".join(["converted", *roles])
        else:
            what = "left, trained" if row["trained"] else "left"
        shape = " x ".join(str(n) for n in row["shape"])
        note = f"{what}: {row['reason']}" if row["reason"] else what
        table.add_row(row["name"], row["type"], shape, note)
    return table


def _metrics_table(title: str, metrics: Mapping[str, Any]) -> Table:
    table = _table("metric", "value", title=title)
    for key, value in metrics.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def _show(table: Table) -> None:
    """Print a table; one line per row where the output is a file or a pipe."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 240).print(table)


def _show_json(tree: Mapping[str, Any]) -> None:
    print(json.dumps(tree, indent=1))


# ---- arguments -------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip-finetune",
        description="Turn a pretrained interatomic potential into a Bayesian one and fine-tune it on few frames.",
        epilog="Start with: blip-finetune fit sio2_sevennet name=demo",
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=run)
        return sub

    fit = command("fit", _fit, "fine-tune by a recipe and write the run's folder")
    fit.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    _add_overrides(fit)

    check = command("check", _check, "report on the data of a recipe, labels beside the pretrained model")
    check.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    _add_overrides(check)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--html", metavar="FILE", help="also write the report with its plots as an HTML page")
    check.add_argument("--strict", action="store_true", help="exit code 2 if fit would refuse the data")

    evaluate = command("evaluate", _evaluate, "compare a trained model with labelled structures")
    _add_model(evaluate)
    evaluate.add_argument(
        "source", metavar="IN", help="labelled structures: a file, glob, hub id or data set name"
    )
    evaluate.add_argument("-o", "--output", metavar="FILE", help="also write the metrics as JSON")
    _add_prediction(evaluate)

    predict = command("predict", _predict, "predict structures with error bars into an extended XYZ file")
    _add_model(predict)
    predict.add_argument("source", metavar="IN", help="a file that ASE reads; labels are not needed")
    predict.add_argument("-o", "--output", metavar="OUT", required=True, help="the .extxyz file to write")
    _add_prediction(predict)

    inspect = command("inspect", _inspect, "list which modules are converted, and which are left and why")
    inspect.add_argument("spec", metavar="SPEC", help="a recipe, a run's folder, or ADAPTER:CHECKPOINT")
    _add_overrides(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")

    doctor = command("doctor", _doctor, "show which backends this environment has, and how to get the others")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    command("recipes", _recipes, "list the shipped recipes")

    export = command("export", _export, "write the mean and draws as files that the vendor's programs open")
    _add_model(export)
    export.add_argument(
        "--to", choices=("native",), default="native", help="the vendor's own format (native)"
    )
    export.add_argument(
        "--draws", type=_draws, default=0, metavar="K", help="also K posterior draws, at least 2 (0)"
    )
    export.add_argument(
        "--amplitude",
        type=_amplitude,
        metavar="A",
        help="width of the draws, 1 for the posterior's own (by default the width that predict draws at)",
    )
    export.add_argument("-o", "--output", metavar="DIR", help="new folder (RUN/export-native)")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")

    data = commands.add_parser("data", help="convert data sets", description="Work on data sets.")
    _add_data(data)

    report = command("report", _report, "write the report of a run again")
    report.add_argument("run_folder", metavar="RUN", help="a run's folder")
    return parser


def _add_data(data: argparse.ArgumentParser) -> None:
    """Subcommands of ``blip-finetune data``."""
    commands = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "write a source in another format, in eV and Å"
    convert = commands.add_parser("convert", help=text, description=f"{text[0].upper()}{text[1:]}.")
    convert.set_defaults(run=_data_convert)
    convert.add_argument("source", metavar="IN", help="a file, folder, glob, hub id or data set name")
    convert.add_argument(
        "target",
        metavar="OUT",
        help=".extxyz .xyz (also .gz) .traj .db .aselmdb .parquet .json .jsonl .npz; a name without an ending "
        "is a folder as on the Hugging Face hub, with a data card",
    )
    convert.add_argument("--split", metavar="NAME", help="only this split of the source")
    convert.add_argument("--field", metavar="LABEL=NAME", action="append", default=[], help="as data.fields")
    convert.add_argument("--unit", metavar="LABEL=UNIT", action="append", default=[], help="as data.units")
    convert.add_argument("--stress-order", choices=("ase", "vasp"), help="of six stress components in IN")
    convert.add_argument("--config", metavar="NAME", help="configuration of a hub set")
    convert.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub set")
    convert.add_argument("--unlabelled", action="store_true", help="accept frames without energy and forces")
    convert.add_argument("--license", metavar="ID", help="for the data card: cc-by-4.0, cc0-1.0, mit, ...")
    convert.add_argument("--about", metavar="TEXT", help="for the data card: origin and level of theory")
    convert.add_argument("--overwrite", action="store_true", help="replace an existing OUT")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, or a model folder")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="open a pickled model file that is not a published release; it can run code",
    )
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="replace a value of the recipe: trainer.max_epochs=5",
    )


def _add_prediction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=_count, default=16, metavar="N", help="structures per call (16)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (cpu)")
    # Error bars are small differences of large numbers: in float32 they lose their invariance.
    parser.add_argument("--dtype", default="float64", choices=("float32", "float64"), help="(float64)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def _overrides(args: argparse.Namespace) -> list[str]:
    return [*args.overrides, "model.trust=true"] if args.trust else list(args.overrides)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not '{text}'")
    return int(text)


def _draws(text: str) -> int:
    if not text.isdecimal() or int(text) == 1:
        raise argparse.ArgumentTypeError(f"0, or at least 2 since one draw has no spread, not '{text}'")
    return int(text)


def _amplitude(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and up to 1, not '{text}'")
    return value


class _Version(argparse.Action):
    """``--version``, read from the installed metadata only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit."""
        import blip_ft

        print(f"{parser.prog} {blip_ft.__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
