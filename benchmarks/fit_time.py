"""Time of ``fit`` and of its stages beside those of another revision, in one environment.

    python benchmarks/fit_time.py --base 2a2b6e3 [--rounds 5] [--threads 1] [--stages plain elbo] [--no-fit]

The other revision lies in a git worktree of its own. Each of the two has a process that prepares the recipe; the
stages are asked for in turn, base, today, base, today, and each round gives one ratio of CPU times: shown are
median and quartiles. Then the whole recipe is trained by both, one after the other, each in a fresh process:
CPU time, wall time, peak memory, and the scores of every set. The last line is ``fit: X of REV``. Writes
benchmarks/results/fit_time.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "fit_time.json"
RECIPE = "sio2_sevennet"
#: calls that one answer takes the mean of
REPEATS = {"energy+forces": 10, "draw": 10, "energy_std": 10, "plain": 3, "elbo": 3, "rows": 3}


def since(module: str, name: str) -> Any:
    """What earlier revisions do not have, or ``None``."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def either(name: str, *modules: str) -> Any:
    """A name from the first of the modules that has it: revisions keep it in different places."""
    found = (since(module, name) for module in modules)
    return next(value for value in found if value is not None)


def stages() -> dict[str, Callable[[], Any]]:
    """What a fit is made of, on frames of the recipe; runs on either revision."""
    import torch

    from blip_ft.config import ObjectiveConfig, load_recipe
    from blip_ft.objectives import Likelihood
    from blip_ft.training.prepare import prepare
    from blip_ft.uncertainty.jacobian import all_components, output_gradients
    from blip_ft.uncertainty.predict import predict_batch

    fitter = either("ClosedFormFitter", "blip_ft.closed_form.fitter", "blip_ft.training.closed_form")
    collate = either("collate", "blip_ft.data.batch.dataset", "blip_ft.data.dataset")
    noise = since("blip_ft.variational.noise", "Noise")
    keep_memory = since("blip_ft.system.allocator", "keep_memory") or since(
        "blip_ft.allocator", "keep_memory"
    )
    if keep_memory is not None:
        keep_memory()
    weights_only = since("blip_ft.backbones.conservative", "weights_only") or since(
        "blip_ft.conservative", "weights_only"
    )
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe, quiet = load_recipe(RECIPE, []), Console(quiet=True)
    prepared = prepare(recipe, quiet)
    potential, train = prepared.potential, prepared.sets["train"]
    four, six = (collate(potential.backbone, [train[i] for i in some]) for some in (range(4), range(10, 16)))
    likelihood = Likelihood(ObjectiveConfig())
    fitter(recipe, potential, prepared.sets, quiet).rows.rows(1)
    potential.posterior.directions.normal_(std=1e-4)

    def evaluate(mode: str, **options: Any) -> Any:
        """With noise as a value, or as options."""
        draw = {"draw": options.pop("draw")} if "draw" in options else {}
        if noise is None:
            return potential(four, mode=mode, **draw, **options)
        return potential(four, noise(mode, **draw), **options)

    def step(mode: str) -> None:
        out = evaluate(mode, create_graph=True)
        loss = likelihood(out, four).total.sum() + potential.kl()
        if weights_only is None:
            loss.backward()
        else:
            with weights_only():
                loss.backward(inputs=potential.mean_parameters)
        potential.zero_grad(set_to_none=True)

    def call(mode: str, **options: Any) -> None:
        with torch.no_grad():
            evaluate(mode, stress=False, **options)

    def rows() -> None:
        """Gradients of the energy and of eight force components."""
        list(itertools.islice(output_gradients(potential, six, all_components(six)[:8]), 9))

    return {
        "energy+forces": lambda: call("off"),
        "draw": lambda: call("draw", draw=0),
        "energy_std": lambda: predict_batch(potential, four, method="energy", stress=False),
        "plain": lambda: step("off"),
        "elbo": lambda: step("structure"),
        "rows": rows,
    }


def answer() -> None:
    """Seconds of CPU and of wall time for every stage that is asked for on standard input."""
    known = stages()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name = line.strip()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(REPEATS[name]):
            known[name]()
        spent = (time.process_time() - cpu, time.perf_counter() - wall)
        print(json.dumps([t / REPEATS[name] for t in spent]), flush=True)


@contextlib.contextmanager
def revision(name: str) -> Iterator[Path]:
    """A worktree of a revision."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", where, name], check=True)
        try:
            yield where
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", where], check=True)


def importable(tree: Path, folder: Path) -> Path:
    """A folder to import a tree's package from: the package keeps adapters and recipes beside it."""
    package = folder / "blip_ft"
    package.mkdir(parents=True)
    for path in (*(tree / "blip_ft").iterdir(), tree / "adapters", tree / "recipes"):
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = folder / f"blip_ft-{project['version']}.dist-info"  # its adapters lie where it says
    metadata.mkdir()
    about = f"Metadata-Version: 2.1\nName: blip-ft\nVersion: {project['version']}\n"
    (metadata / "METADATA").write_text(about, encoding="utf-8")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
    (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def environment(path: Path, threads: int) -> dict[str, str]:
    """Both revisions in this interpreter, by what comes first on its path."""
    number = str(threads)
    return os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number}


def compare_stages(paths: dict[str, Path], names: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Ratios of CPU times, median and quartiles over the rounds."""
    workers = {}
    for label, path in paths.items():
        command = [sys.executable, __file__, "--answer"]
        workers[label] = subprocess.Popen(
            command,
            env=environment(path, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(label: str, name: str | None = None) -> Any:
        worker = workers[label]
        assert worker.stdin is not None
        assert worker.stdout is not None
        if name is not None:
            print(name, file=worker.stdin, flush=True)
        if not (line := worker.stdout.readline()):
            raise RuntimeError(f"the process of {label} ended at {name or 'its start'}")
        return json.loads(line)

    out = {}
    try:
        for label in paths:
            ask(label)
        for name in names:
            for label in paths:  # compiles, fills caches
                ask(label, name)
            times = [{label: ask(label, name) for label in paths} for _ in range(rounds)]
            ratios = [time["today"][0] / time["base"][0] for time in times]
            low, median, high = statistics.quantiles(ratios, n=4)
            out[name] = {"ratio": median, "quartiles": [low, high]} | {
                f"{label}_ms": 1e3 * statistics.median(time[label][0] for time in times) for label in paths
            }
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return out


def whole_fit(path: Path, threads: int, overrides: list[str]) -> dict[str, Any]:
    """One fit in a process of its own; its time, memory (GB at most) and scores."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "blip_ft.cli", "fit", RECIPE, "name=timed", *overrides]
        started = time.perf_counter()
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=folder, env=environment(path, threads), stdout=log, stderr=log
            )
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError((Path(folder) / "log").read_text()[-3000:])
        (metrics,) = Path(folder).glob("runs/timed/metrics.json")
        return {
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "wall_s": time.perf_counter() - started,
            "peak_gb": usage.ru_maxrss * 1024 / 1e9,
            "metrics": json.loads(metrics.read_text()),
        }


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stages", nargs="+", choices=list(REPEATS), default=list(REPEATS))
    parser.add_argument("--no-fit", action="store_true", help="stages alone")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the recipe, for both: seed=1 ...")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer()
        return
    if arguments.rounds < 2:
        parser.error("--rounds: quartiles need two or more")
    if not arguments.base:
        parser.error("--base REV: with which revision?")
    console = Console()
    with tempfile.TemporaryDirectory() as folder, revision(arguments.base) as tree:
        paths = {
            label: importable(where, Path(folder) / label)
            for label, where in (("base", tree), ("today", ROOT))
        }
        result: dict[str, Any] = {"base": arguments.base, "threads": arguments.threads}
        table = Table("stage", "base, ms", "today, ms", "ratio", "quartiles")
        result["stages"] = compare_stages(paths, arguments.stages, arguments.rounds, arguments.threads)
        for name, row in result["stages"].items():
            low, high = row["quartiles"]
            table.add_row(
                name,
                f"{row['base_ms']:.0f}",
                f"{row['today_ms']:.0f}",
                f"{row['ratio']:.3f}",
                f"{low:.3f} to {high:.3f}",
            )
        console.print(table)
        if not arguments.no_fit:
            result["fit"] = {
                label: whole_fit(paths[label], arguments.threads, arguments.set)
                for label in ("today", "base")
            }
            table = Table("fit", "CPU, s", "wall, s", "peak, GB")
            for label, row in result["fit"].items():
                table.add_row(label, *(f"{row[key]:.1f}" for key in ("cpu_s", "wall_s", "peak_gb")))
            console.print(table)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    if not arguments.no_fit:
        fit = result["fit"]
        console.print(f"fit: {fit['today']['cpu_s'] / fit['base']['cpu_s']:.3f} of {arguments.base}")


if __name__ == "__main__":
    main()
