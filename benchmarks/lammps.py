"""What a step of dynamics costs in LAMMPS, as ratios to one in ASE with the same model, side by side in one run.

    python benchmarks/lammps.py RUN_OR_MODEL [--rounds 10] [--cells 1 2] [--device cpu]

NVE of quartz, 9 atoms per cell, from its own velocities of 300 K. Every round takes ten steps of each variant, in a
random order, and the ratio to ASE's calculator without error bars in the same round; shown are the median ratio and its
quartiles. On a CPU it is the time of the process, which other programs disturb less. Writes
benchmarks/results/lammps.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from ase.spacegroup import crystal
from rich.console import Console
from rich.table import Table

from blip_ft import load
from blip_ft.lammps import attach, open_lammps

OUT = Path(__file__).parent / "results" / "lammps.json"
STEPS = 10
REFERENCE = "ASE, no error bars"
VARIANTS: dict[str, dict[str, Any]] = {
    "LAMMPS, no error bars": {"n_draws": 0},
    "LAMMPS, energy_std in every step": {"method": "energy"},
    "LAMMPS, all draws in every 10th step": {"every": STEPS},
    "LAMMPS, 4 draws in every 10th step": {"every": STEPS, "n_draws": 4},
}


def quartz(cells: int) -> Atoms:
    sites = [(0.4697, 0, 1 / 3), (0.4133, 0.2672, 0.2142)]
    cellpar = [4.916, 4.916, 5.405, 90, 90, 120]
    return crystal(["Si", "O"], sites, spacegroup=152, cellpar=cellpar).repeat((cells, cells, 1))


def in_ase(potential: Any, atoms: Atoms) -> Callable[[], None]:
    atoms.calc = potential.calculator(n_draws=0)
    speeds = np.sqrt(units.kB * 300 / atoms.get_masses())[:, None]
    atoms.set_velocities(speeds * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    dynamics = VelocityVerlet(atoms, timestep=units.fs)
    return lambda: dynamics.run(STEPS)


def in_lammps(potential: Any, atoms: Atoms, options: dict[str, Any]) -> Callable[[], None]:
    lmp = open_lammps(["-screen", "none", "-log", "none"])
    (lx, _, _), (xy, ly, _), (_, _, lz) = atoms.cell.array
    lmp.commands_string(
        f"units metal\nregion box prism 0 {lx} 0 {ly} 0 {lz} {xy} 0 0\ncreate_box 2 box\nmass 1 28.085\nmass 2 15.999"
    )
    atoms.wrap()
    lmp.create_atoms(
        len(atoms), None, [1 if s == "Si" else 2 for s in atoms.symbols], atoms.positions.flatten()
    )
    attach(lmp, potential, **options)
    lmp.commands_string("velocity all create 300 1\nfix n all nve\ntimestep 0.001\nrun 0")
    return lambda: lmp.command(f"run {STEPS} pre no post no")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cells", nargs="+", type=int, default=(1, 2), help="n x n x 1 cells of quartz")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=OUT)
    given = parser.parse_args()
    potential = load(given.model, device=given.device, dtype="float64")
    clock = time.process_time if given.device == "cpu" else time.perf_counter
    rng = np.random.default_rng(0)
    rows = []
    for cells in given.cells:
        atoms = quartz(cells)
        runs = {REFERENCE: in_ase(potential, atoms.copy())}
        runs |= {what: in_lammps(potential, atoms.copy(), options) for what, options in VARIANTS.items()}
        times: dict[str, list[float]] = {what: [] for what in runs}
        for run in runs.values():
            run()
        for _ in range(given.rounds):
            for what in rng.permutation(list(runs)):
                started = clock()
                runs[what]()
                times[what].append(clock() - started)
        for what in VARIANTS:
            low, median, high = np.quantile(np.divide(times[what], times[REFERENCE]), (0.25, 0.5, 0.75))
            row = {"atoms": len(atoms), "device": given.device, "what": what}
            rows.append(row | {"ratio": median, "low": low, "high": high})
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("atoms", "what", f"over {REFERENCE}", "quartiles")
    for r in rows:
        table.add_row(str(r["atoms"]), r["what"], f"{r['ratio']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
