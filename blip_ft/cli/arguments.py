"""Arguments that several commands have, and values that they check."""

from __future__ import annotations

import argparse


def add_model(parser: argparse.ArgumentParser) -> None:
    """The trained model."""
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder, or a model folder")
    parser.add_argument(
        "--reference-set",
        metavar="NAME",
        help="level of theory on whose zero energies are, of a model trained with data.reference_sets (its default)",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Changes of a recipe."""
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


def overrides(args: argparse.Namespace) -> list[str]:
    """The ``KEY=VALUE`` arguments, with what ``--trust`` stands for."""
    return [*args.overrides, "model.trust=true"] if args.trust else list(args.overrides)


def add_prediction(parser: argparse.ArgumentParser) -> None:
    """How structures are predicted."""
    parser.add_argument(
        "--batch-size", type=count, default=16, metavar="N", help="structures per call, at most (16)"
    )
    parser.add_argument(
        "--batch-atoms",
        type=count,
        metavar="N",
        help="atoms per call, at most; a larger structure comes alone (2048 on a GPU; on a CPU 64 per "
        "thread, at least 128)",
    )
    add_error_bars(parser)
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def add_error_bars(parser: argparse.ArgumentParser) -> None:
    """What error bars are made of."""
    parser.add_argument(
        "--method",
        choices=("draws", "energy", "linear"),
        default="draws",
        help="error bars from posterior draws; from the gradient that gives the forces, of energies alone; or exact "
        "ones of the linearised model (draws)",
    )
    parser.add_argument(
        "--draws",
        type=draws,
        metavar="K",
        help="posterior draws, 0 for none and no error bars; with --method linear random directions (draws: those "
        "of the recipe; linear: all)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where and in which precision the model is evaluated."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (cpu)")
    # Error bars are small differences of large numbers: in float32 they lose their invariance.
    parser.add_argument("--dtype", default="float64", choices=("float32", "float64"), help="(float64)")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not '{text}'")
    return int(text)


def draws(text: str) -> int:
    """A number of draws."""
    if not text.isdecimal() or int(text) == 1:
        raise argparse.ArgumentTypeError(f"0, or at least 2 since one draw has no spread, not '{text}'")
    return int(text)


def amplitude(text: str) -> float:
    """A width of draws."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and up to 1, not '{text}'")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0, not '{text}'")
    return value
