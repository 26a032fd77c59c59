"""``blip-finetune fit``: from a recipe to a trained, calibrated and judged potential.

Stages, each of which must succeed before the next starts; nothing is written before the last
check has passed:

1. load the pretrained model and the frames; check every frame;
2. compare labels with the pretrained model (units, signs);
3. convert, prove that step 0 is the pretrained model, fit the energy references;
4. plain fine-tuning, for comparison; then the objective from the pretrained weights again
   (``posthoc_laplace``: the covariance around the plain model);
5. fit the error bars on the calibration frames, judge on the test frames, write the run.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from ase import Atoms
from rich.console import Console

from blip_ft.backbone import Backbone, get_adapter
from blip_ft.checkpoint import require_space, save_model
from blip_ft.config import Recipe
from blip_ft.data import FrameDataset, Splits, check_frames, check_units, load_splits, splits_file
from blip_ft.data.context import load_context
from blip_ft.data.dataset import GraphCache, Item
from blip_ft.data.examine import DataReport, examine, without_bad_labels
from blip_ft.data.findings import Finding
from blip_ft.data.leaks import group_leaks
from blip_ft.data.references import References
from blip_ft.data.sources import mappings
from blip_ft.data.stream import FrameStream, make_stream
from blip_ft.errors import BlipError, DataError, RecipeError
from blip_ft.files import whole_file
from blip_ft.potential import BayesianPotential
from blip_ft.training import gates
from blip_ft.training.budget import fit_to_budget
from blip_ft.training.evaluate import Judgement, judge, linearity_of
from blip_ft.training.laplace import LaplaceFitter
from blip_ft.training.loop import device_of, train
from blip_ft.training.memory import Probe, describe, load_memory, load_probe
from blip_ft.training.receipt import make_receipt
from blip_ft.training.reference_shift import set_references, warn_outside
from blip_ft.training.replay import replayed
from blip_ft.training.scratch import initial
from blip_ft.training.subspace import groups_of
from blip_ft.uncertainty.ood import fit_distance

#: frames compared with the vendor's calculator in the step-0 gate
GATE_FRAMES = 48
#: disk space that a run may take, bytes
RUN_BYTES = 300_000_000


@dataclass
class Prepared:
    """Everything that exists once all checks have passed."""

    recipe: Recipe
    """as it is run: with what ``posterior.max_bytes`` leaves of it"""
    potential: BayesianPotential
    splits: Splits
    sets: dict[str, FrameDataset]
    findings: list[Finding]
    step_zero: gates.StepZero
    references: References | None
    references_check: dict[str, float] = field(default_factory=dict)
    replay: list[Atoms] = field(default_factory=list)
    context: list[Atoms] = field(default_factory=list)
    stream: Callable[[int, int], FrameStream] | None = None
    memory: list[Item] = field(default_factory=list)
    probe: Probe | None = None
    report: DataReport | None = None
    #: what the byte budget took away, in words
    reduced: list[str] = field(default_factory=list)


def is_rank_zero() -> bool:
    """Whether this process is the first of its run (the launcher sets the environment)."""
    return all(
        os.environ.get(k, "0") in ("", "0") for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")
    )


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
    lightning.seed_everything(recipe.seed, verbose=False)
    prepared = prepare(recipe, console)
    if is_rank_zero():
        try:
            if folder.exists():
                console.print(f"replacing the earlier run in {folder}")
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            raise BlipError(
                f"cannot write the run: {error}", file=folder, remedy="choose another 'output'"
            ) from error
    try:
        return _run(prepared.recipe, prepared, folder, console)
    except OSError as error:
        raise BlipError(
            f"writing failed: {error}", file=folder, remedy="free disk space; what was written so far is kept"
        ) from error


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise if a run exists already and may not be replaced, or if it cannot be written.

    Raises:
        RecipeError: it exists.
        CheckpointError: no permission or no space.
    """
    if folder.exists() and not overwrite:
        raise RecipeError(
            "a run of this name exists already",
            file=folder,
            field="name",
            remedy="choose another name=..., or give overwrite=true to replace it",
        )
    require_space(folder, RUN_BYTES)


# ---- checks --------------------------------------------------------------------------------


def prepare(recipe: Recipe, console: Console) -> Prepared:
    """Stages 1 to 3: load, check, convert, prove.

    Raises:
        BlipError: anything that would make training meaningless.
    """
    options = recipe.model
    splits = load_splits(recipe.data)
    backbone = get_adapter(options.adapter).load(options.checkpoint, trust=options.trust, **options.options)
    if recipe.objective.use_stress and not backbone.has_stress:
        raise RecipeError(
            f"'{options.checkpoint}' predicts no stress, so it cannot be trained on stress labels",
            field="objective.use_stress",
            remedy="objective.use_stress=false, or a model whose forces and stress come from its energy",
        )
    if options.from_scratch:
        backbone = initial(backbone, recipe.seed)
        console.print(backbone.origin["checkpoint"])
        if "rest" not in ([options.train] if isinstance(options.train, str) else options.train):
            console.print(
                "parameters outside linear blocks keep initial values: see model.train", style="yellow"
            )
    if options.dtype == "float64":
        backbone.double()
    findings = check_frames(splits, backbone) + group_leaks(splits)
    calculator = backbone.stock_calculator()
    report: DataReport | None = None
    if not options.from_scratch:  # initial weights know no units and no labels to compare with
        findings += check_units(
            splits.train,
            lambda atoms: gates.stock_predictions(calculator, atoms),
            use_stress=recipe.objective.use_stress,
        )
        splits, report = _labels_checked(recipe, splits, backbone, findings)
        findings = report.findings
    context = load_context(recipe.data, backbone, len(splits.train), console.print)
    replay = replayed(recipe, splits.train, backbone, context)
    reduced: list[str] = []
    n_frames = len(splits.train) + len(context) + math.ceil(recipe.posterior.context * len(splits.train))
    recipe = fit_to_budget(recipe, backbone, n_frames, reduced.append)
    options = recipe.model
    for line in reduced:
        console.print(line, markup=False)
    roles = {"train": splits.train, "validation": splits.validation, "calibration": splits.calibration}
    cache = GraphCache(1e9 * recipe.data.cache_gb)
    sets = {name: FrameDataset(d, backbone, cache) for name, d in {**roles, **splits.test}.items()}
    console.print(
        "frames: " + ", ".join(f"{name} {len(d)}" for name, d in sets.items()) + f"  ({splits.rule})",
        markup=False,
    )

    for line in sorted({text for d in sets.values() for text in mappings(d.frames)}):
        console.print(f"labels of {line}", markup=False)

    double = copy.deepcopy(backbone).double().stock_calculator()
    probe = _spread(sets, GATE_FRAMES)
    stock = gates.stock_predictions(calculator, probe)

    potential = BayesianPotential(
        backbone,
        options,
        recipe.posterior,
        seed=recipe.seed,
        n_draws=recipe.uncertainty.n_draws,
    )
    counts = potential.converted.report.counts
    console.print(
        f"converted {counts['converted']:,} weights: {counts['trained']:,} trained, {counts['noisy']:,} with noise; "
        f"{counts['left']:,} left as they are"
    )
    step_zero = gates.check_step_zero(
        potential, probe, stock, lambda atoms: gates.stock_predictions(double, atoms)
    )
    console.print(
        f"step 0 equals the vendor's calculator on {step_zero.n_frames} frames: "
        f"{step_zero.energy_ev_per_atom:.1e} eV/atom, {step_zero.forces_ev_per_ang:.1e} eV/Å"
        + (
            f" ({step_zero.n_checked_in_float64} of them in float64)"
            if step_zero.n_checked_in_float64
            else ""
        )
    )
    references, check, notes = set_references(recipe.data, potential, sets["train"], splits.isolated, console)
    findings += notes
    if references is not None:
        findings += warn_outside(references, sets)
    for finding in findings:
        style = None if finding.severity == "info" else "yellow"
        console.print(str(finding), style=style, soft_wrap=True, markup=False)  # [ ] are no styles here
    return Prepared(
        recipe,
        potential,
        splits,
        sets,
        findings,
        step_zero,
        references,
        check,
        replay,
        context,
        make_stream(recipe, splits, backbone),
        load_memory(recipe, potential),
        load_probe(recipe, potential),
        report,
        reduced,
    )


def _labels_checked(
    recipe: Recipe, splits: Splits, backbone: Backbone, findings: list[Finding]
) -> tuple[Splits, DataReport]:
    """The data report, and the splits without what the recipe wants dropped.

    Raises:
        DataError: ``data.bad_labels`` is ``stop`` and there are some, or nothing would be left.
    """
    report = examine(
        splits,
        backbone,
        findings=findings,
        use_stress=recipe.objective.use_stress,
        most=recipe.data.check_frames,
    )
    if report.bad and recipe.data.bad_labels == "drop":
        return without_bad_labels(splits, report), report
    if report.bad and recipe.data.bad_labels == "stop":
        role, bad = next(iter(report.bad.items()))
        index, reason = next(iter(bad.items()))
        row = splits.roles()[role][index]
        n = sum(len(rows) for rows in report.bad.values())
        raise DataError(
            f"{n} frames have labels that do not belong to their structures, the first: {reason}",
            file=row["source"],
            frame=row["frame"],
            field=reason.partition(" ")[0],
            remedy="blip-finetune check lists all; mend or remove them, or set data.bad_labels to drop or warn",
        )
    return splits, report


def _spread(sets: dict[str, FrameDataset], n: int) -> list[Atoms]:
    """About ``n`` frames spread evenly over all sets, at least one of each."""
    total = sum(len(d) for d in sets.values())
    out: list[Atoms] = []
    for dataset in sets.values():
        share = min(len(dataset), max(1, round(n * len(dataset) / total)))
        out += [dataset[int(i)].atoms for i in torch.linspace(0, len(dataset) - 1, share).round()]
    return out


# ---- training and judgement ----------------------------------------------------------------


def _run(recipe: Recipe, prepared: Prepared, folder: Path, console: Console) -> dict[str, Any]:
    """Stages 4 and 5."""
    started = time.monotonic()
    potential, sets = prepared.potential, prepared.sets
    results: dict[str, Judgement] = {}
    if is_rank_zero():
        results["pretrained"] = judge(recipe, potential, sets, draws=0, console=console, what="pretrained")
    history: dict[str, list[dict[str, float]]] = {}
    drift: dict[str, dict[str, float]] = {}
    posthoc = recipe.posterior.family == "posthoc_laplace"
    compared = recipe.plain.enabled and bool(potential.mean_parameters)  # a frozen mean cannot be tuned
    if compared or posthoc:
        logs = folder / "plain" if compared else folder
        history["plain"] = train(
            recipe, potential, sets, logs, console, plain=True, stream=prepared.stream, memory=prepared.memory
        )
        if compared and is_rank_zero():
            results["plain"] = judge(recipe, potential, sets, draws=0, console=console, what="plain")
            drift |= _drift(prepared, "plain", console)
    if posthoc:
        potential.to(device_of(recipe))  # Lightning has moved it to the CPU
        LaplaceFitter(recipe, potential, sets, console, prepared.context).fit()
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
            replay=prepared.replay,
            context=prepared.context,
            stream=prepared.stream,
            memory=prepared.memory,
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
            prediction.save(folder / "predictions" / f"{model}-{name}.npz")
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
