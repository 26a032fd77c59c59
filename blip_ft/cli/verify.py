"""``blip-finetune verify``."""

from __future__ import annotations

import argparse
import json

from blip_ft.cli.arguments import positive
from blip_ft.cli.console import announce, new_table, show

#: exit code of ``--strict`` where a check failed
EXIT_FAILED = 2
#: what `blip-finetune --help` says
HELP = "may one run molecular dynamics with a model? Checks of it, and a verdict"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument(
        "model",
        metavar="RUN_OR_MODEL",
        help="a run's folder, a model folder, a file that export has written, ADAPTER:CHECKPOINT, or "
        "calculator:MODULE:FUNCTION that makes a calculator of ASE",
    )
    parser.add_argument(
        "--frames",
        metavar="SOURCE",
        help="structures to verify on: a file, glob or set (some of those that the run was trained on)",
    )
    parser.add_argument(
        "--temperature",
        type=positive,
        metavar="K",
        help="of the dynamics (the highest that the frames name, 500 if they name none)",
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        default=5.0,
        metavar="N",
        help="what it may take; dynamics of slow models is cut short, and says so (5)",
    )
    parser.add_argument(
        "--trust", action="store_true", help="open a pickled model file that is no published release"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--strict", action="store_true", help="end with exit code 2 where a check failed")


def run(args: argparse.Namespace) -> int:
    """Verify a model, and write the verdict into the report of its run."""
    announce(f"loading {args.model} ...")
    from rich.console import Console

    from blip_ft.cli.rewrite_report import rewrite_report
    from blip_ft.cli.verify_target import open_target
    from blip_ft.files import whole_file
    from blip_ft.verify.frames import DEFAULT_TEMPERATURE, keep_frames, temperature_of
    from blip_ft.verify.verdict import VERDICT, verdict_rows
    from blip_ft.verify.verify import verify

    target = open_target(args.model, args.frames, trust=args.trust)
    announce(target.about)
    temperature = args.temperature or temperature_of(target.frames)
    if temperature is None:
        temperature = DEFAULT_TEMPERATURE
        announce(f"the frames name no temperature: {temperature:.0f} K (--temperature)")
    verdict = verify(
        target.model,
        target.frames,
        temperature,
        pretrained=target.pretrained,
        beside=target.beside,
        seconds=60 * args.minutes,
        console=Console(stderr=True),
    )
    if target.run is not None:
        if args.frames is None:
            keep_frames(target.frames, target.run)
        with whole_file(target.run / VERDICT) as file:
            json.dump(verdict.to_dict(), file, indent=1)
        announce(f"report: {rewrite_report(target.run)}")
    if args.json:
        print(json.dumps(verdict.to_json()))
    else:
        stored = verdict.to_dict()
        table = new_table(
            "check", "result", "value", "limit", *stored["beside"], "", title=target.model.title
        )
        for row in verdict_rows(stored):
            cells = (row[k] for k in ("name", "result", "value", "limit", *stored["beside"], "note"))
            table.add_row(*cells)
        show(table)
        for note in verdict.notes:
            print(note)
        print(f"{verdict.result}: {verdict.sentence}")
    return EXIT_FAILED if args.strict and verdict.result == "fail" else 0
