"""Force error on held-out frames against the number of labels, by how these were chosen, in the linearised model.

    python benchmarks/learning.py RUN FILE [--pool 90] [--test 30] [--seeds 5] [--dtype float32]

RUN is a finished run of ``posterior.family: sketch``; FILE has labelled frames. Of frames drawn at random (seed 0) some
are the pool and others are held out. For every seed two thirds of the pool are candidates. Chosen frames enter the mean
by one exact Bayesian update in the features of the posterior, with their forces alone, so that choices are compared and
nothing else: no training, no chance of its own. That is what the model knows to first order, not what a fit would
reach. Rows of the pool are made once. Rows go to benchmarks/results/learning.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from blip_ft.closed_form.gradients import GradientRows
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.files import whole_file
from blip_ft.library import load_frames
from blip_ft.potential.checkpoint import load_model
from blip_ft.select.budget import Budget
from blip_ft.select.features import PROJECTIONS, Calls, Whitening, places
from blip_ft.select.greedy import Information, farthest, largest, most_informative
from blip_ft.select.pool import Known, look
from blip_ft.system.progress import progress

Floats = NDArray[np.float64]
OUT = Path(__file__).parent / "results" / "learning.json"
NUMBERS = (4, 8, 16, 32)


class Held:
    """Rows of candidates in memory."""

    def __init__(self, rows: list[Floats]) -> None:
        self.rows = rows

    def __getitem__(self, i: int) -> Floats:
        return self.rows[i]

    def blocks(self) -> Any:
        yield slice(0, len(self.rows)), np.concatenate(self.rows)


def rows_of(
    known: Known, potential: Any, whitening: Whitening, frames: Any, console: Console
) -> tuple[list[Floats], list[Floats]]:
    """Whitened rows of the energy and every force component of each frame; label minus prediction, over the noise."""
    source = FrameDataset(frames, potential.backbone)
    rows = GradientRows(known.recipe.objective, potential, source, orthonormal=True)
    with progress(console, "gradients", len(source)) as advance:
        parts = list(rows.features(whitening, whitening.width, None, progress=advance))
    keys = np.concatenate([p.keys for p in parts])
    made = torch.cat([p.gradients for p in parts]).double().numpy()
    errors = np.concatenate([p.errors for p in parts])
    numbers = [np.flatnonzero(keys == source.key(i)) for i in range(len(source))]
    return [made[n] for n in numbers], [errors[n] for n in numbers]


def projected(rows: Floats, seed: int) -> Floats:
    """As ``select`` sees a frame: its energy, and a few projections of its forces."""
    n = len(rows) - 1
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, min(PROJECTIONS, n))))
    return np.concatenate([rows[:1], np.sqrt(n / q.shape[1]) * q.T @ rows[1:]])


def updated(rows: list[Floats], errors: list[Floats], temperature: float) -> Floats:
    """Mean of the whitened weights once the forces of some frames are known."""
    g, e = np.concatenate([r[1:] for r in rows]), np.concatenate([e[1:] for e in errors])
    found: Floats = np.linalg.solve(g.T @ g + temperature * np.eye(g.shape[1]), g.T @ e)
    return found


def main() -> None:
    """All methods and seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pool", type=int, default=90)
    parser.add_argument("--test", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    given = parser.parse_args()
    console = Console(stderr=True)
    known, potential = Known.of_run(given.run), load_model(given.run, dtype=given.dtype)
    whitening, objective = Whitening(potential), known.recipe.objective
    everything = load_frames(given.file)
    # frames that the run was only tested on are candidates here
    known = Known(known.recipe, {k: role for k, role in known.roles.items() if not role.startswith("test")})
    candidates = look(str(given.file), potential, known)
    where = {p.frame: i for i, p in enumerate(candidates.places)}
    everything = everything.select([i for i, f in enumerate(everything["frame"]) if f in where])
    drawn = np.random.default_rng(0).permutation(len(everything))[: given.pool + given.test]
    frames = everything.select(np.sort(drawn[: given.pool]))
    of_pool = [where[f] for f in frames["frame"]]
    rows, errors = rows_of(known, potential, whitening, frames, console)
    test_rows, test_errors = rows_of(
        known, potential, whitening, everything.select(drawn[given.pool :]), console
    )
    test, wrong = (
        np.concatenate([r[1:] for r in test_rows]),
        np.concatenate([e[1:] for e in test_errors]),
    )
    narrow = candidates.part(of_pool)
    found = dict(places(narrow, potential, Calls())[0])
    seen = [projected(r, i) for i, r in enumerate(rows)]
    scale, table = 1000 * objective.forces_std, []
    name = given.file.name.partition(".")[0]

    def mae(chosen: list[int]) -> float:
        left = (
            wrong
            if not chosen
            else wrong
            - test @ updated([rows[i] for i in chosen], [errors[i] for i in chosen], objective.kl_temperature)
        )
        return float(scale * np.abs(left).mean())

    numbers = [n for n in (0, *NUMBERS) if n <= 2 * len(rows) // 3]
    for seed in range(given.seeds):
        rng = np.random.default_rng(100 + seed)
        some = np.sort(rng.permutation(len(rows))[: 2 * len(rows) // 3])
        keys, sizes = narrow.keys[some], narrow.sizes[some]

        def budget(sizes: NDArray[np.int64] = sizes) -> Budget:
            return Budget(sizes, [""] * len(sizes), frames=max(numbers))

        held = Held([seen[i] for i in some])
        information = Information(whitening.width, objective.kl_temperature)
        gains = information.gains(held.rows)
        stds = np.array([np.sqrt(np.square(r[1:]).mean()) for r in held.rows])
        orders = {
            "covariance": [i for i, _ in most_informative(held, gains, keys, budget(), information)],
            "random": rng.permutation(len(some))[: max(numbers)].tolist(),
            "farthest": [i for i, _ in farthest(Held([found[i] for i in some]), keys, budget())],
            "top": list(largest(stds, keys, budget())),
        }
        for method, order in orders.items():
            for n in numbers:
                table.append(
                    {
                        "dataset": name,
                        "method": method,
                        "seed": seed,
                        "n_train": n,
                        "force_mae_mev_per_ang": mae([int(some[i]) for i in order[:n]]),
                        "model": "linearised",
                    }
                )
    kept = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else []
    kept = [row for row in kept if (row["dataset"], row["model"]) != (name, "linearised")]
    with whole_file(OUT) as file:
        json.dump(kept + table, file, indent=1)
    shown = Table("method", *map(str, numbers), title=f"{name}: force MAE, meV/Å (std over seeds)")
    for method in ("random", "covariance", "farthest", "top"):
        cells = []
        for n in numbers:
            values = [r["force_mae_mev_per_ang"] for r in table if (r["method"], r["n_train"]) == (method, n)]
            cells.append(f"{np.mean(values):.2f} ({np.std(values):.2f})")
        shown.add_row(method, *cells)
    Console().print(shown)


if __name__ == "__main__":
    main()
