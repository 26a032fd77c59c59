"""``blip-finetune md``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blip_ft.cli.arguments import add_device, add_model, count
from blip_ft.cli.console import announce
from blip_ft.cli.model import load
from blip_ft.errors import BlipError

if TYPE_CHECKING:
    from blip_ft.simulate.options import Dynamics

#: a run that the guard, or an explosion, has ended before its last step
EXIT_STOPPED = 3
#: what `blip-finetune --help` says
HELP = "run molecular dynamics with error bars, which ends when the model no longer knows"


def add(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    add_model(parser)
    parser.add_argument("source", metavar="IN", help="structure to start from; of several one, by IN@N:N+1")
    parser.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="the .extxyz trajectory to write"
    )
    run = parser.add_argument_group("dynamics")
    run.add_argument("--ensemble", choices=("nve", "nvt", "npt"), default="nvt", help="(nvt)")
    run.add_argument("--temperature", type=float, metavar="K", help="of thermostat and first velocities")
    run.add_argument("--heat-to", type=float, metavar="K", help="heat evenly to this temperature (Langevin)")
    run.add_argument("--pressure", type=float, metavar="GPA", help="of npt, in GPa (0)")
    run.add_argument("--steps", type=int, required=True, metavar="N", help="number of steps")
    run.add_argument("--timestep", type=float, default=1.0, metavar="FS", help="in fs (1)")
    run.add_argument(
        "--every",
        type=int,
        default=20,
        metavar="N",
        help="steps between frames, lines of the log and error bars (20)",
    )
    run.add_argument(
        "--draws",
        type=int,
        metavar="K",
        help="posterior draws of each error bar, 0 for none (one for 5 steps of --every)",
    )
    run.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of velocities and Langevin's noise (0)"
    )
    run.add_argument(
        "--thermostat", choices=("langevin", "nose-hoover"), default="langevin", help="of nvt (langevin)"
    )
    run.add_argument(
        "--cell", choices=("isotropic", "full"), default="isotropic", help="what npt changes (isotropic)"
    )
    run.add_argument("--friction", type=float, default=10.0, metavar="PER_PS", help="of Langevin, 1/ps (10)")
    run.add_argument("--damping", type=float, metavar="FS", help="time of a Nosé-Hoover chain (100 steps)")
    run.add_argument("--pressure-damping", type=float, metavar="FS", help="time of the barostat (1000 steps)")
    run.add_argument(
        "--repeat",
        type=count,
        nargs=3,
        default=(1, 1, 1),
        metavar=("A", "B", "C"),
        help="repeat the cell first",
    )
    run.add_argument(
        "--thin-cell", action="store_true", help="allow cells in which atoms see their own images"
    )
    guard = parser.add_argument_group(
        "guard", "thresholds: a number, 3x for a multiple of calibration frames, or off"
    )
    guard.add_argument(
        "--signal", choices=("forces_std", "ood_score"), default="forces_std", help="(forces_std)"
    )
    guard.add_argument("--save-above", metavar="EV_PER_ANG", help="save frames with an atom above (2x)")
    guard.add_argument("--stop-above", metavar="EV_PER_ANG", help="end the run with an atom above (3x)")
    guard.add_argument("--patience", type=int, metavar="N", help="for so many error bars in a row (3)")
    many = parser.add_argument_group(
        "observables with error bars, from a trajectory for each of K posterior draws"
    )
    many.add_argument(
        "--trajectories", type=int, metavar="K", help="run K draws into OUT.draw-0.extxyz and so on"
    )
    many.add_argument(
        "--amplitude", type=float, metavar="A", help="width of the draws; 1 is the posterior's own (1)"
    )
    many.add_argument(
        "--discard", type=float, metavar="SHARE", help="share of frames to leave out first (0.2)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last whole step of an earlier call"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print how it ended as a line of JSON")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Run dynamics; the exit code is 3 where it ended before its last step."""
    from blip_ft.simulate.guard import Limits
    from blip_ft.simulate.options import Dynamics
    from blip_ft.simulate.output import check_output

    dynamics = Dynamics(
        ensemble=args.ensemble,
        steps=args.steps,
        temperature=args.temperature,
        heat_to=args.heat_to,
        pressure=args.pressure,
        timestep=args.timestep,
        every=args.every,
        draws=args.draws,
        seed=args.seed,
        thermostat=args.thermostat,
        cell=args.cell,
        friction=args.friction,
        damping=args.damping,
        pressure_damping=args.pressure_damping,
    )
    if args.trajectories is not None:
        return _run_draws(args, dynamics)
    for name in ("amplitude", "discard"):
        if getattr(args, name) is not None:
            raise BlipError(
                "belongs to several trajectories", field=f"--{name}", remedy="add --trajectories 8"
            )
    check_output(Path(args.output), resume=args.resume, overwrite=args.overwrite)
    potential = load(args)
    from blip_ft.cli.md_progress import shown
    from blip_ft.simulate.levels import known_levels
    from blip_ft.simulate.run import simulate
    from blip_ft.simulate.start import read_start
    from blip_ft.system.signals import Interrupts, Stopped

    start = read_start(args.source, args.repeat)
    if start.get_momenta().any():
        announce("first velocities: those of the structure")
    limits = Limits.of(
        known_levels(potential, args.model),
        signal=args.signal,
        save=args.save_above,
        stop=args.stop_above,
        patience=args.patience,
        available=(
            potential.ood is not None
            if args.signal == "ood_score"
            else potential.posterior.ready and dynamics.n_draws > 0
        ),
    )
    announce(limits.describe())
    try:
        with Interrupts().handled(), shown() as progress:
            done = simulate(
                potential,
                start,
                args.output,
                dynamics,
                limits,
                file=args.source,
                thin_cell=args.thin_cell,
                resume=args.resume,
                overwrite=args.overwrite,
                progress=progress,
            )
    except (Stopped, KeyboardInterrupt) as error:
        if isinstance(error, Stopped):
            announce(f"{error}: ended")
        announce(f"the same command with --resume goes on with {args.output}")
        raise
    if done.stopped:
        announce(done.reason)
    if done.saved:
        announce(
            f"{done.saved} frames to be labelled are in {Path(args.output).with_suffix('.saved.extxyz')}"
        )
    print(
        f"{args.output}: {done.steps} steps{', stopped' if done.stopped else ''}",
        file=sys.stderr if args.json else None,
    )
    if args.json:
        print(json.dumps(done.to_dict()))
    return EXIT_STOPPED if done.stopped else 0


def _run_draws(args: argparse.Namespace, dynamics: Dynamics) -> int:
    """Run draws as trajectories."""
    from contextlib import ExitStack

    from blip_ft.simulate.trajectories import Ensemble, check_ensemble, files

    given = {k: getattr(args, k) for k in ("amplitude", "discard") if getattr(args, k) is not None}
    ensemble = Ensemble(args.trajectories, **given)
    for name in ("save_above", "stop_above", "patience", "draws"):
        if getattr(args, name) is not None:
            raise BlipError(
                "each trajectory is run on the weights of one draw, which has no error bars",
                field=f"--{name.replace('_', '-')}",
                remedy="leave it out, or leave --trajectories out",
            )
    target = Path(args.output)
    check_ensemble(target, dynamics, ensemble, resume=args.resume, overwrite=args.overwrite)
    potential = load(args)
    from blip_ft.cli.md_progress import shown
    from blip_ft.simulate.observables import summary
    from blip_ft.simulate.run import Say
    from blip_ft.simulate.start import read_start
    from blip_ft.simulate.trajectories import simulate_draws
    from blip_ft.system.signals import Interrupts, Stopped

    start = read_start(args.source, args.repeat)
    try:
        with Interrupts().handled(), ExitStack() as stack:

            def progress(k: int) -> Say:
                stack.close()  # the bar of the one before
                return stack.enter_context(shown(what=f"md, draw {k + 1} of {args.trajectories}"))

            found, _ = simulate_draws(
                potential,
                start,
                target,
                dynamics,
                ensemble,
                file=args.source,
                thin_cell=args.thin_cell,
                resume=args.resume,
                overwrite=args.overwrite,
                progress=progress,
            )
    except (Stopped, KeyboardInterrupt) as error:
        if isinstance(error, Stopped):
            announce(f"{error}: ended")
        announce("the same command with --resume goes on with the trajectories")
        raise
    where = sys.stderr if args.json else None
    for text in summary(found["observables"]):
        print(text, file=where)
    _, results, picture = files(target, args.trajectories)
    print(f"{results}, {picture}", file=where)
    if args.json:
        print(json.dumps(found))
    return 0
