"""The shipped SiO2 recipe over several seeds: accuracy and error bars, seen phases and unseen ones.

    python benchmarks/polymorphs.py 0 1 2 3 4 [--accelerator gpu]     # about 10 minutes a seed on 2 cores

A seed sets the order of the frames, all noise, the context frames and the draws; the frames and their
roles are the embedded set's own. Each run is kept in runs/polymorphs-<seed>; a finished one is not run
again. Rows go to benchmarks/results/polymorphs.json, means and spreads over seeds are printed.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

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
)


def main(seeds: list[int], accelerator: str) -> None:
    rows = []
    for seed in seeds:
        overrides = [f"name=polymorphs-{seed}", f"seed={seed}", f"trainer.accelerator={accelerator}"]
        recipe = load_recipe("sio2_sevennet", overrides)
        done = recipe.folder / "metrics.json"
        metrics = json.loads(done.read_text()) if done.is_file() else fit(recipe)
        for model, sets in metrics.items():
            for split, values in sets.items():
                row = {"dataset": "sio2_polymorphs", "method": METHODS[model], "seed": seed, "split": split}
                rows.append(row | values)
    out = Path(__file__).parent / "results" / "polymorphs.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")
    groups = defaultdict(list)
    for row in rows:
        groups[row["split"], row["method"]].append(row)
    table = Table("set", "method", *SHOWN, "error/std", title=f"mean (std) over seeds {seeds}")
    for (split, method), group in groups.items():
        columns = [[row[k] for row in group if row.get(k) is not None] for k in SHOWN]
        columns.append([row["zms"] ** 0.5 for row in group if row.get("zms") is not None])
        table.add_row(split, method, *(f"{np.mean(c):.2f} ({np.std(c):.2f})" if c else "-" for c in columns))
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    given = parser.parse_args()
    main(given.seeds, given.accelerator)
