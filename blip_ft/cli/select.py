"""``blip-finetune select``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blip_ft.cli.arguments import add_model, count
from blip_ft.cli.console import announce, new_table, show, show_json
from blip_ft.cli.model import load

if TYPE_CHECKING:
    from blip_ft.select.choose import Choice
    from blip_ft.select.pool import Pool

#: an output that is whole but for candidates that the model cannot describe
EXIT_LEFT_OUT = 3
#: frames that are named of those that are excluded or left out
MOST_LISTED = 20
#: what `blip-finetune --help` says
HELP = "choose what to label next from candidates"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(parser)
    parser.add_argument(
        "source",
        metavar="CANDIDATES",
        help="as for predict: a file, glob, set, each with @selector; labels are not needed and not used",
    )
    parser.add_argument("-n", type=count, metavar="N", help="frames to choose")
    parser.add_argument("-o", "--output", metavar="OUT", required=True, help="the .extxyz file to write")
    parser.add_argument(
        "--method",
        choices=("covariance", "energy", "random", "farthest", "ood", "top"),
        default="covariance",
        help="covariance: what labels would teach beside those of the other chosen frames; energy: likewise, of "
        "energies alone; for comparison random, farthest (in the model's features), ood (score), top (largest force "
        "std) (covariance)",
    )
    parser.add_argument(
        "--budget-atoms",
        type=count,
        metavar="A",
        help="atoms in all chosen frames together, at most; gains count per atom then",
    )
    parser.add_argument("--group-limit", type=count, metavar="K", help="frames of a trajectory, at most")
    parser.add_argument(
        "--audit",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of the frames that is drawn at random, to judge the model by (0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (0)")
    parser.add_argument(
        "--projections",
        type=count,
        default=8,
        metavar="R",
        help="projections that stand for the forces of a candidate, with method covariance (8)",
    )
    parser.add_argument(
        "--storage",
        choices=("float32", "float16"),
        default="float32",
        help="numbers of candidates on disk, beside OUT while it works (float32)",
    )
    parser.add_argument(
        "--batch-size", type=count, default=6, metavar="N", help="candidates per call, at most (6)"
    )
    parser.add_argument(
        "--batch-atoms", type=count, metavar="N", help="atoms per call, at most; as for predict"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (cpu)")
    parser.add_argument("--dtype", default="float64", choices=("float32", "float64"), help="(float64)")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out candidates that the model cannot describe, say which, and end with exit code 3",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def share(text: str) -> float:
    """A share of all."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1, not '{text}'")
    return value


def run(args: argparse.Namespace) -> int:
    """Choose candidates into a file; the exit code is 3 where some were left out."""
    from blip_ft.errors import BlipError
    from blip_ft.files import check_target

    target = check_target(args.output, overwrite=args.overwrite)
    if not target.name.removesuffix(".gz").endswith((".xyz", ".extxyz")):
        raise BlipError(
            "chosen frames are written as extended XYZ",
            file=target,
            remedy="call the output .extxyz or .extxyz.gz",
        )
    if args.n is None and args.budget_atoms is None:
        raise BlipError(
            "it is not said how much to choose", field="n", remedy="give -n FRAMES or --budget-atoms ATOMS"
        )
    potential = load(args)
    from rich.console import Console

    from blip_ft.data.batch.frame_count import count_frames
    from blip_ft.data.read.plan import plan
    from blip_ft.select.choose import Wish, caution, check, check_method, choose
    from blip_ft.select.pool import Known, look
    from blip_ft.select.write import write_choices
    from blip_ft.system.progress import progress

    console = Console(stderr=True)
    known = Known.of_run(args.model)
    check_method(potential, args.method)
    total = count_frames(plan(args.source, labels=False, digest=False))
    with progress(console, "reading", total or 0) as advance:
        pool = look(
            args.source, potential, known, skip_bad=args.skip_bad, progress=advance if total else _nothing
        )
    _list("excluded", pool.excluded)
    wish = Wish(
        method=args.method,
        frames=args.n,
        atoms=args.budget_atoms,
        per_group=args.group_limit,
        audit=args.audit,
        seed=args.seed,
        projections=args.projections,
        structures=args.batch_size,
        batch_atoms=args.batch_atoms,
        precision=args.storage,
    )
    check(pool, wish)
    announce(caution(potential, wish))
    choices = choose(
        potential,
        known,
        pool,
        wish,
        scratch=Path(target).parent,
        progress=lambda what, n: progress(console, what, n),
    )
    _list("left out", pool.left_out)
    write_choices(pool, choices, target, overwrite=args.overwrite)
    _print(args, pool, choices)
    return EXIT_LEFT_OUT if pool.left_out else 0


def _list(what: str, frames: Sequence[tuple[str, str]]) -> None:
    """The first of them; ``--json`` has all."""
    for place, reason in frames[:MOST_LISTED]:
        announce(f"{what}: {place}: {reason}")
    if len(frames) > MOST_LISTED:
        announce(f"{what}: {len(frames) - MOST_LISTED} more (--json lists all)")


def _nothing(n: int) -> None:
    del n


def _print(args: argparse.Namespace, pool: Pool, choices: Sequence[Choice]) -> None:
    """The table, or JSON."""
    from blip_ft.select.choose import SCORES

    score, gain = SCORES[args.method]
    atoms = sum(c.atoms for c in choices)
    if args.json:
        show_json(
            {
                "method": args.method,
                "score": score,
                "gain": gain,
                "frames_read": pool.seen,
                "candidates": len(pool),
                "chosen": [c.to_json() for c in choices],
                "atoms": atoms,
                "excluded": [{"place": p, "reason": r} for p, r in pool.excluded],
                "left_out": [{"place": p, "reason": r} for p, r in pool.left_out],
                "output": args.output,
            }
        )
        return
    columns = [name for name, text in (("score", score), ("gain", gain)) if text]
    table = new_table(
        "",
        "frame",
        "group",
        "atoms",
        "chosen by",
        *columns,
        *(["gain alone"] if "gain" in columns else []),
        title=f"{len(choices)} of {len(pool)} candidates",
    )
    for c in choices:
        numbers = [getattr(c, name) for name in columns] + ([c.alone] if "gain" in columns else [])
        table.add_row(
            str(c.order),
            f"{c.source}, {c.frame}",
            c.group,
            str(c.atoms),
            c.method,
            *("" if v is None else f"{v:.4g}" for v in numbers),
        )
    show(table)
    for name, text in (("score", score), ("gain", gain)):
        if text:
            print(f"{name}: {text}")
    print(
        f"{args.output}: {len(choices)} frames, {atoms} atoms; of {pool.seen} frames read {len(pool.excluded)} "
        f"excluded, {len(pool.left_out)} left out"
    )
