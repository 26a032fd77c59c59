"""How many planted wrong labels the data check finds, and how many right ones it names.

    python benchmarks/label_faults.py DIR [--predictions FOLDER] [--only SET ...]

DIR holds the outside data sets (docs/data.md). Into 5 % of the frames of each set faults of one kind are
planted (``blip_ft.testing.planted``), with several seeds; SevenNet-0 predicts the true structures once, and
FOLDER keeps these predictions between runs. The thresholds were set looking at the sets marked "set on".
Prints a table and writes benchmarks/results/label_faults.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from blip_ft.backbones.registry import get_adapter
from blip_ft.data.check.examine import compare
from blip_ft.data.check.label_faults import FORCE_FLOOR, Compared, check_labels
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.sources import load_source
from blip_ft.testing.planted import KINDS, plant

SEEDS = 5
#: set -> (frames, evenly taken; were the thresholds set on it)
SETS = {
    "sio2_polymorphs_pbe": (195, True),
    "NH3_BP86": (138, True),
    "ethanol_rMD17_100": (100, True),
    "SiO2_zeo_EDI": (300, True),
    "SiO2_zeo_SOD": (250, False),
    "SiO2_zeo_BCT": (200, False),
    "Si_mlearn": (239, False),
    "Li_mlearn": (270, False),
    "MOF_UiO66_mini": (20, False),
    "SiO2_zeo_multi": (492, False),
}


def predicted(path: Path, most: int, cache: Path | None) -> list[Compared]:
    """Frames of a set beside SevenNet-0."""
    rows = load_source(str(path))
    index = np.unique(np.linspace(0, len(rows) - 1, most).astype(int))
    chosen = [rows[int(i)] for i in index]
    kept = None if cache is None else cache / f"{path.name.partition('.')[0]}.npz"
    if kept is None or not kept.exists():
        frames = compare(chosen, get_adapter("sevennet").load("7net-0"))
        if kept is not None:
            _save(kept, frames)
        return frames
    return _load(kept, chosen)


def _save(path: Path, frames: list[Compared]) -> None:
    arrays: dict[str, np.ndarray] = {"energy": np.array([f.model_energy for f in frames])}
    for i, f in enumerate(frames):
        arrays[f"forces{i}"] = f.model_forces
        if f.model_stress is not None:
            arrays[f"stress{i}"] = f.model_stress
        for z, value in (f.features or {}).items():
            arrays[f"features{i}_{z}"] = value
    np.savez(path, **arrays)


def _load(path: Path, rows: list[dict]) -> list[Compared]:
    stored = np.load(path)
    if len(stored["energy"]) != len(rows):
        raise SystemExit(f"{path} holds predictions of other frames: remove it")
    frames = []
    for i, row in enumerate(rows):
        atoms = to_atoms(row, labels=False)
        frames.append(
            Compared(
                atoms,
                row["energy"],
                np.array(row["forces"]),
                None if row["stress"] is None else np.array(row["stress"]),
                float(stored["energy"][i]),
                stored[f"forces{i}"],
                stored.get(f"stress{i}"),
                {int(z): stored[f"features{i}_{z}"] for z in np.unique(atoms.numbers)},
                row["group"],
            )
        )
    return frames


def named(frames: list[Compared]) -> set[int]:
    return {fault.index for fault in check_labels(frames).faults if fault.cause != "group"}


def measure(frames: list[Compared]) -> dict:
    out: dict = {"frames": len(frames), "named without faults": len(named(frames))}
    for kind in KINDS:
        shares, false, seen, of = [], [], 0, 0
        for seed in range(SEEDS):
            planted, bad = plant(frames, kind, seed)
            found = named(planted)
            shares.append(len(found & bad) / len(bad))
            false.append(len(found - bad) / (len(frames) - len(bad)))
            visible = {
                i for i in bad if np.sqrt(np.mean((planted[i].forces - frames[i].forces) ** 2)) > FORCE_FLOOR
            }
            seen, of = seen + len(found & visible), of + len(visible)
        out[kind] = {"found": shares, "false": false}
        if kind in ("atoms", "axis"):
            out[kind]["visible found"] = [seen, of]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--only", nargs="*", default=list(SETS))
    args = parser.parse_args()
    if args.predictions:
        args.predictions.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in track(args.only, console=Console(stderr=True)):
        most, tuned = SETS[name]
        frames = predicted(args.data / f"{name}.extxyz.gz", most, args.predictions)
        results[name] = {"set on": tuned, **measure(frames)}
        row = results[name]
        parts = [
            f"{kind} {np.mean(row[kind]['found']):.0%} (false {np.max(row[kind]['false']):.1%})"
            for kind in KINDS
        ]
        print(f"{name:22s} {len(frames):4d} frames, {row['named without faults']} named; " + ", ".join(parts))
    out = Path(__file__).parent / "results" / "label_faults.json"
    if args.only == list(SETS):
        out.write_text(
            json.dumps({"seeds": SEEDS, "model": "sevennet:7net-0", "sets": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
