"""``blip-finetune evaluate``."""

from __future__ import annotations

import argparse
import json
import sys

from blip_ft.cli.arguments import add_model, add_prediction
from blip_ft.cli.console import metrics_table, say, show
from blip_ft.cli.model import load

#: what `blip-finetune --help` says
HELP = "compare a trained model with labelled structures"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(parser)
    parser.add_argument(
        "source", metavar="IN", help="labelled structures: a file, glob, hub id or data set name"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the metrics as JSON")
    add_prediction(parser)


def run(args: argparse.Namespace) -> None:
    """Compare a model with labelled structures."""
    from blip_ft.files import check_target, whole_file

    output = None if args.output is None else check_target(args.output, overwrite=args.overwrite)
    potential = load(args)
    from blip_ft.data.batch.dataset import FrameDataset
    from blip_ft.data.read.set_aside import SetAside
    from blip_ft.data.read.sources import load_source
    from blip_ft.data.read.unused import unmatched_labels
    from blip_ft.uncertainty.metrics import set_metrics
    from blip_ft.uncertainty.predict import predict_set

    aside = SetAside()
    rows = aside.examples(load_source(args.source))
    say(aside.places, unmatched_labels({args.source: rows}))
    if potential.reference_sets is not None:  # labels of other sets come onto the zero of this one
        rows = potential.reference_sets.align_frames(rows, strict=False)
        print(potential.reference_sets.describe(), file=sys.stderr)
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
