"""Validation error against epochs and wall time: Adam, Adam with Gauss-Newton steps, Gauss-Newton alone.

    python benchmarks/convergence.py run DIR     # Gauss-Newton alone, a few minutes a set
    python benchmarks/convergence.py draw        # the figure and the table

Adam's curves are those of the runs that ``polymorphs.py``, ``ammonia.py`` and ``zeolites.py`` keep in runs/ (every
seed that is there). DIR holds NH3_BP86.extxyz.gz. Gauss-Newton alone starts at the pretrained weights: no
epochs, then steps of the mean, each from eight new random projections of every frame's forces, until one is
refused or eight are done. Writes benchmarks/results/convergence.json and docs/convergence.svg.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from ammonia import recipe_for
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table
from seeds import METHODS

from blip_ft.config import Recipe, load_recipe
from blip_ft.training.fit import prepare
from blip_ft.training.loop import train

HERE = Path(__file__).parent
OUT = HERE / "results" / "convergence.json"
STEPS = 8
PROJECTIONS = 8
LABELS = {"plain": "Adam", "default": "ELBO, then Gauss-Newton", "gauss-newton": "Gauss-Newton alone"}
COLOURS = {"plain": "tab:gray", "default": "tab:blue", "gauss-newton": "tab:orange"}
SETS = {
    "polymorphs": "SiO2 polymorphs, 36 frames",
    "ammonia": "ammonia, 62 frames",
    "zeolites": "zeolite EDI, 36 frames",
}


def alone(recipe: Recipe, console: Console) -> list[dict[str, float]]:
    """History of Gauss-Newton steps from the pretrained weights."""
    posterior = recipe.posterior.model_copy(update={"mean_steps": STEPS, "projections": PROJECTIONS})
    recipe = recipe.model_copy(
        update={"posterior": posterior, "trainer": recipe.trainer | {"max_epochs": 0}, "name": "gauss-newton"}
    )
    prepared = prepare(recipe, console)
    with tempfile.TemporaryDirectory() as log:
        return train(recipe, prepared.potential, prepared.sets, Path(log), console, plain=False)


def run(folder: Path, console: Console) -> None:
    for name, recipe in {
        "ammonia": recipe_for(folder, 0, "default", 1e-3, 0),
        "polymorphs": load_recipe("sio2_sevennet", ["name=gauss-newton"]),
    }.items():
        curve = {"set": name, "method": "gauss-newton", "seed": 0, "history": shown(alone(recipe, console))}
        print(name, [round(r["val_force_mae"], 2) for r in curve["history"]], flush=True)
        before = json.loads(OUT.read_text()) if OUT.is_file() else []
        key = ("set", "method", "seed")
        curves = [c for c in before if any(c[k] != curve[k] for k in key)] + [curve]
        OUT.write_text(json.dumps(curves) + "\n")


def shown(history: list[dict[str, float]]) -> list[dict[str, float | bool]]:
    """What the figure shows of a history."""
    return [
        {"epoch": r["epoch"], "seconds": round(r["seconds"], 1), "val_force_mae": r["val_force_mae"]}
        | {"step": "train_loss" not in r}
        for r in history
    ]


def kept_curves() -> list[dict[str, Any]]:
    out = []
    for folder in sorted(f for name in SETS for f in Path("runs").glob(f"{name}-[0-9]*")):
        name, _, seed = folder.name.rpartition("-")
        history = json.loads((folder / "history.json").read_text())
        for model, rows in history.items():
            out.append({"set": name, "method": METHODS[model], "seed": int(seed), "history": shown(rows)})
    for file in sorted(Path("runs/ammonia").glob("ammonia-*.json")):
        _, method, seed = file.stem.split("-")
        if method in LABELS:
            history = json.loads(file.read_text())["history"]
            out.append({"set": "ammonia", "method": method, "seed": int(seed), "history": shown(history)})
    return out


def draw() -> None:
    curves = [c for c in json.loads(OUT.read_text()) if c["method"] == "gauss-newton"] + kept_curves()
    OUT.write_text(json.dumps(curves) + "\n")
    sets = {name: title for name, title in SETS.items() if any(c["set"] == name for c in curves)}
    fig, axes = plt.subplots(
        len(sets), 2, figsize=(8.6, 2.9 * len(sets)), sharey="row", layout="constrained", squeeze=False
    )
    table = Table("set", "method", "seeds", "final validation force MAE, meV/Å", "seconds")
    for line, (name, title) in zip(axes, sets.items(), strict=True):
        for method, label in LABELS.items():
            mine = [c for c in curves if (c["set"], c["method"]) == (name, method)]
            for curve in mine:
                rows = curve["history"]
                error = [r["val_force_mae"] for r in rows]
                best = np.minimum.accumulate(error)
                for ax, key in zip(line, ("epoch", "seconds"), strict=True):
                    x = [r[key] + (key == "epoch") for r in rows]
                    ax.plot(x, best, color=COLOURS[method], linewidth=1, alpha=0.8)
                    steps = [i for i, r in enumerate(rows) if r["step"]]
                    ax.plot(
                        [x[i] for i in steps],
                        best[steps],
                        "o",
                        color=COLOURS[method],
                        markersize=4,
                        alpha=0.8,
                    )
            last = [min(r["val_force_mae"] for r in c["history"]) for c in mine]
            time = [c["history"][-1]["seconds"] for c in mine]
            if mine:
                table.add_row(
                    name,
                    label,
                    str(len(mine)),
                    f"{np.mean(last):.2f} ({np.std(last):.2f})",
                    f"{np.mean(time):.0f}",
                )
        for ax, x_label in zip(line, ("epochs, then Gauss-Newton steps", "seconds"), strict=True):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            ax.yaxis.set_minor_formatter("{x:g}")
            ax.set_xlabel(x_label)
            ax.set_title(title, fontsize=10)
        line[0].set_ylabel("best force MAE so far,\nmeV/Å, validation")
    handles = [Line2D([], [], color=COLOURS[m], label=label) for m, label in LABELS.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(LABELS), frameon=False)
    fig.savefig(HERE.parent / "docs" / "convergence.svg")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "draw"))
    parser.add_argument("folder", type=Path, nargs="?")
    given = parser.parse_args()
    if given.command == "draw":
        draw()
    else:
        run(given.folder, Console(stderr=True, quiet=True))
