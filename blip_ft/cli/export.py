"""``blip-finetune export``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from blip_ft.cli.arguments import add_model, amplitude, draws
from blip_ft.cli.console import new_table, show

#: what `blip-finetune --help` says
HELP = "write the mean and draws as files that the vendor's programs open"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(parser)
    parser.add_argument(
        "--to", choices=("native",), default="native", help="the vendor's own format (native)"
    )
    parser.add_argument(
        "--draws", type=draws, default=0, metavar="K", help="also K posterior draws, at least 2 (0)"
    )
    parser.add_argument(
        "--amplitude",
        type=amplitude,
        metavar="A",
        help="width of the draws, 1 for the posterior's own (by default the width that predict draws at)",
    )
    parser.add_argument(
        "--references",
        choices=("file", "beside"),
        default="file",
        help="energy references in the files, or beside them in export.json alone, where float32 would lose their "
        "digits (file)",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="new folder (RUN/export-native)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run(args: argparse.Namespace) -> None:
    """Write a model in the vendor's format."""
    from blip_ft.potential.checkpoint import find_model, load_model
    from blip_ft.potential.export import META, export_native

    folder = Path(args.output) if args.output else find_model(args.model).parent / f"export-{args.to}"
    potential = load_model(args.model, reference_set=args.reference_set)
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
