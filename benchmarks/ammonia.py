"""Every way to error bars on ammonia, side by side, each calibrated alike.

    python benchmarks/ammonia.py tune  DIR                 # plain: learning rate and length, seed 0
    python benchmarks/ammonia.py heat  DIR                 # temperature of the factorised families, seed 0
    python benchmarks/ammonia.py run   DIR [--seeds 0 1 2 3 4] [--methods plain default ...]
    python benchmarks/ammonia.py table

``--accelerator cpu`` or ``gpu`` chooses the device; by default a GPU if there is one.

DIR holds NH3_BP86.extxyz.gz (origin and licence: docs/data.md): 78 frames near equilibrium, then 60
adversarial ones far from it. Of the near ones 62 train, 8 choose the epoch (``near`` in the results),
8 calibrate; the far ones choose nothing. Finished (method, seed) pairs are kept in runs/ammonia and
not run again; rows go to benchmarks/results/ammonia.json. ``ensemble`` of seed s has the plain members
of seeds s, s+1, ... s+4 (a seed sets the order of the frames and all noise).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from blip_ft.closed_form.fitter import ClosedFormFitter
from blip_ft.config import Recipe, parse_recipe
from blip_ft.families.model import drawing
from blip_ft.potential.calibration import Calibration
from blip_ft.potential.checkpoint import load_model, save_model
from blip_ft.training.evaluate import draws_of
from blip_ft.training.fit import Prepared, prepare
from blip_ft.training.loop import device_of, train
from blip_ft.uncertainty.calibration import calibrate, rmse_calibration
from blip_ft.uncertainty.metrics import bootstrap_ci, per_frame, set_metrics
from blip_ft.uncertainty.predict import Method, predict_set
from blip_ft.uncertainty.results import SetPrediction

FILE = "NH3_BP86.extxyz.gz"
HERE = Path(__file__).parent
OUT = HERE / "results" / "ammonia.json"
TUNED = HERE / "results" / "ammonia-plain.json"
HEATED = HERE / "results" / "ammonia-temperature.json"
KEPT = Path("runs/ammonia")
MEMBERS = 5
#: of Lightning's Trainer; set by ``--accelerator``
ACCELERATOR = "auto"
SETS = ("near", "calibration", "far")
RATES, EPOCHS = (3e-4, 1e-3, 3e-3), (60, 120)
#: of ``adaptive``, which counts its KL once per structure, far lower ones
TEMPERATURES = {
    "channel": (3e-6, 3e-5, 3e-4, 3e-3),
    "weight": (3e-6, 3e-5, 3e-4, 3e-3),
    "adaptive": (3e-8, 3e-7, 3e-6, 3e-5),
}
#: what each method changes in the recipe; the variants share the training of ``default``
POSTERIORS: dict[str, dict[str, Any]] = {
    "default": {},
    "subspace": {"posterior": {"family": "subspace"}},
    **{f: {"posterior": {"family": f, "prior_scale": 0.1}} for f in TEMPERATURES},
}
LAPLACE = {"posterior": {"family": "posthoc_laplace"}}
VARIANTS = ("linear", "full_width")
METHODS = ("null", "plain", "ensemble", "posthoc_laplace", *POSTERIORS, *VARIANTS)

Predictions = dict[str, SetPrediction]


def recipe_for(
    folder: Path, seed: int, method: str, rate: float, epochs: int, temperature: float | None = None
) -> Recipe:
    """The recipe of one training; the noise scales are those of the labels' own precision.

    ``temperature`` is that of a factorised family, by default the best that ``heat`` has found.
    """
    file = folder / FILE
    tree: dict[str, Any] = {
        "name": f"ammonia-{method}-{seed}",
        "seed": seed,
        "data": {
            "train": f"{file}@0:62",
            "validation": f"{file}@62:78:2",
            "calibration": f"{file}@63:78:2",
            "test": {"far": f"{file}@78:138"},
        },
        "model": {"adapter": "sevennet", "checkpoint": "7net-0", "noise": "scalar"},
        "objective": {"energy_std": 0.002, "forces_std": 0.01},
        "optimizer": {"learning_rate": rate},
        "trainer": {"max_epochs": epochs, "gradient_clip_val": 10.0, "accelerator": ACCELERATOR},
    }
    for section, values in (LAPLACE if method == "plain" else POSTERIORS[method]).items():
        tree.setdefault(section, {}).update(values)
    if method in TEMPERATURES:
        tree["objective"]["temperature"] = temperature or best_temperature(method)
    return parse_recipe(tree)


def best_plain() -> dict[str, Any]:
    rows: list[dict[str, Any]] = json.loads(TUNED.read_text())
    return min(rows, key=lambda r: r["validation_force_mae"])


def best_temperature(method: str) -> float:
    rows = [r for r in json.loads(HEATED.read_text()) if r["method"] == method]
    return float(min(rows, key=lambda r: r["validation_force_nll"])["temperature"])


def predictions(prepared: Prepared, draws: int | None, method: Method = "draws") -> Predictions:
    names = {"near": "validation", "calibration": "calibration", "far": "far"}
    return {
        name: predict_set(
            prepared.potential,
            prepared.sets[role],
            name,
            n_draws=draws and draws_of(prepared.recipe, role, draws),
            stress=False,
            method=method,
        )
        for name, role in names.items()
    }


# ---- methods ---------------------------------------------------------------------------------


def trained(recipe: Recipe, console: Console, *, plain: bool) -> Prepared:
    """A finished training; its history, and what the posterior's fit found, are kept beside the predictions."""
    prepared = prepare(recipe, console)
    with tempfile.TemporaryDirectory() as log:
        history = train(recipe, prepared.potential, prepared.sets, Path(log), console, plain=plain)
    prepared.potential.to(device_of(recipe))  # Lightning has moved it to the CPU
    KEPT.mkdir(parents=True, exist_ok=True)
    found = {"history": history, "fits": prepared.potential.fit_reports}
    (KEPT / f"{recipe.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return prepared


def run_plain(
    folder: Path, seed: int, rate: float, epochs: int, console: Console, *, laplace: bool = False
) -> dict[str, Predictions]:
    """Plain fine-tuning, and the Laplace covariance around it if wanted."""
    recipe = recipe_for(folder, seed, "plain", rate, epochs)
    prepared = trained(recipe, console, plain=True)
    out = {"plain": predictions(prepared, 0)}
    if laplace:
        ClosedFormFitter(recipe, prepared.potential, prepared.sets, console).fit(final=True)
        out["posthoc_laplace"] = predictions(prepared, recipe.uncertainty.n_draws)
    return out


def run_posterior(
    folder: Path, seed: int, method: str, rate: float, epochs: int, console: Console
) -> dict[str, Predictions]:
    """One training; ``default`` also gives its variants."""
    recipe = recipe_for(folder, seed, method, rate, epochs)
    prepared = trained(recipe, console, plain=False)
    out = {method: predictions(prepared, recipe.uncertainty.n_draws)}
    if method == "default":
        kept_run = KEPT / f"run-{seed}"  # for flatness.py
        save_model(prepared.potential, kept_run / "model")
        (kept_run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        (kept_run / "receipt.json").write_text(json.dumps({"posterior": prepared.potential.fit_reports}))
        out |= {name: variant(prepared, name) for name in VARIANTS}
    return out


def variant(prepared: Prepared, name: str) -> Predictions:
    """Error bars of the default's model without draws, or of draws at the posterior's own width."""
    if name == "linear":
        return predictions(prepared, None, "linear")
    with drawing(prepared.potential, prepared.potential.n_draws, 1.0):
        return predictions(prepared, prepared.recipe.uncertainty.n_draws)


def variant_of_saved(folder: Path, seed: int, name: str, console: Console) -> dict[str, Predictions]:
    """That of the model which an earlier run has left."""
    model = KEPT / f"run-{seed}" / "model"
    if not model.is_dir():
        raise SystemExit(f"{model} does not exist: run default first")
    best = best_plain()
    recipe = recipe_for(folder, seed, "default", best["learning_rate"], best["epochs"])
    saved = load_model(model, device=str(device_of(recipe)))
    return {name: variant(dataclasses.replace(prepare(recipe, console), potential=saved), name)}


def ensemble(members: list[Predictions]) -> Predictions:
    """Mean and sample std (divisor K - 1) over members."""
    out = {}
    for name in members[0]:
        parts = [m[name] for m in members]
        energy = np.stack([p.energy for p in parts])
        forces = np.stack([p.forces for p in parts])
        out[name] = dataclasses.replace(
            parts[0],
            energy=energy.mean(axis=0),
            forces=forces.mean(axis=0),
            energy_std=energy.std(axis=0, ddof=1),
            forces_std=forces.std(axis=0, ddof=1),
            stress_std=np.full_like(parts[0].stress, np.nan),
            forces_std_norm=None,
        )
    return out


def energy_null(plain: Predictions) -> Predictions:
    """Plain predictions with the predicted energy, ranked, in place of an uncertainty.

    Its size is the energy above the lowest calibration frame, eV per atom, times 1 eV/Å per eV;
    calibration scales it like any other error bar.
    """
    floor = (plain["calibration"].energy / plain["calibration"].n_atoms).min()
    out = {}
    for name, p in plain.items():
        excess = np.clip(p.energy / p.n_atoms - floor, 1e-4, None)
        per_atom = np.repeat(excess, p.n_atoms)
        out[name] = dataclasses.replace(
            p,
            energy_std=excess * p.n_atoms,
            forces_std=np.repeat(per_atom[:, None], 3, axis=1),
            stress_std=np.full_like(p.stress, np.nan),
            forces_std_norm=None,
        )
    return out


# ---- keeping ---------------------------------------------------------------------------------


def kept(method: str, seed: int, make: Callable[[], dict[str, Predictions]] | None = None) -> Predictions:
    """Predictions of a finished pair, made if need be."""
    folder = KEPT / f"{method}-{seed}"
    if not (folder / "far.npz").is_file():
        if make is None:
            raise SystemExit(f"{folder} does not exist: run that method first")
        for name, sets in make().items():
            target = KEPT / f"{name}-{seed}"
            target.mkdir(parents=True, exist_ok=True)
            for part, prediction in sets.items():
                prediction.save(target / f"{part}.npz")
    return {name: SetPrediction.load(folder / f"{name}.npz") for name in SETS}


def collect(
    folder: Path,
    seed: int,
    seeds: list[int],
    methods: list[str],
    rate: float,
    epochs: int,
    console: Console,
) -> dict[str, Predictions]:
    """Calibration-ready predictions of one seed; ``seeds`` are all that will be asked for."""
    out: dict[str, Predictions] = {}
    needed = range(seed, seed + MEMBERS) if "ensemble" in methods else [seed]
    for s in needed if {"plain", "ensemble", "null", "posthoc_laplace"} & set(methods) else []:
        laplace = s in seeds and "posthoc_laplace" in methods

        def make(s: int = s, laplace: bool = laplace) -> dict[str, Predictions]:
            return run_plain(folder, s, rate, epochs, console, laplace=laplace)

        plain = kept("plain", s, make)
        if s == seed:
            out["plain"] = plain
            out["null"] = energy_null(plain)
        if laplace and s == seed:
            out["posthoc_laplace"] = kept("posthoc_laplace", s, make)
    if "ensemble" in methods:
        out["ensemble"] = ensemble([kept("plain", s) for s in needed])
    for method in POSTERIORS:
        if method in methods:
            out[method] = kept(
                method,
                seed,
                lambda m=method: run_posterior(folder, seed, m, rate, epochs, console),
            )
    for method in VARIANTS:
        if method in methods:
            out[method] = kept(method, seed, lambda m=method: variant_of_saved(folder, seed, m, console))
    return out


def calibration_of(method: str, sets: Predictions) -> Calibration:
    if method == "plain":
        return rmse_calibration(sets["calibration"])
    return calibrate(sets["calibration"]).for_new_frames()


# ---- commands --------------------------------------------------------------------------------


def tune(folder: Path, console: Console) -> None:
    rows = []
    for epochs in EPOCHS:
        for rate in RATES:
            started = time.monotonic()
            near = run_plain(folder, 0, rate, epochs, console)["plain"]["near"]
            mae = 1e3 * float(np.abs(near.forces - near.forces_label).mean())
            rows.append({"learning_rate": rate, "epochs": epochs, "validation_force_mae": mae})
            print(
                f"{rate:8.1e} {epochs:4d} epochs  {mae:6.2f} meV/Å on validation, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    TUNED.write_text(json.dumps(rows, indent=1) + "\n")


def heat(folder: Path, console: Console) -> None:
    """Calibrated on the calibration frames, judged on the validation frames."""
    tuned = best_plain()
    rows = json.loads(HEATED.read_text()) if HEATED.is_file() else []
    for method, temperatures in TEMPERATURES.items():
        for temperature in temperatures:
            if any((r["method"], r["temperature"]) == (method, temperature) for r in rows):
                continue
            recipe = recipe_for(folder, 0, method, tuned["learning_rate"], tuned["epochs"], temperature)
            prepared = trained(recipe, console, plain=False)
            found = predictions(prepared, recipe.uncertainty.n_draws)
            near = set_metrics(found["near"], calibration_of(method, found))
            row = {"method": method, "temperature": temperature}
            row |= {f"validation_{k}": near[k] for k in ("force_nll", "force_mae_mev_per_ang")}
            rows.append(row)
            print(row, flush=True)
            HEATED.write_text(json.dumps(rows, indent=1) + "\n")


def run(folder: Path, seeds: list[int], methods: list[str], console: Console) -> None:
    best = best_plain()
    rows = json.loads(OUT.read_text()) if OUT.is_file() else []
    for seed in seeds:
        found = collect(folder, seed, seeds, methods, best["learning_rate"], best["epochs"], console)
        for method, sets in found.items():
            calibration = calibration_of(method, sets)
            for split in ("near", "far"):
                row = {"dataset": "ammonia", "method": method, "seed": seed, "split": split}
                rows = [r for r in rows if not all(r[k] == row[k] for k in row)]
                rows.append(row | set_metrics(sets[split], calibration))
        OUT.write_text(json.dumps(rows, indent=1) + "\n")
        compare(found, seed)
    table()


def compare(found: dict[str, Predictions], seed: int) -> None:
    """Paired bootstrap over far frames: each method minus the ensemble."""
    if "ensemble" not in found:
        return
    scores = {m: per_frame(s["far"], calibration_of(m, s)) for m, s in found.items()}
    for method, own in scores.items():
        if method == "ensemble":
            continue
        parts = []
        for key in ("force_crps_mev_per_ang", "force_nll"):
            if key in own and key in scores["ensemble"]:
                difference = own[key] - scores["ensemble"][key]
                low, high = bootstrap_ci(difference) or (np.nan, np.nan)
                parts.append(f"{key} {difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]")
        print(f"seed {seed}: {method} minus ensemble, far: " + ", ".join(parts), flush=True)


def table() -> None:
    shown = {
        "force_mae_mev_per_ang": "force MAE",
        "force_crps_mev_per_ang": "CRPS",
        "force_nll": "NLL",
        "coverage90": "cov 90",
        "energy_mae_mev_per_atom": "energy MAE",
        "energy_crps_mev_per_atom": "CRPS",
        "coverage90_energy": "cov 90",
        "partial_spearman_structure": "partial rho",
        "spearman_structure": "rho",
    }
    groups = defaultdict(list)
    for row in json.loads(OUT.read_text()):
        groups[row["split"], row["method"]].append(row)
    out = Table("set", "method", "seeds", *shown.values(), title="mean (std over seeds)")
    for (split, method), rows in sorted(groups.items(), key=lambda g: (g[0][0], METHODS.index(g[0][1]))):
        cells = []
        for key in shown:
            values = [r[key] for r in rows if r.get(key) is not None]
            cells.append(f"{np.mean(values):.2f} ({np.std(values):.2f})" if values else "-")
        out.add_row(split, method, str(len(rows)), *cells)
    Console(width=170).print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("tune", "heat", "run", "table"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--accelerator", choices=("auto", "cpu", "gpu"), default="auto")
    given = parser.parse_args()
    ACCELERATOR = given.accelerator
    progress = Console(stderr=True, quiet=True)
    if given.command == "table":
        table()
    elif given.command == "tune":
        tune(given.folder, progress)
    elif given.command == "heat":
        heat(given.folder, progress)
    else:
        run(given.folder, given.seeds, given.methods, progress)
