"""``blip-finetune fit``: from a recipe to a trained, calibrated and judged potential.

Stages, each of which must succeed before the next starts; what fails before training leaves nothing:

1. load the pretrained model and the frames; check every frame;
2. compare labels with the pretrained model (units, signs);
3. convert, prove that step 0 is the pretrained model, fit the energy references;
4. plain fine-tuning, for comparison; then the objective from the pretrained weights again
   (families that come after it: the covariance around the plain model);
5. fit the error bars on the calibration frames, judge on the test frames, write the run.

Stages 1 to 3 are :mod:`blip_ft.training.prepare`. What each stage leaves for ``blip-finetune resume``:
:mod:`blip_ft.training.pieces`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from blip_ft.closed_form.fitter import ClosedFormFitter
from blip_ft.closed_form.gradients import groups_of
from blip_ft.closed_form.statistics_file import write_statistics
from blip_ft.config import Recipe, apply_override, parse_recipe
from blip_ft.data.split import splits_file
from blip_ft.errors import BlipError, CheckpointError, RecipeError
from blip_ft.files import file_name, remedy_of, whole_file
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import save_model
from blip_ft.system.ranks import is_rank_zero
from blip_ft.system.signals import Interrupts, Stopped, requeue
from blip_ft.training.device import device_of
from blip_ft.training.evaluate import Evaluated, evaluate, linearity_of
from blip_ft.training.kept_ledger import check_same, keep_ledger, recall_ledger
from blip_ft.training.pieces import Pieces
from blip_ft.training.prepare import Prepared, prepare
from blip_ft.training.replay import describe
from blip_ft.training.run_folder import (
    RECORD,
    VARIABLE,
    RunFolder,
    followed,
    new_run,
    old_run,
    read_record,
    requeued,
)
from blip_ft.training.run_record import make_record
from blip_ft.training.stages import Run
from blip_ft.training.state import keep_state, recall_state
from blip_ft.uncertainty.ood import fit_distance

#: keys of a recipe that may change when a run goes on: they change how it works, not what it comes to
CHANGEABLE = frozenset(
    {"optimizer.broken", "keep_pieces", "data.num_workers", "data.cache_gb", "trainer.enable_progress_bar"}
)


def fit(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe; where an earlier start of the same SLURM job has begun it, go on.

    Args:
        recipe: a validated recipe (``blip_ft.config.load_recipe``).
        console: where progress is printed; by default standard error.

    Returns:
        What ``metrics.json`` holds: ``pretrained``, ``plain`` and ``blip``, each by test set.
        Empty on ranks other than 0.

    Raises:
        BlipError: bad input; before training has begun nothing is left. An error while writing names the file.
        Stopped: a signal has ended the run; what is done is kept.
    """
    console = console or Console(stderr=True, quiet=not is_rank_zero())
    if not is_rank_zero():
        return _run(recipe, followed(recipe, None), console)
    if requeued(recipe):
        return resume(recipe.folder, console, trust=recipe.model.trust)
    with new_run(recipe) as run:
        if run.folder != run.final:
            console.print(f"replacing the earlier run in {run.final} once this one is whole", markup=False)
        return _run(recipe, run, console)


def resume(
    folder: Path, console: Console | None = None, *, trust: bool = False, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """Go on with a run that was ended, from the last whole piece.

    Args:
        folder: of the run.
        console: where progress is printed; by default standard error.
        trust: open the pickled file that its recipe trusts.
        changes: ``key=value`` of :data:`CHANGEABLE`.

    Returns:
        As :func:`fit`.

    Raises:
        BlipError: no run, or its data have changed.
        Stopped: as :func:`fit`.
    """
    console = console or Console(stderr=True, quiet=not is_rank_zero())
    if not is_rank_zero():
        place = followed(None, folder)
        with in_directory_of(read_record(place)):
            return _run(changed(place, changes), place, console)
    with old_run(folder) as run:
        recipe = changed(run.folder, changes)
        if recipe.model.trust and not trust:
            raise CheckpointError(
                "its recipe opens a pickled file, which can run code",
                file=run.folder,
                field="model.trust",
                remedy=f"blip-finetune resume {folder} --trust, if the file is from somebody you trust",
            )
        if run.whole:  # it was ended between its last file and its last name
            _end(recipe, run, Pieces(run.folder, console))
            console.print(f"this run is whole: {run.final / 'report.html'}", markup=False)
            return dict(json.loads((run.final / "metrics.json").read_text(encoding="utf-8")))
        with in_directory_of(run.record):
            return _run(recipe, run, console)


def in_directory_of(record: Mapping[str, Any] | None) -> AbstractContextManager[None]:
    """In the directory in which a run was begun, where it is still there: paths of the recipe are relative to it."""
    directory = Path((record or {}).get("directory", "."))
    return chdir(directory) if directory.is_dir() else nullcontext()


def changed(folder: Path, changes: Sequence[str]) -> Recipe:
    """The recipe of a run, with what may change when it goes on.

    Raises:
        RecipeError: another key.
        CheckpointError: no run.
    """
    record = read_record(folder)
    if record is None:
        raise CheckpointError("no run", file=folder, remedy="give the folder of a run")
    tree = record["recipe"]
    for change in changes:
        if (key := change.partition("=")[0]) not in CHANGEABLE:
            raise RecipeError(
                f"'{key}' is what the run was begun with",
                field=key,
                remedy=f"these may change: {', '.join(sorted(CHANGEABLE))}; for others begin another run",
            )
        apply_override(tree, change)
    return parse_recipe(tree, file=folder / RECORD)


def _run(recipe: Recipe, run: RunFolder | Path, console: Console) -> dict[str, Any]:
    """A run from its beginning, or from what there is of it.

    Args:
        recipe: options.
        run: its folder; a path on ranks other than 0.
        console: for progress.
    """
    folder = run if isinstance(run, Path) else run.folder
    interrupts = Interrupts()
    with interrupts.handled(), told_to_ranks(folder), said_when_stopped(folder, console):
        seed_everything(recipe.seed)
        pieces = Pieces(folder, console, writes=isinstance(run, RunFolder))
        known, before = recall_ledger(pieces)
        prepared = prepare(recipe, console, known)
        check_same(prepared, before, console)

        def begun() -> None:
            if isinstance(run, RunFolder):
                run.begun = True

        return _train_and_judge(prepared.recipe, prepared, run, console, Run(pieces, interrupts, begun))


@contextmanager
def said_when_stopped(folder: Path, console: Console) -> Iterator[None]:
    """Say what is kept when a signal ends a run, and how to go on; SIGUSR1 gives it a place in SLURM's queue."""
    try:
        yield
    except Stopped as stopped:
        if is_rank_zero():
            console.print(
                f"{stopped}: ended; what is done is kept in {folder}. Go on with: blip-finetune resume {folder}",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
            if stopped.number == getattr(signal, "SIGUSR1", None):
                console.print(requeue(), markup=False, soft_wrap=True)
        raise


@contextmanager
def told_to_ranks(folder: Path) -> Iterator[None]:
    """Tell the ranks that Lightning starts on this machine where the run is."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def seed_everything(seed: int) -> None:
    """Seed what vendors draw from; our own noise has keys. As Lightning's, which takes seconds to import."""
    os.environ |= {"PL_GLOBAL_SEED": str(seed), "PL_SEED_WORKERS": "0"}  # for the ranks that it starts
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _train_and_judge(
    recipe: Recipe, prepared: Prepared, run: RunFolder | Path, console: Console, of: Run
) -> dict[str, Any]:
    """Stages 4 and 5."""
    # here, because Lightning takes seconds to import: bad data are told before
    from blip_ft.training.loop import train

    started = time.monotonic()
    folder = run if isinstance(run, Path) else run.folder
    potential, sets, pieces = prepared.potential, prepared.sets, of.pieces
    assert pieces is not None
    results: dict[str, Evaluated] = {}
    if is_rank_zero():
        results["pretrained"] = evaluate(
            recipe, potential, sets, draws=0, console=console, what="pretrained", ledger=prepared.ledger
        )
        keep_ledger(pieces, prepared)
    if prepared.ledger is not None:
        prepared.ledger.close()  # the mean moves from here on
    history: dict[str, list[dict[str, float]]] = {}
    drift: dict[str, dict[str, float]] = {}
    posthoc = recipe.posterior.after_plain
    compared = recipe.plain.enabled and bool(potential.mean_parameters)  # a frozen mean cannot be tuned
    if compared or posthoc:
        logs = folder / "plain" if compared else folder
        history["plain"] = train(
            recipe,
            potential,
            sets,
            logs,
            console,
            plain=True,
            stream=prepared.stream,
            frames=prepared.frames,
            run=of,
        )
        if compared:
            results["plain"] = evaluate(
                recipe, potential, sets, draws=0, console=console, what="plain", pieces=pieces
            )
            if is_rank_zero():
                drift |= _drift(prepared, "plain", console)
    whole = recall_state(pieces, "posterior", potential)
    if whole is not None:
        history["blip"] = whole["history"]
    elif posthoc:
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
            run=of,
        )
    potential.to(device_of(recipe))
    if whole is None:
        train_frames = sets["train"]
        potential.ood = fit_distance(potential, train_frames, groups_of(train_frames))
        keep_state(pieces, "posterior", potential, statistics=True, history=history["blip"])
    results["blip"] = evaluate(
        recipe,
        potential,
        sets,
        draws=recipe.uncertainty.n_draws,
        console=console,
        what="BLIP",
        pieces=pieces,
    )
    if isinstance(run, Path):
        return {}
    drift |= _drift(prepared, "blip", console)
    potential.calibration = results["blip"].calibration
    linearity = linearity_of(recipe, potential, sets, console)
    receipt = make_record(recipe, prepared, seconds=time.monotonic() - started)

    def write(place: Path) -> dict[str, Any]:
        if drift:
            with whole_file(place / "drift.json") as file:
                json.dump(drift, file, indent=1)
        save_model(potential, place / "model")
        write_statistics(potential, place)
        return write_run(recipe, prepared, results, history, receipt, place, console, drift, linearity)

    metrics = write_or_elsewhere(write, run)
    run.write_record(state="whole")  # before its pieces go
    _end(recipe, run, pieces)
    console.print(f"report: {run.final / 'report.html'}   model: {run.final / 'model'}")
    return metrics


def _end(recipe: Recipe, run: RunFolder, pieces: Pieces) -> None:
    """What is left to do for a run that is whole."""
    if not recipe.keep_pieces:
        pieces.clear()
    run.finish()


def write_or_elsewhere(write: Callable[[Path], dict[str, Any]], run: RunFolder) -> dict[str, Any]:
    """Write what a run has led to; where its folder cannot take it, into a temporary one.

    Raises:
        BlipError: it could not be written where it belongs; says where it is.
    """
    try:
        return write(run.folder)
    except (OSError, BlipError) as error:
        problem = error.problem if isinstance(error, BlipError) else f"writing failed: {error}"
        why = error.remedy if isinstance(error, BlipError) else remedy_of(error)
        place = "nothing of the results could be written elsewhere"
        with suppress(OSError, BlipError):
            other = Path(tempfile.mkdtemp(prefix=f"{run.final.name}-"))
            write(other)
            place = f"model, metrics and report are in {other}"
        raise BlipError(
            f"{problem}; {place}",
            file=run.folder,
            remedy=f"{why}; then blip-finetune resume {run.final} writes the run where it belongs",
        ) from error


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
    results: dict[str, Evaluated],
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
    from blip_ft.uncertainty.diagnostics import find_diagnostics

    metrics = {name: r.metrics for name, r in results.items()}
    calibration = results["blip"].calibration
    signatures = find_diagnostics(metrics=metrics["blip"], calibration=calibration, history=history["blip"])
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
    return metrics
