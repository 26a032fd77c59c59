"""How much the error bars depend on the prior's scale and the temperature around the chosen ones.

    python benchmarks/flatness.py RUN [RUN ...] [--accelerator gpu]     # a few minutes each

RUN is a finished run of ``blip-finetune fit`` or of ``ammonia.py`` with a family in closed form (it
needs ``recipe.yaml``, ``receipt.json`` and ``model/``). The trained mean stays; the posterior is fitted again
with every value, calibrated on the calibration frames, and judged on the test sets. One value is varied at a time.
Writes benchmarks/results/flatness-<run>.json and docs/flatness-<run>.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from blip_ft.closed_form.fitter import ClosedFormFitter
from blip_ft.config import load_recipe
from blip_ft.families.base.linear import ClosedFormData
from blip_ft.potential.checkpoint import load_model
from blip_ft.training.evaluate import evaluate
from blip_ft.training.fit import prepare
from blip_ft.training.loop import device_of

HERE = Path(__file__).parent
#: in units of the chosen value
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
SHOWN = {
    "force_crps_mev_per_ang": "force CRPS, meV/Å",
    "coverage90": "90 % coverage",
    "force_nll": "force NLL, eV/Å",
}


def measure(run: Path, accelerator: str, console: Console) -> list[dict[str, Any]]:
    """One row per value and test set."""
    recipe = load_recipe(str(run / "recipe.yaml"), [f"trainer.accelerator={accelerator}"], finished=True)
    prepared = prepare(recipe, Console(quiet=True))
    potential = load_model(run / "model").to(device_of(recipe))
    fitter = ClosedFormFitter(recipe, potential, prepared.sets, Console(quiet=True), prepared.context)
    chosen = json.loads((run / "receipt.json").read_text())["posterior"][-1]
    s, t = chosen["prior_scale"], chosen["temperature"]
    options = fitter.options
    rows = fitter.rows.rows(options.projections_of_fit(last=True), context=options.needs_context)
    values = {(s * f, t): ("prior_scale", f) for f in FACTORS}
    values |= {(s, t * f): ("temperature", f) for f in FACTORS if f != 1}
    out = []
    for (scale, temperature), (what, factor) in values.items():
        report = potential.posterior.fit(ClosedFormData(rows, scale, temperature))
        report = fitter.settle(report, final=True)
        judgement = evaluate(
            recipe, potential, prepared.sets, draws=recipe.uncertainty.n_draws, console=console, what=what
        )
        for split, metrics in judgement.metrics.items():
            row = {"run": run.name, "varied": what, "factor": factor, "split": split}
            row |= {"prior_scale": scale, "temperature": temperature, "amplitude": report["amplitude"]}
            row["scale"] = judgement.calibration.forces.scale
            out.append(row | {k: metrics.get(k) for k in (*SHOWN, "force_mae_mev_per_ang")})
        print(f"{run.name}: {what} times {factor:g}", flush=True)
    return out


def both(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chosen values belong to both sweeps."""
    return rows + [r | {"varied": "temperature"} for r in rows if r["factor"] == 1]


def picture(rows: list[dict[str, Any]], file: Path) -> None:
    fig, axes = plt.subplots(
        2, len(SHOWN), figsize=(3.6 * len(SHOWN), 5.4), sharex="row", layout="constrained"
    )
    names = {"prior_scale": "prior scale", "temperature": "temperature"}
    for line, varied in zip(axes, names, strict=True):
        mine = [r for r in both(rows) if r["varied"] == varied]
        chosen = next(r for r in mine if r["factor"] == 1)
        for ax, (key, label) in zip(line, SHOWN.items(), strict=True):
            for split in dict.fromkeys(r["split"] for r in mine):
                if split in ("all", "unseen"):
                    continue
                points = sorted((r["factor"], r[key]) for r in mine if r["split"] == split)
                ax.plot(*zip(*points, strict=True), marker="o", markersize=3, label=split.replace("_", " "))
            if key == "coverage90":
                ax.axhspan(0.85, 0.95, color="0.9", zorder=0)
            ax.set_xscale("log", base=2)
            ax.set_xticks(FACTORS, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
            ax.axvline(1, color="0.6", linewidth=0.8)
            ax.set_xlabel(f"{names[varied]} / chosen ({chosen[varied]:.3g})")
            ax.set_ylabel(label)
    axes[0][0].legend(frameon=False, fontsize=8)
    fig.savefig(file)
    plt.close(fig)


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table("varied", "times", "set", *SHOWN.values(), "calibration scale")
    for r in rows:
        if r["split"] in ("all", "unseen"):
            continue
        out.add_row(
            r["varied"], f"{r['factor']:g}", r["split"], *(f"{r[k]:.2f}" for k in SHOWN), f"{r['scale']:.2f}"
        )
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    given = parser.parse_args()
    for folder in given.runs:
        found = measure(folder, given.accelerator, Console(stderr=True, quiet=True))
        (HERE / "results" / f"flatness-{folder.name}.json").write_text(json.dumps(found, indent=1) + "\n")
        picture(found, HERE.parent / "docs" / f"flatness-{folder.name}.svg")
        Console(width=140).print(table(found))
