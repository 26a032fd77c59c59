"""The inversion barrier of ammonia with its error bar, held against DFT.

    python benchmarks/inversion.py DIR [--seeds 0 1 2 3 4] [--draws 16] [--accelerator cpu]

DIR holds NH3_BP86.extxyz.gz and NH3_inversion_path.extxyz.gz (docs/data.md). The model is the default of
``ammonia.py``: SevenNet-0 on 62 frames near equilibrium, none of them of the path; runs are kept in
runs/inversion-SEED. Both ends are pyramids, h = -0.35 and 0.35 Å above the plane of hydrogen on the path; minima and
saddle point are those of each draw. Rows go to benchmarks/results/inversion.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ase.io
import numpy as np
from ammonia import best_plain, recipe_for
from ase import Atoms
from scipy.interpolate import CubicSpline

from blip_ft import fit, load
from blip_ft.properties import Members, barrier
from blip_ft.verify.models import pretrained_of

PATH = "NH3_inversion_path.extxyz.gz"
OUT = Path(__file__).parent / "results" / "inversion.json"


def path_of(folder: Path) -> tuple[list[Atoms], float]:
    """The DFT path, and its barrier by a cubic spline, eV."""
    frames = list(ase.io.read(folder / PATH, index=":"))
    heights, energies = (np.array([a.info[k] for a in frames]) for k in ("h", "REF_energy"))
    spline = CubicSpline(heights, energies)
    lowest = spline(np.linspace(heights[0], heights[-1], 10_001)).min()
    return frames, float(spline(0.0) - lowest)


def trained(folder: Path, seed: int, accelerator: str) -> Path:
    """Folder of the run, which is made if need be."""
    best = best_plain()
    recipe = recipe_for(folder, seed, "default", best["learning_rate"], best["epochs"])
    trainer = {**recipe.trainer, "accelerator": accelerator}
    recipe = recipe.model_copy(update={"name": f"inversion-{seed}", "trainer": trainer})
    if not (recipe.folder / "metrics.json").is_file():
        fit(recipe)
    return recipe.folder


def run(folder: Path, seed: int, draws: int, accelerator: str) -> dict[str, float]:
    frames, truth = path_of(folder)
    ends = [min(frames, key=lambda a, h=h: abs(a.info["h"] - h)) for h in (-0.35, 0.35)]
    potential = load(trained(folder, seed, accelerator), dtype="float64")
    found = barrier(potential, *ends, n_draws=draws)
    pretrained = pretrained_of(potential).calculator()
    before = barrier(Members(pretrained, [pretrained] * 2), *ends)
    return {
        "seed": seed,
        "draws": draws,
        "dft": truth,
        "pretrained": float(before.forward.mean),
        "barrier": float(found.forward.mean),
        "std": float(found.forward.std),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    given = parser.parse_args()
    rows = json.loads(OUT.read_text()) if OUT.is_file() else []
    for seed in given.seeds:
        row = run(given.folder, seed, given.draws, given.accelerator)
        rows = sorted([r for r in rows if r["seed"] != seed] + [row], key=lambda r: r["seed"])
        OUT.write_text(json.dumps(rows, indent=1) + "\n")
        print(row, flush=True)
