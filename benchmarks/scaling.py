"""Time and memory of every stage of ``fit`` as frames, atoms, weights and ranks grow, with fitted exponents.

    python benchmarks/scaling.py run frames [--family sketch] [--backend chgnet] [--values 32 128]
    python benchmarks/scaling.py table

Each point is a whole ``fit`` in a process of its own, one thread, two epochs, on rattled alpha quartz whose labels
are the model's own with 10 meV/Å of noise. A stage has CPU seconds without those of the stages inside it (ranks: wall
seconds of the first rank, as ranks compete for cores). Rows go to benchmarks/results/scaling.json, one per point; a
later run of a point takes its place. ``table`` prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).parent / "results" / "scaling.json"
#: {what grows: its values, and what the others are}
SWEEPS: dict[str, tuple[list[int], dict[str, int]]] = {
    "frames": ([32, 128, 512, 2048], {"atoms": 9, "channels": 0, "ranks": 1}),
    "atoms": ([9, 36, 144, 576], {"frames": 16, "channels": 0, "ranks": 1}),
    "channels": ([32, 128, 256, 512], {"frames": 16, "atoms": 9, "ranks": 1}),
    "ranks": ([1, 2], {"frames": 128, "atoms": 9, "channels": 0}),
}
KEYS = ("frames", "atoms", "channels", "ranks")
MODELS = {"sevennet": "7net-0", "chgnet": "0.3.0"}
EPOCHS, DRAWS = 2, 4
#: frames of each of the other roles
OTHERS = 8
STAGES = ("data and checks", "training", "gradient rows", "posterior", "predictions", "files and report")
#: stages shorter than this say nothing about how they grow, s
LEAST = 1.0


# ---- one point, in a process of its own -----------------------------------------------------------


class Stopwatch:
    """Time of nested stages, each without those inside it.

    Args:
        clock: CPU or wall time, s.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self._open = clock, dict.fromkeys(STAGES, 0.0), ["files and report"]
        self._since = clock()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The length of a block."""
        self.lap()
        self._open.append(name)
        try:
            yield
        finally:
            self.lap()
            self._open.pop()

    def lap(self) -> None:
        """Give the time since the last call to the innermost stage."""
        now = self.clock()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Time all calls of a function or method."""
        before = getattr(owner, attribute)

        def timed(*args: Any, **options: Any) -> Any:
            with self.stage(name):
                return before(*args, **options)

        setattr(owner, attribute, timed)


def model_of(point: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Keys below ``model``: a shipped model, or a SevenNet of other widths with random weights in a file."""
    options = {"adapter": point["backend"], "checkpoint": MODELS[point["backend"]], "dtype": "float32"}
    options["noise"] = "scalar" if point["backend"] == "sevennet" else "all"
    if not point["channels"]:
        return options
    import torch

    from blip_ft import load_backbone
    from blip_ft.adapters.sevennet.backbone import SevenNetBackbone

    torch.manual_seed(0)
    config = load_backbone("sevennet", "7net-0").config()
    width = point["channels"]
    middle = f"{width}x0e+{width // 2}x1e+{width // 4}x2e"
    config["architecture"] |= {
        "channel": width,
        "irreps_manual": [f"{width}x0e", *[middle] * 4, f"{width}x0e"],
    }
    file = folder / "model.pth"
    SevenNetBackbone.from_config(config).write_native(file, {})
    return options | {"checkpoint": str(file), "trust": True}


def write_frames(point: dict[str, Any], model: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Labelled frames of every role; returns keys below ``data``."""
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write
    from ase.spacegroup import crystal

    from blip_ft import load_backbone

    quartz = crystal(
        ["Si", "O"],
        [(0.4697, 0, 1 / 3), (0.4133, 0.2672, 0.2142)],
        spacegroup=152,
        cellpar=[4.916, 4.916, 5.405, 90, 90, 120],
    )
    assert len(quartz) == 9
    k = point["atoms"] // len(quartz)
    times = [1, 1, 1]
    while math.prod(times) < k:
        times[times.index(min(times))] *= 2
    random = np.random.default_rng(0)
    model_options = {"trust": True} if model.get("trust") else {}
    calculator = load_backbone(model["adapter"], model["checkpoint"], **model_options).stock_calculator()
    roles = {"train": point["frames"], "validation": OTHERS, "calibration": OTHERS, "test": OTHERS}
    for role, count in roles.items():
        images = []
        for _ in range(count):
            atoms = quartz.repeat(times)
            atoms.positions += random.normal(scale=0.05, size=atoms.positions.shape)
            atoms.calc = calculator
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            forces = forces + random.normal(scale=0.01, size=forces.shape)
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
            images.append(atoms)
        write(folder / f"{role}.extxyz", images)
    return {role: str(folder / f"{role}.extxyz") for role in roles}


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """A whole fit; seconds of each stage, peak memory, sizes."""
    import torch
    from rich.console import Console

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = model_of(point, folder)
        data = write_frames(point, model, folder)

        from blip_ft.closed_form.fitter import ClosedFormFitter
        from blip_ft.closed_form.gradients import GradientRows
        from blip_ft.config import parse_recipe
        from blip_ft.training import fit as fitting
        from blip_ft.training import loop

        recipe = parse_recipe(
            {
                "name": "run",
                "output": str(folder / "runs"),
                "model": model,
                "data": data | {"batch_size": 4},
                "posterior": {"family": point["family"]} | point["posterior"],
                "objective": {"use_stress": False},
                "uncertainty": {"n_draws": DRAWS, "calibration_draws": DRAWS, "linearity_frames": 0},
                "trainer": {
                    "max_epochs": EPOCHS,
                    "accelerator": "cpu",
                    "devices": point["ranks"],
                    "strategy": "auto" if point["ranks"] == 1 else "ddp",
                    "logger": False,
                    "enable_progress_bar": False,
                },
            }
        )
        watch = Stopwatch(time.process_time if point["ranks"] == 1 else time.monotonic)
        watch.watch(fitting, "prepare", "data and checks")
        watch.watch(fitting, "evaluate", "predictions")
        watch.watch(loop, "train", "training")
        watch.watch(ClosedFormFitter, "fit", "posterior")
        watch.watch(GradientRows, "_fill", "gradient rows")
        fitting.fit(recipe, Console(quiet=True))
        watch.lap()
        from blip_ft import load

        weights = sum(site.numel for site in load(folder / "runs" / "run").posterior.sites)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            **{k: point[k] for k in (*KEYS, "backend", "family")},
            "weights": weights,
            "seconds": {stage: round(s, 2) for stage, s in watch.seconds.items()},
            "clock": "cpu" if point["ranks"] == 1 else "wall",
            "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
            "model_mb": round(
                sum(p.stat().st_size for p in (folder / "runs" / "run" / "model").iterdir()) / 1e6, 2
            ),
        }


# ---- sweeps -------------------------------------------------------------------------------------


def read_rows() -> list[dict[str, Any]]:
    """All points so far."""
    return list(json.loads(OUT.read_text(encoding="utf-8"))) if OUT.exists() else []


def same_point(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two rows are of one point."""
    return all(a[k] == b[k] for k in (*KEYS, "backend", "family", "clock"))


def run(args: argparse.Namespace) -> None:
    """All points of a sweep, each kept as it comes."""
    values, others = SWEEPS[args.sweep]
    for value in args.values or values:
        point = others | {args.sweep: value, "backend": args.backend, "family": args.family}
        point["posterior"] = json.loads(args.posterior)
        if args.sweep == "ranks":
            point["clock"] = "wall"
        child = [sys.executable, __file__, "point", json.dumps(point)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(child, env=env, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{args.sweep} {value}: failed, see above", file=sys.stderr)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rows = [r for r in read_rows() if not same_point(r, row)]
        OUT.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)


def exponent(xs: list[float], ys: list[float]) -> float | None:
    """Slope of log y against log x by least squares; ``None`` if fewer than two points are long enough."""
    kept = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if y >= LEAST]
    if len(kept) < 2:
        return None
    x, y = np.array(kept).T
    return float(np.polyfit(x, y, 1)[0])


def table() -> None:
    """Markdown: a table for every sweep, backend and family."""
    rows = read_rows()
    for sweep, (_, others) in SWEEPS.items():
        chosen = [r for r in rows if all(r[k] == v for k, v in others.items())]
        for backend, family in sorted({(r["backend"], r["family"]) for r in chosen}):
            some = [r for r in chosen if (r["backend"], r["family"]) == (backend, family)]
            some.sort(key=lambda r: r[sweep])
            if len(some) < 2:
                continue
            axis = "weights" if sweep == "channels" else sweep
            print(f"\n{backend}, `{family}`, {sweep} growing ({some[0]['clock']} seconds)\n")
            print(f"| {axis} | " + " | ".join(STAGES) + " | peak, GB | model, MB |")
            print("|---" * (len(STAGES) + 3) + "|")
            for r in some:
                cells = [f"{r['seconds'][s]:.1f}" for s in STAGES]
                print(
                    f"| {r[axis]:,} | " + " | ".join(cells) + f" | {r['peak_gb']:.2f} | {r['model_mb']:.1f} |"
                )
            xs = [float(r[axis]) for r in some]
            fitted = [exponent(xs, [r["seconds"][s] for r in some]) for s in STAGES]
            print("| exponent | " + " | ".join("–" if e is None else f"{e:.2f}" for e in fitted) + " | | |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.add_argument("sweep", choices=SWEEPS)
    one.add_argument("--family", default="pathwise")
    one.add_argument("--backend", choices=MODELS, default="sevennet")
    one.add_argument("--values", type=int, nargs="+")
    one.add_argument("--posterior", default="{}", help="further keys of the posterior, JSON")
    one.set_defaults(run=run)
    two = commands.add_parser("table")
    two.set_defaults(run=lambda args: table())
    three = commands.add_parser("point")
    three.add_argument("point", type=json.loads)
    three.set_defaults(run=lambda args: print(json.dumps(measure(args.point))))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
