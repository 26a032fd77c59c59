"""The sketched posterior beside ``pathwise`` at the same trained means, so that the posterior alone differs.

    python benchmarks/sketch.py RUN [RUN ...] [--variants]     # runs of sio2_sevennet with other seeds

RUN is a finished run of ``posterior.family: pathwise``. Its mean is taken as it is, ``sketch`` is fitted around it,
calibrated on the same frames and judged on the same sets with as many draws. With ``--variants`` also other numbers of
buckets and of projections, of the first run. Rows go to benchmarks/results/sketch.json, means and spreads over
runs are printed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from blip_ft.closed_form.fitter import ClosedFormFitter
from blip_ft.config import PosteriorConfig, Recipe, parse_recipe
from blip_ft.files import whole_file
from blip_ft.potential.checkpoint import load_model
from blip_ft.training.evaluate import evaluate
from blip_ft.training.prepare import Prepared, prepare

OUT = Path(__file__).parent / "results" / "sketch.json"
SHOWN = ("force_crps_mev_per_ang", "force_nll", "coverage90", "energy_crps_mev_per_atom", "coverage90_energy")
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"R = {r}": {"projections": r} for r in (8, 16)},
    **{f"{m} buckets": {"buckets": m} for m in (512, 4096)},
}


def at_mean_of(run: Path, console: Console) -> tuple[Recipe, Prepared]:
    """The recipe of a run with the sketch, and its frames and mean."""
    tree = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    tree["posterior"] = {"family": "sketch"}
    recipe = parse_recipe(tree)
    prepared = prepare(recipe, console)
    trained, potential = load_model(run), prepared.potential
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("posterior.")}
    potential.load_state_dict(state, strict=False)
    potential.references = trained.references
    return recipe, prepared


def judge(
    recipe: Recipe, prepared: Prepared, console: Console, **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit a sketch and judge it; what it came to, and metrics by set."""
    posterior = PosteriorConfig(family="sketch", **options)
    changed = recipe.model_copy(update={"posterior": posterior})
    prepared.potential.posterior.wanted = posterior
    started = time.perf_counter()
    fitter = ClosedFormFitter(changed, prepared.potential, prepared.sets, console)
    report = fitter.fit(final=True)
    seconds = time.perf_counter() - started
    draws = recipe.uncertainty.n_draws
    found = evaluate(changed, prepared.potential, prepared.sets, draws=draws, console=console, what="sketch")
    keys = ("prior_scale", "effective_parameters", "buckets", "absorbed", "bytes", "n_train_rows")
    return {k: report[k] for k in keys} | {"seconds": seconds}, found.metrics


def main() -> None:
    """All runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--variants", action="store_true")
    given = parser.parse_args()
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []

    def note(run: Path, method: str, about: dict[str, Any], metrics: dict[str, Any]) -> None:
        for split, values in metrics.items():
            rows.append({"run": run.name, "method": method, "split": split, **about, **values})
        with whole_file(OUT) as file:
            json.dump(rows, file, indent=1)

    for number, run in enumerate(given.runs):
        note(run, "pathwise", {}, json.loads((run / "metrics.json").read_text(encoding="utf-8"))["blip"])
        recipe, prepared = at_mean_of(run, console)
        note(run, "sketch", *judge(recipe, prepared, console))
        for name, options in VARIANTS.items() if given.variants and not number else ():
            note(run, name, *judge(recipe, prepared, console, **options))
    groups = defaultdict(list)
    for row in rows:
        groups[row["split"], row["method"]].append(row)
    table = Table("set", "method", *SHOWN, "error/std", "buckets", "MB")
    for (split, method), group in groups.items():
        columns = [[row[k] for row in group if row.get(k) is not None] for k in SHOWN]
        columns.append([row["zms"] ** 0.5 for row in group if row.get("zms") is not None])
        last = group[-1]
        size = (str(last["buckets"]), f"{last['bytes'] / 1e6:.1f}") if "bytes" in last else ("-", "-")
        table.add_row(
            split, method, *(f"{np.mean(c):.2f} ({np.std(c):.2f})" if c else "-" for c in columns), *size
        )
    Console().print(table)


if __name__ == "__main__":
    main()
