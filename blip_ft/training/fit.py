"""``blip-finetune fit``: from a recipe to a trained, calibrated and judged potential.

Stages, each of which must succeed before the next starts; nothing is written before the last
check has passed:

1. load the pretrained model and the frames; check every frame;
2. compare labels with the pretrained model (units, signs);
3. convert, prove that step 0 is the pretrained model, fit the energy references;
4. plain fine-tuning, for comparison; then the objective from the pretrained weights again
   (families that come after it: the covariance around the plain model);
5. fit the error bars on the calibration frames, judge on the test frames, write the run.

Stages 1 to 3 are :mod:`blip_ft.training.prepare`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from blip_ft.closed_form.fitter import ClosedFormFitter
from blip_ft.closed_form.gradients import groups_of
from blip_ft.config import Recipe
from blip_ft.data.split import splits_file
from blip_ft.errors import BlipError, RecipeError
from blip_ft.files import check_unused, file_name, remedy_of, sole_writer, whole_file
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import require_space, save_model
from blip_ft.ranks import is_rank_zero
from blip_ft.training.device import device_of
from blip_ft.training.evaluate import Judgement, judge, linearity_of
from blip_ft.training.memory import describe
from blip_ft.training.prepare import Prepared, prepare
from blip_ft.training.receipt import make_receipt
from blip_ft.uncertainty.ood import fit_distance

#: disk space that a run may take, bytes
RUN_BYTES = 300_000_000


def fit(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe.

    Args:
        recipe: a validated recipe (``blip_ft.config.load_recipe``).
        console: where progress is printed; by default standard error.

    Returns:
        What ``metrics.json`` holds: ``pretrained``, ``plain`` and ``blip``, each by test set.
        Empty on ranks other than 0.

    Raises:
        BlipError: bad input; nothing has been written. An error while writing names the file.
    """
    console = console or Console(stderr=True, quiet=not is_rank_zero())
    folder = recipe.folder
    if is_rank_zero():
        check_folder(folder, overwrite=recipe.overwrite)
    seed_everything(recipe.seed)
    prepared = prepare(recipe, console)
    if not is_rank_zero():
        return _run(prepared.recipe, prepared, folder, console)
    _make_folder(folder, console, overwrite=recipe.overwrite)
    try:
        with sole_writer(folder):
            return _run(prepared.recipe, prepared, folder, console)
    except OSError as error:
        raise BlipError(
            f"writing failed: {error}",
            file=folder,
            remedy=f"{remedy_of(error)}; what was written so far is kept",
        ) from error


def _make_folder(folder: Path, console: Console, *, overwrite: bool) -> None:
    """An empty folder for the run. That of an earlier one is replaced only if it may be: minutes after the first look
    another program may have made it.

    Raises:
        RecipeError: it exists.
        BlipError: another program writes there, or it cannot be made.
    """
    try:
        if overwrite and folder.exists():
            check_unused(folder)
            console.print(f"replacing the earlier run in {folder}")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise _exists(folder, "a run of this name has appeared since this one started") from error
    except OSError as error:
        raise BlipError(
            f"cannot write the run: {error}",
            file=folder,
            remedy=remedy_of(error),
        ) from error


def _exists(folder: Path, problem: str) -> RecipeError:
    return RecipeError(
        problem,
        file=folder,
        field="name",
        remedy="choose another name=..., or give overwrite=true to replace it",
    )


def seed_everything(seed: int) -> None:
    """Seed what vendors draw from; our own noise has keys. As Lightning's, which takes seconds to import."""
    os.environ |= {"PL_GLOBAL_SEED": str(seed), "PL_SEED_WORKERS": "0"}  # for the ranks that it starts
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise if a run exists already and may not be replaced, or if it cannot be written.

    Raises:
        RecipeError: it exists.
        BlipError: another program writes there.
        CheckpointError: no permission or no space.
    """
    if folder.exists() and not overwrite:
        raise _exists(folder, "a run of this name exists already")
    check_unused(folder)
    require_space(folder, RUN_BYTES)


def _run(recipe: Recipe, prepared: Prepared, folder: Path, console: Console) -> dict[str, Any]:
    """Stages 4 and 5."""
    # here, because Lightning takes seconds to import: bad data are told before
    from blip_ft.training.loop import train

    started = time.monotonic()
    potential, sets = prepared.potential, prepared.sets
    results: dict[str, Judgement] = {}
    if is_rank_zero():
        results["pretrained"] = judge(
            recipe, potential, sets, draws=0, console=console, what="pretrained", ledger=prepared.ledger
        )
    if prepared.ledger is not None:
        prepared.ledger.close()  # the mean moves from here on
    history: dict[str, list[dict[str, float]]] = {}
    drift: dict[str, dict[str, float]] = {}
    posthoc = recipe.posterior.after_plain
    compared = recipe.plain.enabled and bool(potential.mean_parameters)  # a frozen mean cannot be tuned
    if compared or posthoc:
        logs = folder / "plain" if compared else folder
        history["plain"] = train(
            recipe, potential, sets, logs, console, plain=True, stream=prepared.stream, frames=prepared.frames
        )
        if compared and is_rank_zero():
            results["plain"] = judge(recipe, potential, sets, draws=0, console=console, what="plain")
            drift |= _drift(prepared, "plain", console)
    if posthoc:
        potential.to(device_of(recipe))  # Lightning has moved it to the CPU
        ClosedFormFitter(recipe, potential, sets, console).fit(final=True)
        history["blip"] = history["plain"]
    else:
        reset_mean(potential)
        history["blip"] = train(
            recipe,
            potential,
            sets,
            folder,
            console,
            plain=False,
            frames=prepared.frames,
            context=prepared.context,
            stream=prepared.stream,
        )
    if not is_rank_zero():
        return {}
    train_frames = sets["train"]
    potential.ood = fit_distance(potential.to(device_of(recipe)), train_frames, groups_of(train_frames))
    results["blip"] = judge(
        recipe, potential, sets, draws=recipe.uncertainty.n_draws, console=console, what="BLIP"
    )
    drift |= _drift(prepared, "blip", console)
    if drift:
        with whole_file(folder / "drift.json") as file:
            json.dump(drift, file, indent=1)
    potential.calibration = results["blip"].calibration
    linearity = linearity_of(recipe, potential, sets, console)
    save_model(potential, folder / "model")
    receipt = make_receipt(recipe, prepared, seconds=time.monotonic() - started)
    return write_run(recipe, prepared, results, history, receipt, folder, console, drift, linearity)


def _drift(prepared: Prepared, model: str, console: Console) -> dict[str, dict[str, float]]:
    """Change from the pretrained model on the probe frames; nothing where the recipe names none."""
    if prepared.probe is None:
        return {}
    found = prepared.probe.drift(prepared.potential)
    console.print(f"drift ({model}): {describe(found)}")
    return {model: found}


def reset_mean(potential: BayesianPotential) -> None:
    """Put the mean back to the pretrained weights."""
    potential.converted.reset_mean()
    potential.prior.restore_rest()


def write_run(
    recipe: Recipe,
    prepared: Prepared,
    results: dict[str, Judgement],
    history: dict[str, list[dict[str, float]]],
    receipt: dict[str, Any],
    folder: Path,
    console: Console,
    drift: dict[str, dict[str, float]],
    linearity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``metrics.json``, ``receipt.json``, ``recipe.yaml``, predictions and the report."""
    import yaml

    from blip_ft.report import demo_table, write_report
    from blip_ft.uncertainty.signatures import find_signatures

    metrics = {name: r.metrics for name, r in results.items()}
    calibration = results["blip"].calibration
    signatures = find_signatures(metrics=metrics["blip"], calibration=calibration, history=history["blip"])
    splits = prepared.splits
    report = prepared.report
    data = None if report is None else report.to_json() | {"frames": report.frames}
    files = {
        "recipe.yaml": yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
        "splits.json": json.dumps(splits_file.to_json(splits.roles(), splits.rule, splits.dropped)),
        "receipt.json": json.dumps(receipt, indent=1),
        "calibration.json": json.dumps(calibration.to_dict(), indent=1),
        "history.json": json.dumps(history, indent=1),
        "metrics.json": json.dumps(metrics, indent=1),
        "data_report.json": json.dumps(data, indent=1),
    }
    if linearity is not None:
        files["linearity.json"] = json.dumps(linearity, indent=1)
    for name, text in files.items():
        with whole_file(folder / name) as file:
            file.write(text)
    (folder / "predictions").mkdir(exist_ok=True)
    for model, result in results.items():
        for name, prediction in result.predictions.items():
            prediction.save(folder / "predictions" / f"{model}-{file_name(name)}.npz")
    write_report(
        folder,
        recipe=recipe.model_dump(mode="json"),
        metrics=metrics,
        predictions={name: r.predictions for name, r in results.items()},
        calibration=calibration,
        history=history,
        receipt=receipt,
        findings=prepared.findings,
        signatures=signatures,
        data=data,
        drift=drift,
        linearity=linearity,
    )
    for signature in signatures:
        console.print(
            f"{signature.severity}: {signature.message}\n  What to do: {signature.remedy}", style="yellow"
        )
    Console().print(demo_table(metrics))
    console.print(f"report: {folder / 'report.html'}   model: {folder / 'model'}")
    return metrics
