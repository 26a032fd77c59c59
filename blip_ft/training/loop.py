"""One Lightning training of a potential, plain or by the ELBO."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from ase import Atoms
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console

from blip_ft.config import Recipe
from blip_ft.data import FrameDataset
from blip_ft.data.stream import FrameStream
from blip_ft.errors import BlipError, RecipeError
from blip_ft.families.base.options import ClosedFormOptions
from blip_ft.objectives import ElboScale, Likelihood
from blip_ft.potential import BayesianPotential
from blip_ft.terms import objective_spec
from blip_ft.training.callbacks import (
    AverageMean,
    FitPosterior,
    History,
    KeepBest,
    SetEpoch,
    UpdatePrior,
    WatchPosterior,
)
from blip_ft.training.closed_form import ClosedFormFitter
from blip_ft.training.datamodule import FrameDataModule
from blip_ft.training.device import device_of
from blip_ft.training.loggers import close_loggers, make_loggers
from blip_ft.training.module import FineTuneModule
from blip_ft.training.objective import make_objective
from blip_ft.training.precision import matrix_products
from blip_ft.training.terms import Start
from blip_ft.uncertainty.predict import predict_set

DEFAULT_EPOCHS = 24


def train(
    recipe: Recipe,
    potential: BayesianPotential,
    sets: dict[str, FrameDataset],
    folder: Path,
    console: Console,
    *,
    plain: bool,
    frames: Mapping[str, Sequence[Any]] | None = None,
    context: Sequence[Atoms] = (),
    stream: Callable[[int, int], FrameStream] | None = None,
) -> list[dict[str, float]]:
    """Train, and leave the potential in the state of its best epoch on the validation frames.

    Args:
        recipe: options.
        potential: changed in place.
        sets: needs ``train`` and ``validation``.
        folder: for ``metrics.csv`` and the TensorBoard log.
        console: for progress where there is no terminal.
        plain: without noise and KL.
        frames: {term: frames that it has loaded}; a term that labels them by the pretrained model needs the
            potential to be it still.
        context: unlabelled structures, for families that want them.
        stream: makes the batches of one rank where the training set is a stream.

    Returns:
        One row per epoch (``callbacks.History``).

    Raises:
        BlipError: training broke down.
    """
    console.print(
        "plain fine-tuning"
        if plain
        else f"training by {objective_spec(recipe.objective.kind).words} ({recipe.posterior.family} posterior)"
    )
    data = FrameDataModule(
        potential.backbone,
        sets["train"],
        sets["validation"],
        batch_size=recipe.data.batch_size,
        seed=recipe.seed,
        num_workers=recipe.data.num_workers,
        batch_by=recipe.data.batch_by,
        stream=stream,
    )
    terminal = console.is_terminal
    best, history = KeepBest(), History(None if terminal else console.print)
    callbacks: list[Callback] = [SetEpoch(), best, history]
    decay, average = recipe.optimizer.ema_decay, None
    if decay is not None and potential.mean_parameters:
        average = AverageMean(potential.mean_parameters, decay)
        callbacks.append(average)  # behind `best`, which is to keep the average
    fitter = None
    options = recipe.posterior
    if not plain and isinstance(options, ClosedFormOptions):
        fitter = ClosedFormFitter(recipe, potential, sets, console, context)
        start = int(options.first_fit * recipe.trainer.get("max_epochs", DEFAULT_EPOCHS))
        fit: Callable[[], object] = fitter.fit
        if average is not None:
            fit = partial(average.around, fitter.fit)
        callbacks.append(FitPosterior(fit, start))
    prior = UpdatePrior(potential) if not plain and options.scale_of_each_path else None
    watch = WatchPosterior(potential.posterior) if not plain else None
    callbacks += [c for c in (prior, watch) if c is not None]
    trainer = make_trainer(recipe, folder, callbacks, terminal=terminal)
    objective = recipe.objective
    steps = data.steps(trainer.world_size)
    scale = ElboScale(sets["train"].total_weight, steps, objective.kl_temperature, objective.kl_warmup)
    first = Start(
        recipe,
        potential,
        Likelihood(objective),
        scale,
        sets["train"],
        world=trainer.world_size,
        rank=trainer.global_rank,
    )
    module = FineTuneModule(make_objective(first, plain=plain, frames=frames))
    if not any(p.requires_grad for p in module.parameters()):
        console.print("the mean is frozen and the posterior has a closed form: no epochs needed")
        if fitter is not None:
            fitter.fit(final=True)
        return []
    try:
        with warnings.catch_warnings():
            # few steps per epoch, few workers: right for data sets of this size
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # a stream knows its length, whatever the number of workers
            warnings.filterwarnings("ignore", message=".*IterableDataset.*has `__len__` defined.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
            # the log folder of the plain training lies inside that of the run
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
            with matrix_products(tf32=recipe.model.tf32):
                trainer.fit(module, datamodule=data)
            close_loggers(trainer.loggers)
    except FloatingPointError as error:
        raise BlipError(
            f"training broke down: {error}", remedy="start again with the change named above"
        ) from error
    best.restore(module)
    if best.epoch >= 0:
        known = any("val_force_mae" in row for row in history.rows)  # else energies have chosen
        score = f"CRPS {best.best:.2f} meV/Å" if known else f"energy MAE {best.best:.2f} meV/atom"
        console.print(f"best epoch on the validation frames: {best.epoch + 1} ({score})")
    if prior is not None:
        scales = [s for paths in prior.update().values() for s in paths]
        console.print(f"prior scales by empirical Bayes: {min(scales):.2g} to {max(scales):.2g} of each rms")
    if watch is not None and watch.report is not None:
        entry, sentences = potential.posterior.describe_epoch(watch.report)
        potential.fit_reports.append(entry)
        for sentence in sentences:
            console.print(sentence, style="yellow")
    if fitter is not None:
        potential.to(device_of(recipe))  # Lightning has moved it to the CPU
        fitter.moved = lambda: history.after(
            predict_set(potential, sets["validation"], "validation", n_draws=0, stress=False)
        )
        fitter.fit(final=True)
    return history.rows


def make_trainer(
    recipe: Recipe, folder: Path, callbacks: list[Callback], *, terminal: bool = False
) -> lightning.Trainer:
    """A Trainer with the recipe's options over defaults that fit interatomic potentials.

    Raises:
        RecipeError: an option that cannot work, or that Lightning refuses.
    """
    fixed = {"inference_mode": False, "use_distributed_sampler": False}
    for key, value in fixed.items():
        if recipe.trainer.get(key, value) != value:
            raise RecipeError(
                f"trainer.{key} must be {value}: forces are gradients, and the sampler divides by ranks itself",
                field=f"trainer.{key}",
                remedy="remove the key",
            )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    loggers = make_loggers(recipe, folder)
    options: dict[str, Any] = {
        "max_epochs": DEFAULT_EPOCHS,
        "devices": 1,
        "accelerator": "auto",
        "logger": loggers,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": terminal,
        "precision": "64-true" if recipe.model.dtype == "float64" else "32-true",
        **{key: value for key, value in recipe.trainer.items() if key != "logger"},
        **fixed,
    }
    extra = [RichProgressBar()] if options["enable_progress_bar"] is True and terminal else []
    try:
        return lightning.Trainer(**options, callbacks=[*callbacks, *extra])
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"Lightning refuses these trainer options: {error}",
            field="trainer",
            remedy="see lightning.Trainer",
        ) from error
