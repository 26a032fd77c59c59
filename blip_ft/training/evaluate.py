"""Judge a potential: predictions on every set, calibration, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from blip_ft.config import Recipe
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.batch.ledger import Ledger
from blip_ft.files import file_name
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.system import divided
from blip_ft.system.progress import progress
from blip_ft.training.device import device_of
from blip_ft.training.pieces import Pieces
from blip_ft.uncertainty.calibration import calibrate, rmse_calibration
from blip_ft.uncertainty.linearity import study
from blip_ft.uncertainty.metrics import metrics_table
from blip_ft.uncertainty.predict import frame_names, predict_set
from blip_ft.uncertainty.results import SetPrediction

#: batches of predictions in one piece
KEPT = 8
#: sets that are not judged on
ROLES = ("train", "validation", "calibration")


@dataclass
class Evaluated:
    """Predictions by set, the error bars fitted for them, and metrics by test set."""

    predictions: dict[str, SetPrediction]
    calibration: Calibration
    metrics: dict[str, dict[str, Any]]


def evaluate(
    recipe: Recipe,
    potential: BayesianPotential,
    sets: dict[str, FrameDataset],
    *,
    draws: int,
    console: Console,
    what: str,
    ledger: Ledger | None = None,
    pieces: Pieces | None = None,
) -> Evaluated:
    """Predict all held-out sets; fit error bars on calibration frames, metrics on test frames; on every rank alike.

    Args:
        recipe: options.
        potential: the model as it is now.
        sets: all sets of the run.
        draws: posterior draws, at least ``uncertainty.calibration_draws`` on the calibration frames; with 0
            the error bar is one constant, the model's RMSE on the validation frames (what a user of plain
            fine-tuning would quote).
        console: for progress.
        what: name of the model, for progress.
        ledger: where the model is the pretrained one, with ``draws=0``: what it has already said.
        pieces: where predictions are kept, and are from an earlier start of the run.
    """
    potential.to(device_of(recipe))
    wanted = {n: d for n, d in sets.items() if n != "train" and len(d)}
    predictions: dict[str, SetPrediction] = {}
    with progress(console, f"predicting ({what})", sum(len(d) for d in wanted.values())) as advance:
        for name, dataset in wanted.items():
            if ledger is not None:
                predictions[name] = remembered(potential, dataset, name, ledger, progress=advance)
                continue
            n_draws, batch_size = draws_of(recipe, name, draws), recipe.uncertainty.batch_size
            predictions[name] = predict_kept(
                potential, dataset, name, n_draws, batch_size, pieces, what=what, progress=advance
            )
    calibration = (
        calibrate(predictions["calibration"]).for_new_frames()
        if draws
        else rmse_calibration(predictions["validation"])
    )
    tests = {n: p for n, p in predictions.items() if n not in ROLES}
    return Evaluated(predictions, calibration, metrics_table(tests, calibration, seed=recipe.seed))


def predict_kept(
    potential: BayesianPotential,
    dataset: FrameDataset,
    name: str,
    n_draws: int,
    batch_size: int,
    pieces: Pieces | None,
    *,
    what: str,
    progress: Callable[[int], Any] = lambda n: None,
) -> SetPrediction:
    """What ``predict_set`` gives; ranks divide it, :data:`KEPT` batches at a time at most, each kept as a piece.

    Args:
        potential: the model.
        dataset: labelled frames.
        name: of the set.
        n_draws: see ``predict_set``.
        batch_size: structures per call.
        pieces: where; ``None``: nowhere.
        what: name of the model, for the pieces.
        progress: called with the number of frames done.
    """
    per_rank = -(-len(dataset) // (batch_size * divided.world_size()))
    size = batch_size * max(1, min(KEPT, per_rank))

    def work(starts: list[int]) -> list[SetPrediction]:
        return [part(range(start, min(start + size, len(dataset)))) for start in starts]

    def part(index: range) -> SetPrediction:
        piece = f"predictions-{what}-{file_name(name)}-{index.start}"
        found = None if pieces is None else pieces.file(piece)
        if found is not None and found[1] == {"frames": len(index), "draws": n_draws}:
            progress(len(index))
            return SetPrediction.load(found[0])
        some = dataset if len(index) == len(dataset) else dataset.select(index)
        with potential.posterior.unwatched():
            made = predict_set(
                potential, some, name, n_draws=n_draws, batch_size=batch_size, progress=progress
            )
        if pieces is not None:
            pieces.keep(piece, ".npz", made.save, {"frames": len(index), "draws": n_draws}, any_rank=True)
        return made

    return SetPrediction.concatenate(divided.divided(work, range(0, len(dataset), size)), name)


def remembered(
    potential: BayesianPotential,
    dataset: FrameDataset,
    name: str,
    ledger: Ledger,
    progress: Callable[[int], Any] = lambda n: None,
) -> SetPrediction:
    """What ``predict_set`` gives of the pretrained model, from its ledger.

    Args:
        potential: for its references, which the ledger does not know.
        dataset: labelled frames.
        name: of the set.
        ledger: asks the model about frames that it does not know.
        progress: called with the number of frames done.
    """
    items = [dataset[i] for i in range(len(dataset))]
    known = ledger.ask(items, progress)
    shift = [sum(potential.references.get(int(z), 0.0) for z in i.atoms.numbers) for i in items]
    nothing = np.full(6, np.nan)
    return SetPrediction(
        name=name,
        n_atoms=np.array([len(i.atoms) for i in items]),
        numbers=np.concatenate([i.atoms.numbers for i in items]),
        frames=frame_names(dataset),
        energy=np.array([k.energy for k in known]) + np.array(shift),
        forces=np.concatenate([k.forces for k in known]),
        stress=np.array([nothing if k.stress is None else k.stress for k in known]),
        energy_label=np.array([float(i.labels["energy"]) for i in items]),
        forces_label=np.concatenate([i.labels["forces"].numpy() for i in items]),
        stress_label=np.stack([i.labels["stress"].numpy() for i in items]),
    )


def draws_of(recipe: Recipe, name: str, draws: int) -> int:
    """Draws for one of a run's sets: more on the calibration frames (``uncertainty.calibration_draws``)."""
    return max(draws, recipe.uncertainty.calibration_draws) if draws and name == "calibration" else draws


def linearity_of(
    recipe: Recipe, potential: BayesianPotential, sets: dict[str, FrameDataset], console: Console
) -> dict[str, Any] | None:
    """Real draws beside the linearised model on a few test frames; ``None`` where the recipe wants none."""
    options = recipe.uncertainty
    tests = {n: d for n, d in sets.items() if n not in ROLES}
    if not options.linearity_frames or not tests:
        return None
    started = time.monotonic()
    with potential.posterior.unwatched():
        result = study(potential, tests, n_frames=options.linearity_frames, n_draws=options.linearity_draws)
    seconds = time.monotonic() - started
    console.print(f"compared {options.linearity_draws} draws with the linearised model in {seconds:.0f} s")
    return result
