"""One recipe over several seeds: rows of every model and set, means and spreads printed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from blip_ft.config import load_recipe
from blip_ft.training.fit import fit

METHODS = {"pretrained": "pretrained", "plain": "plain", "blip": "default"}
SHOWN = (
    "force_mae_mev_per_ang",
    "force_crps_mev_per_ang",
    "force_nll",
    "coverage90",
    "energy_mae_mev_per_atom",
    "coverage90_energy",
)


def over_seeds(name: str, recipe: str, dataset: str, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Fit a recipe with every seed; runs are kept in runs/<name>-<seed>, finished ones are not run again.

    Args:
        name: of the runs, and of the file of rows in benchmarks/results.
        recipe: a shipped recipe or a file.
        dataset: written into every row.
        seeds: seed of the order of the frames, of all noise and of the draws.
        overrides: of the recipe, beside name and seed.
    """
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        options = load_recipe(recipe, [f"name={name}-{seed}", f"seed={seed}", *overrides])
        done = options.folder / "metrics.json"
        metrics = json.loads(done.read_text()) if done.is_file() else fit(options)
        for model, sets in metrics.items():
            for split, values in sets.items():
                row = {"dataset": dataset, "method": METHODS[model], "seed": seed, "split": split}
                rows.append(row | values)
    out = Path(__file__).parent / "results" / f"{name}.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")
    groups = defaultdict(list)
    for row in rows:
        groups[row["split"], row["method"]].append(row)
    table = Table("set", "method", *SHOWN, "error/std", title=f"mean (std) over seeds {list(seeds)}")
    for (split, method), group in groups.items():
        columns = [[row[k] for row in group if row.get(k) is not None] for k in SHOWN]
        columns.append([row["zms"] ** 0.5 for row in group if row.get("zms") is not None])
        table.add_row(split, method, *(f"{np.mean(c):.2f} ({np.std(c):.2f})" if c else "-" for c in columns))
    Console().print(table)
