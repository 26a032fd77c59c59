"""Which signal a guard of simulations should watch: cheap estimates of force stds beside the exact ones.

    python benchmarks/guard.py runs/demo

On the validation and calibration frames of the shipped set, with a model fitted by the shipped recipe. Exact are the
stds of the linearised model from all directions (``--method linear``). Shown for each estimate: its cost beside the
forces that a simulation has anyway, in calls of the mean model (median of timings side by side on one frame); rank
correlation with the exact stds over atoms, and over frames of their least certain atom; the scatter of estimate over
exact, and mean and scatter of that ratio for the least certain atom.

A second table asks the labels: frames of each set of the run whose force error (root mean square over atoms) is above
twice that of the calibration frames, and frames above the default thresholds, by the predictions that lie in the run.
Thresholds were chosen on validation and calibration frames alone. Writes benchmarks/results/guard.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from blip_ft import load, load_frames
from blip_ft.families.model import drawing
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.simulate.guard import Limits
from blip_ft.simulate.levels import known_levels
from blip_ft.uncertainty.draws import evaluate_draws
from blip_ft.uncertainty.linearized import predict_linearized
from blip_ft.uncertainty.results import SetPrediction
from blip_ft.variational.noise import OFF

OUT = Path(__file__).parent / "results" / "guard.json"
#: draws of each kind
COUNTS = (1, 2, 4, 8)


def estimates(potential: BayesianPotential) -> dict[str, Callable[[Any, np.ndarray], np.ndarray]]:
    """Per-atom signals from a batch of one structure and its mean forces."""

    def draws(chosen: list[int], pairs: bool) -> Callable[[Any, np.ndarray], np.ndarray]:
        def call(batch: Any, mean: np.ndarray) -> np.ndarray:
            with drawing(potential, 16):
                out = evaluate_draws(potential, batch, 16, stress=False, chosen=chosen)
            forces = np.stack([d.forces.numpy() for d in out])
            off = (forces[::2] - forces[1::2]) / 2 if pairs else forces - mean
            return np.sqrt(np.square(off / potential.amplitude).mean(axis=0).sum(axis=1))

        return call

    def directions(count: int) -> Callable[[Any, np.ndarray], np.ndarray]:
        def call(batch: Any, mean: np.ndarray) -> np.ndarray:
            out = predict_linearized(potential, batch, method="linear", n_directions=count, stress=False)
            return out.forces_std_norm.numpy()

        return call

    def energy(batch: Any, mean: np.ndarray) -> np.ndarray:
        out = predict_linearized(potential, batch, method="energy", stress=False)
        return np.repeat(out.energy_std.numpy() / batch.n_atoms.numpy(), batch.n_atoms)

    def score(batch: Any, mean: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            out = potential(batch, OFF, stress=False)
        return potential.ood.score(out.node_features, batch.numbers).numpy()

    found = {"energy_std per atom, one pass": energy, "ood_score": score}
    for k in COUNTS:
        found[f"{k} draws, from the mean"] = draws(list(range(0, 2 * k, 2)), pairs=False)
        found[f"{k} pairs of draws"] = draws(list(range(2 * k)), pairs=True)
        if k < 8:
            found[f"{k} directions"] = directions(k)
    return found


def on_labels(run: Path, potential: BayesianPotential) -> list[dict[str, Any]]:
    """Rows of the second table."""
    levels = known_levels(potential, run)
    limits, calibration = Limits.of(levels), potential.calibration
    found = {p.stem.removeprefix("blip-"): SetPrediction.load(p) for p in run.glob("predictions/blip-*.npz")}

    def errors(p: SetPrediction) -> np.ndarray:
        square = np.square(p.forces_error).sum(axis=1)
        return np.sqrt(np.bincount(p.structure, square) / p.n_atoms)

    usual = np.sqrt(np.average(errors(found["calibration"]) ** 2, weights=found["calibration"].n_atoms))
    rows = []
    for name, p in found.items():
        total = np.sqrt(np.square(calibration.total_std(p)["forces"]).sum(axis=1))
        worst = np.array([total[p.structure == i].max() for i in range(p.n_structures)])
        wrong = errors(p) > 2 * usual
        rows.append(
            {
                "set": name,
                "frames": p.n_structures,
                "error_ev_per_ang": float(np.sqrt(np.average(errors(p) ** 2, weights=p.n_atoms))),
                "wrong": int(wrong.sum()),
                "saved": int((worst > limits.save).sum()),
                "above_stop": int((worst > limits.stop).sum()),
                "wrong_and_not_saved": int((wrong & (worst <= limits.save)).sum()),
                "largest_in_levels": float(worst.max() / limits.level),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--every", type=int, default=1, help="take every n-th frame")
    given = parser.parse_args()
    potential = load(given.run, dtype="float64")
    items = [
        dataset[i]
        for role in ("validation", "calibration")
        for dataset in [potential.dataset(load_frames(f"sio2_polymorphs@{role}"))]
        for i in range(0, len(dataset), given.every)
    ]
    batches = [potential.backbone.batch([item.atoms], graphs=[item.graph]) for item in items]

    def mean(batch: Any) -> np.ndarray:
        with torch.no_grad():
            return potential(batch, OFF, stress=False).forces.double().numpy()

    known = [mean(b) for b in batches]
    exact = [
        predict_linearized(potential, b, method="linear", stress=False).forces_std_norm.numpy()
        for b in batches
    ]
    calls = estimates(potential)
    ratio: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(given.rounds):
        plain = seconds(lambda: mean(batches[0]))
        for name, call in calls.items():
            ratio[name].append(seconds(lambda call=call: call(batches[0], known[0])) / plain)
    rows = []
    for name, call in calls.items():
        made = [call(b, m) for b, m in zip(batches, known, strict=True)]
        atoms, worst = (
            np.concatenate(made) / np.concatenate(exact),
            [m.max() / e.max() for m, e in zip(made, exact, strict=True)],
        )
        # the forces come with the call for these
        own = 1.0 if "pass" in name or "score" in name or "directions" in name else 0.0
        rows.append(
            {
                "estimate": name,
                "cost": float(np.median(ratio[name]) - own),
                "rank_atoms": float(spearmanr(np.concatenate(made), np.concatenate(exact))[0]),
                "rank_worst": float(spearmanr([m.max() for m in made], [e.max() for e in exact])[0]),
                "scatter_atoms": float(atoms.std() / atoms.mean()),
                "worst_ratio": float(np.mean(worst)),
                "worst_scatter": float(np.std(worst)),
            }
        )
    OUT.parent.mkdir(exist_ok=True)
    labels = on_labels(Path(given.run), potential)
    OUT.write_text(json.dumps({"frames": len(items), "rows": rows, "labels": labels}, indent=1) + "\n")
    table = Table("estimate", "cost", "ρ atoms", "ρ worst", "scatter", "worst atom over exact")
    for r in rows:
        table.add_row(
            r["estimate"],
            *(f"{r[k]:.2f}" for k in ("cost", "rank_atoms", "rank_worst", "scatter_atoms")),
            f"{r['worst_ratio']:.2f} ± {r['worst_scatter']:.2f}",
        )
    Console(width=140).print(table)
    table = Table(*labels[0])
    for r in labels:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()))
    Console(width=140).print(table)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
