"""What a batch costs in TorchSim, as ratios to a call without error bars for all structures, side by side in one run.

    python benchmarks/torchsim.py RUN_OR_MODEL [--structures 8] [--rounds 20]

Rattled quartz (seeds 0, 1, ...), 9 atoms each, on the CPU. Every round times each variant once, in a random order
(seed 0); shown are the median ratio and its quartiles. Writes benchmarks/results/torchsim.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from ase.spacegroup import crystal
from rich.console import Console
from rich.table import Table

from blip_ft import load
from blip_ft.torchsim import TorchSimModel

OUT = Path(__file__).parent / "results" / "torchsim.json"
REFERENCE = "one call, no error bars"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL")
    parser.add_argument("--structures", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUT)
    given = parser.parse_args()
    potential = load(given.model)
    sites = [(0.4697, 0, 1 / 3), (0.4133, 0.2672, 0.2142)]
    quartz = crystal(["Si", "O"], sites, spacegroup=152, cellpar=[4.916, 4.916, 5.405, 90, 90, 120])
    structures = [quartz.copy() for _ in range(given.structures)]
    for seed, atoms in enumerate(structures):
        atoms.rattle(0.05, seed=seed)
    plain, energy = TorchSimModel(potential, n_draws=0), TorchSimModel(potential, method="energy")
    draws = TorchSimModel(potential, n_draws=4)
    state, alone = plain.state(structures), [plain.state(atoms) for atoms in structures]
    runs = {
        REFERENCE: lambda: plain(state),
        "of which graphs": lambda: [potential.backbone.graph(atoms) for atoms in structures],
        "with energy_std": lambda: energy(state),
        "4 draws": lambda: draws(state),
        "a call for each structure": lambda: [plain(one) for one in alone],
    }
    times: dict[str, list[float]] = {what: [] for what in runs}
    rng = np.random.default_rng(0)
    for run in runs.values():
        run()
    for _ in range(given.rounds):
        for what in rng.permutation(list(runs)):
            started = time.process_time()
            runs[what]()
            times[what].append(time.process_time() - started)
    rows, table = [], Table("what", f"over {REFERENCE}", "quartiles")
    for what in list(runs)[1:]:
        low, median, high = np.quantile(np.divide(times[what], times[REFERENCE]), (0.25, 0.5, 0.75))
        rows.append({"structures": len(structures), "what": what, "ratio": median, "low": low, "high": high})
        table.add_row(what, f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
