"""Real draws beside the one-pass methods, and the amplitude at which draws leave the linear regime.

    python benchmarks/linearized.py runs/demo                      # test frames of the run's own recipe
    python benchmarks/linearized.py MODEL frames.extxyz [more ...]

For a few frames of every set: std of energies and force components over 256 real draws against the exact
one of the linearised model (methods ``energy`` and ``linear``); and, over 24 draws, the shift of their mean and
their spread for amplitudes from 0.1 to 1; and force stds from K random directions, or K draws, over the exact ones.
Some 10 minutes on a core for the shipped recipe.
Prints the rows of the tables in docs/benchmarks.md; writes benchmarks/results/linearized.json and, with
--pictures DIR, the two figures of the report.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from blip_ft.config import load_recipe
from blip_ft.data.batch.dataset import FrameDataset, collate
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import load_model
from blip_ft.report import theme
from blip_ft.report.linear_plots import agreement_figure, amplitude_figure
from blip_ft.training.evaluate import ROLES
from blip_ft.uncertainty.linearity import THOROUGH, agreement, study
from blip_ft.uncertainty.predict import Method, predict_batch

OUT = Path(__file__).parent / "results" / "linearized.json"
#: random directions, or draws
FEW = (4, 8, 16, 32, 64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a run or of a model")
    parser.add_argument("frames", nargs="*", help="sources; by default the test frames of the run's recipe")
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--curve-draws", type=int, default=24, help="draws at every other amplitude")
    parser.add_argument("--n-frames", type=int, default=4, help="of all sets together")
    parser.add_argument("--dtype", choices=["float32", "float64"], default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=Path, help="folder for the two figures")
    given = parser.parse_args()
    potential = load_model(given.model, device=given.device, dtype=given.dtype)
    if given.frames:
        sources = {name: load_source(name) for name in given.frames}
    else:
        recipe = Path(given.model) / "recipe.yaml"
        if not recipe.is_file():
            raise BlipError("not the folder of a run", file=given.model, remedy="name frames")
        sources = {
            n: d
            for n, d in load_splits(load_recipe(str(recipe), finished=True).data).test.items()
            if n not in ROLES
        }
    sets = {name: FrameDataset(rows, potential.backbone) for name, rows in sources.items()}
    started = time.process_time()
    # many draws at the model's own amplitude, fewer at all: the comparison over the same draws needs few
    agree = study(potential, sets, n_frames=given.n_frames, n_draws=given.draws, amplitudes=())
    curve = study(potential, sets, n_frames=given.n_frames, n_draws=given.curve_draws, amplitudes=THOROUGH)
    rough = few(potential, sets)
    seconds = time.process_time() - started
    rows = agreement(agree)
    result: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "agreement": rows,
        "few": rough,
        "amplitude": agree["amplitude"],
    }
    result["draws"], result["curve_draws"] = given.draws, given.curve_draws
    result["curves"] = {
        name: {quantity: entry[quantity]["curve"] for quantity in ("energy", "forces")}
        for name, entry in curve["sets"].items()
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    console = Console(width=140)
    table = Table("std", "against", "set", "values", "ratio", "quartiles", "correlation", "sampling")
    for r in rows:
        table.add_row(
            r["quantity"],
            r["reference"],
            r["set"] or "all",
            str(r["n"]),
            *(f"{r['median']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}"),
            "-" if r["correlation"] is None else f"{r['correlation']:.4f}",
            f"{100 * r['expected']:.1f} %",
        )
    console.print(table)
    table = Table("set", "quantity", *(f"{a:.2g}" for a in _amplitudes(curve)), title="shift; std ratio")
    for name, entry in result["curves"].items():
        for quantity, points in entry.items():
            table.add_row(name, quantity, *(f"{p['shift']:.2f}; {p['median']:.2f}" for p in points))
    console.print(table)
    table = Table("forces_std from", "K", "off by, rms", "mean", "stated")
    for r in rough:
        numbers = (f"{100 * r[key]:.1f} %" for key in ("rms", "bias", "stated"))
        table.add_row("directions" if r["method"] == "linear" else "draws", str(r["k"]), *numbers)
    console.print(table)
    console.print(f"{seconds:.0f} s of CPU time")
    if given.pictures is not None:
        given.pictures.mkdir(parents=True, exist_ok=True)
        (given.pictures / "linearized.png").write_bytes(theme.to_png(agreement_figure(agree)))
        (given.pictures / "amplitude.png").write_bytes(theme.to_png(amplitude_figure(curve)))


def few(potential: BayesianPotential, sets: dict[str, FrameDataset]) -> list[dict[str, Any]]:
    """Force stds from K random directions and from K draws over the exact ones, one frame of each set."""
    batches = []
    for frames in sets.values():
        batch = collate(potential.backbone, [frames[len(frames) // 2]])
        batches.append(batch.to(potential.backbone.device))

    def stds(method: Method, n: int | None) -> tuple[np.ndarray, float]:
        found = [predict_batch(potential, b, n_draws=n, method=method, stress=False) for b in batches]
        parts = [m.forces_std.cpu().numpy().ravel() for m in found if m.forces_std is not None]
        return np.concatenate(parts), found[0].sampling_error

    exact, _ = stds("linear", None)
    rows = []
    for method in ("linear", "draws"):
        for k in FEW:
            values, stated = stds(method, k)
            off = values / exact - 1
            rms, bias = float(np.sqrt((off**2).mean())), float(off.mean())
            rows.append({"method": method, "k": k, "rms": rms, "stated": stated, "bias": bias})
    return rows


def _amplitudes(result: dict[str, Any]) -> list[float]:
    first = next(iter(result["sets"].values()))
    return [p["amplitude"] for p in first["forces"]["curve"]]


if __name__ == "__main__":
    main()
