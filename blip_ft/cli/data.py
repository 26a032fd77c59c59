"""``blip-finetune data``: work on data sets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from blip_ft.cli.console import say
from blip_ft.errors import BlipError

#: what `blip-finetune --help` says
HELP = "convert data sets"


def add(parser: argparse.ArgumentParser) -> None:
    """Its subcommands."""
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "write a source in another format, in eV and Å"
    convert = group.add_parser("convert", help=text, description=f"{text[0].upper()}{text[1:]}.")
    convert.set_defaults(run=run)
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


def run(args: argparse.Namespace) -> None:
    """Write a source in another format."""
    from pydantic import ValidationError

    from blip_ft.config import SourceConfig
    from blip_ft.config.loading import problems_of
    from blip_ft.data.read.set_aside import SetAside
    from blip_ft.data.read.sources import load_source, mappings
    from blip_ft.data.read.unused import unmatched_labels
    from blip_ft.data.write.card import Card
    from blip_ft.data.write.convert import convert
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
    say(aside.places, [] if args.unlabelled else unmatched_labels({args.source: frames}, use_stress=True))
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
