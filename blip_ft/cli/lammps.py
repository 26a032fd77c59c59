"""``blip-finetune lammps``."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from blip_ft.cli.arguments import add_device, add_error_bars, add_model, count, positive
from blip_ft.cli.console import announce
from blip_ft.cli.model import load

if TYPE_CHECKING:
    from blip_ft.lammps import Bridge

#: what `blip-finetune --help` says
HELP = "run a LAMMPS input with the model, and error bars as columns and thresholds"
#: least seconds between two lines on how it goes
EVERY = 60.0


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(parser)
    parser.add_argument(
        "input",
        metavar="IN.lmp",
        help="LAMMPS input; its line 'fix blip all external pf/callback 1 1' says where the model comes in",
    )
    parser.add_argument(
        "--elements",
        metavar="Si,O",
        help="element of each atom type, in their order (by default from the types' labels, else from their masses)",
    )
    add_error_bars(parser)
    parser.add_argument(
        "--every",
        type=count,
        default=1,
        metavar="N",
        help="error bars on every Nth step (1); ood_score on all",
    )
    parser.add_argument(
        "--stop-above",
        type=positive,
        metavar="EV_PER_ANG",
        help="end a run where the std of the force on an atom is larger",
    )
    parser.add_argument(
        "--charge", type=float, metavar="E", help="of the structure, for models that take one"
    )
    parser.add_argument("--spin", type=float, metavar="M", help="its multiplicity, likewise")
    add_device(parser)
    parser.add_argument(
        "--var",
        type=variable,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the input, as LAMMPS's -var; several times for several",
    )
    parser.add_argument("--log", metavar="FILE", help="LAMMPS's log, none for none (log.lammps)")


def run(args: argparse.Namespace) -> None:
    """Run LAMMPS."""
    from blip_ft.system.signals import Interrupts

    cmdargs = [word for name, value in args.var for word in ("-var", name, value)]
    if args.log is not None:
        cmdargs += ["-log", args.log]
    potential = load(args)  # says so before the long imports
    from blip_ft.lammps import run_input

    interrupts = Interrupts()
    interrupts.waits = True  # LAMMPS ends behind an evaluation, in order
    said = time.monotonic()

    def after(bridge: Bridge) -> None:
        nonlocal said
        interrupts.check()
        if time.monotonic() - said >= EVERY:
            said = time.monotonic()
            announce(_state(bridge))

    with interrupts.handled():
        bridges = run_input(
            potential,
            args.input,
            cmdargs=cmdargs,
            elements=None if args.elements is None else args.elements.split(","),
            method=args.method,
            n_draws=args.draws,
            every=args.every,
            stop_above=args.stop_above,
            charge=args.charge,
            spin=args.spin,
            after=after,
        )
        interrupts.check()
    for bridge in bridges:
        if not bridge.evaluations:
            announce(f"fix {bridge.fix}: LAMMPS has asked for no forces: no run follows in the input")
        if bridge.exceeded is not None:
            print(f"above {args.stop_above:g} eV/Å at {bridge.exceeded}")
        print(f"{args.input}: {_state(bridge)}")


def variable(text: str) -> tuple[str, str]:
    """Name and value of a variable of the input."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"NAME=VALUE, not '{text}'")
    return name, value


def _state(bridge: Bridge) -> str:
    """How far an instance is."""
    worst = "" if bridge.largest is None else f"; least certain at {bridge.largest}"
    return f"step {bridge.step}, {bridge.evaluations} evaluations, {bridge.with_error_bars} with error bars{worst}"
