"""One Lightning training of a potential, plain or by the ELBO."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from ase import Atoms
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint, LambdaCallback, RichProgressBar
from rich.console import Console

from blip_ft.closed_form.fitter import ClosedFormFitter
from blip_ft.config import Recipe
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.batch.stream import FrameStream
from blip_ft.errors import RecipeError, readable
from blip_ft.families.base.options import ClosedFormOptions
from blip_ft.objectives import ElboScale, Likelihood
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.signals import Stopped
from blip_ft.terms import objective_spec
from blip_ft.training.callbacks import (
    AverageMean,
    FitPosterior,
    History,
    KeepBest,
    SetEpoch,
    StopWhenRising,
    UpdatePrior,
    WatchPosterior,
)
from blip_ft.training.datamodule import FrameDataModule
from blip_ft.training.device import device_of
from blip_ft.training.loggers import close_loggers, make_loggers
from blip_ft.training.module import FineTuneModule
from blip_ft.training.objective import make_objective
from blip_ft.training.precision import matrix_products
from blip_ft.training.saving import RandomState, SaveTraining
from blip_ft.training.stages import Run
from blip_ft.training.state import keep_state, recall_state
from blip_ft.training.terms import Start
from blip_ft.uncertainty.predict import predict_set

DEFAULT_EPOCHS = 24
#: pieces (``blip_ft.training.pieces``) after the fit in mid-training, and after each step of the last one
FITTED, STEPS = "posterior-in-epochs", "mean-steps"


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
    run: Run | None = None,
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
        run: where it is kept, if it is, and goes on from what has been kept.

    Returns:
        One row per epoch (``callbacks.History``).

    Raises:
        BlipError: training broke down.
        Stopped: a signal has ended it.
    """
    run = run or Run()
    pieces, options = run.pieces, recipe.posterior
    console.print(
        "plain fine-tuning"
        if plain
        else f"training by {objective_spec(recipe.objective.kind).words} ({recipe.posterior.family} posterior)"
    )
    fitter = None
    if not plain and isinstance(options, ClosedFormOptions):
        fitter = ClosedFormFitter(recipe, potential, sets, console, context)
    history = History(None if console.is_terminal else console.print)
    name = "plain" if plain else "trained"
    kept = recall_state(pieces, name, potential)
    if kept is None:
        epochs = _Epochs(
            recipe, potential, sets, folder, console, plain, frames or {}, stream, run, fitter, history
        )
        left_out = epochs.run()
        if left_out is not None:
            # a closed form is fitted anew: what steered the noise is not kept once more
            keep_state(
                pieces,
                name,
                potential,
                posterior=fitter is None,
                history=history.state_dict(),
                left_out=left_out,
            )
    else:
        console.print("the epochs are done")
        history.load_state_dict(kept["history"])
        left_out = kept["left_out"]
    if fitter is not None:
        fitter.leave_out({key for key, _ in left_out or ()})
        potential.to(device_of(recipe))  # Lightning has moved it to the CPU
        _last_fit(fitter, history, run, epochs=left_out is not None)
    return history.rows


def _last_fit(fitter: ClosedFormFitter, history: History, run: Run, *, epochs: bool) -> None:
    """The closed form at the mean that training has led to; goes on after the steps of the mean that have been kept."""
    potential, pieces = fitter.potential, run.pieces
    done = recall_state(pieces, STEPS, potential)
    if done is not None:
        history.load_state_dict(done["history"])

    def moved(steps: list[float]) -> None:
        if epochs:
            history.after(
                predict_set(potential, fitter.sets["validation"], "validation", n_draws=0, stress=False)
            )
        keep_state(pieces, STEPS, potential, posterior=False, steps=steps, history=history.state_dict())

    fitter.moved = moved
    fitter.fit(final=True, done=[] if done is None else done["steps"])


@dataclass
class _Epochs:
    """The epochs of one training."""

    recipe: Recipe
    potential: BayesianPotential
    sets: dict[str, FrameDataset]
    folder: Path
    console: Console
    plain: bool
    frames: Mapping[str, Sequence[Any]]
    stream: Callable[[int, int], FrameStream] | None
    run_: Run
    fitter: ClosedFormFitter | None
    history: History
    left_out: dict[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the piece that holds Lightning's checkpoint."""
        return "plain-epochs" if self.plain else "epochs"

    def run(self) -> list[list[Any]] | None:
        """Train, and put the best state back.

        Returns:
            Key and name of the training frames that were left out; ``None`` if there was nothing to train.

        Raises:
            BlipError: training broke down.
            Stopped: a signal has ended it.
        """
        recipe, potential, console = self.recipe, self.potential, self.console
        data = FrameDataModule(
            potential.backbone,
            self.sets["train"],
            self.sets["validation"],
            batch_size=recipe.data.batch_size,
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
            batch_by=recipe.data.batch_by,
            stream=self.stream,
        )
        best, average = KeepBest(), None
        rising = StopWhenRising(best, recipe.optimizer.patience)
        callbacks: list[Callback] = [SetEpoch(), best, rising, self.history]
        if recipe.optimizer.ema_decay is not None and potential.mean_parameters:
            average = AverageMean(potential.mean_parameters, recipe.optimizer.ema_decay)
            callbacks.append(average)  # behind `best`, which is to keep the average
        if self.fitter is not None:
            callbacks.append(self._fit_in_mid_training(self.fitter, average))
        empirical = not self.plain and recipe.posterior.scale_of_each_path
        prior = UpdatePrior(potential) if empirical else None
        watch = None if self.plain else WatchPosterior(potential.posterior)
        callbacks += [c for c in (prior, watch) if c is not None]
        callbacks.append(LambdaCallback(on_train_epoch_start=lambda *_: self.run_.begun()))
        checkpoint, place = self._earlier()
        data.start_at(place.get("epoch", 0), place.get("batch", 0))
        if self.run_.pieces is not None and recipe.trainer.get("enable_checkpointing", True):
            saving = SaveTraining(self.run_.pieces, self.name, self.run_.interrupts, self._fitted)
            callbacks += [RandomState(), saving]
        trainer = make_trainer(
            recipe,
            self.folder,
            callbacks,
            terminal=console.is_terminal,
            step=place.get("step", 0),
            last=place.get("row"),
        )
        module = self._module(data, trainer)
        if not any(p.requires_grad for p in module.parameters()):
            console.print("the mean is frozen and the posterior has a closed form: no epochs needed")
            self.run_.begun()
            return None
        self._fit(trainer, module, data, checkpoint)
        self._best(best, rising, module)
        if prior is not None:
            scales = [s for paths in prior.update().values() for s in paths]
            console.print(
                f"prior scales by empirical Bayes: {min(scales):.2g} to {max(scales):.2g} of each rms"
            )
        if watch is not None and watch.report is not None:
            entry, sentences = potential.posterior.describe_epoch(watch.report)
            potential.fit_reports.append(entry)
            for sentence in sentences:
                console.print(sentence, style="yellow")
        if self.left_out:
            potential.fit_reports.append({"left_out": list(self.left_out.values())})
            listed = ", ".join(self.left_out.values())
            console.print(f"left out, as they broke the training: {listed}", style="yellow", markup=False)
        return [[key, name] for key, name in self.left_out.items()]

    def _module(self, data: FrameDataModule, trainer: lightning.Trainer) -> FineTuneModule:
        objective = self.recipe.objective
        steps = data.steps(trainer.world_size)
        train = self.sets["train"]
        scale = ElboScale(train.total_weight, steps, objective.kl_temperature, objective.kl_warmup)
        first = Start(
            self.recipe,
            self.potential,
            Likelihood(objective),
            scale,
            train,
            world=trainer.world_size,
            rank=trainer.global_rank,
        )
        objective_ = make_objective(first, plain=self.plain, frames=self.frames)
        return FineTuneModule(objective_, self.left_out)

    def _fit(
        self,
        trainer: lightning.Trainer,
        module: FineTuneModule,
        data: FrameDataModule,
        checkpoint: Path | None,
    ) -> None:
        try:
            with warnings.catch_warnings():
                # few steps per epoch, few workers: right for data sets of this size
                warnings.filterwarnings("ignore", message=".*does not have many workers.*")
                # a stream knows its length, whatever the number of workers
                warnings.filterwarnings("ignore", message=".*IterableDataset.*has `__len__` defined.*")
                warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
                # the log folder of the plain training lies inside that of the run
                warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
                # the loader begins where the checkpoint ends (`FrameDataModule.start_at`)
                warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
                with matrix_products(tf32=self.recipe.model.tf32):
                    trainer.fit(
                        module,
                        datamodule=data,
                        ckpt_path=checkpoint,
                        weights_only=True if checkpoint else None,
                    )
                close_loggers(trainer.loggers)
        except Stopped:
            if trainer.strategy.launcher is not None:  # the ranks that it has started
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise

    def _best(self, best: KeepBest, rising: StopWhenRising, module: FineTuneModule) -> None:
        """Put the best state back, and say which it is."""
        best.restore(module)
        say = self.console.print
        if rising.reason:
            say(f"training was ended: {rising.reason}", style="yellow")
        known = any("val_force_mae" in row for row in self.history.rows)  # else energies have chosen
        kind, unit = ("CRPS", "meV/Å") if known else ("energy MAE", "meV/atom")
        if best.epoch >= 0:
            say(f"best epoch on the validation frames: {best.epoch + 1} ({kind} {best.best:.2f} {unit})")
        elif best.last is not None:
            say(
                f"no epoch is better on the validation frames than the state at the start ({kind} "
                f"{readable(best.start, '.2f')} {unit}), which is kept: lower optimizer.learning_rate, or "
                f"give more frames",
                style="yellow",
            )

    # ---- pieces --------------------------------------------------------------------------
    def _earlier(self) -> tuple[Path | None, dict[str, Any]]:
        """Lightning's checkpoint of an earlier start, with its place in the training; the posterior that
        belongs to it.
        """
        pieces = self.run_.pieces
        found = None if pieces is None else pieces.file(self.name)
        if found is None:
            return None, {}
        path, place = found
        if place["fitted"] and recall_state(pieces, FITTED, self.potential) is None:
            return None, {}  # its draws are lost, and the mean has moved since they were fitted
        self.console.print(f"going on after {place['epoch']} epochs and {place['batch']} batches")
        return path, place

    def _fitted(self) -> dict[str, Any]:
        """Whether draws of a closed form belong to a checkpoint."""
        return {"fitted": self.fitter is not None and self.potential.posterior.ready}

    def _fit_in_mid_training(self, fitter: ClosedFormFitter, average: AverageMean | None) -> FitPosterior:
        pieces, potential = self.run_.pieces, self.potential

        def fit() -> None:
            fitter.leave_out(self.left_out)
            fitter.fit()

        def recall() -> bool:
            if recall_state(pieces, FITTED, potential) is None:
                return False
            if average is not None:
                average.forget()
            return True

        start = int(fitter.options.first_fit * self.recipe.trainer.get("max_epochs", DEFAULT_EPOCHS))
        around = fit if average is None else partial(average.around, fit)
        return FitPosterior(around, start, recall, lambda: keep_state(pieces, FITTED, potential))


def make_trainer(
    recipe: Recipe,
    folder: Path,
    callbacks: list[Callback],
    *,
    terminal: bool = False,
    step: int = 0,
    last: Mapping[str, float] | None = None,
    logs: bool = True,
) -> lightning.Trainer:
    """A Trainer with the recipe's options over defaults that fit interatomic potentials.

    Args:
        recipe: options.
        folder: for logs, and whatever Lightning writes by itself.
        callbacks: of the training.
        terminal: whether there is one, for a progress bar.
        step: with which a resumed training goes on.
        last: row of the log before it.
        logs: start the loggers, which tell services of a run.

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
    options: dict[str, Any] = {
        "max_epochs": DEFAULT_EPOCHS,
        "devices": 1,
        "accelerator": "auto",
        "logger": make_loggers(recipe, folder, step, last) if logs else False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_model_summary": False,
        "enable_progress_bar": terminal,
        "precision": "64-true" if recipe.model.dtype == "float64" else "32-true",
        **{key: value for key, value in recipe.trainer.items() if key != "logger"},
        **fixed,
    }
    extra = [RichProgressBar()] if options["enable_progress_bar"] is True and terminal else []
    if SLURMEnvironment.detect():  # Lightning's requeue goes on in silence, and from the wrong training
        own = options.get("plugins") or []
        options["plugins"] = [
            *(own if isinstance(own, list) else [own]),
            SLURMEnvironment(auto_requeue=False),
        ]
    try:
        return lightning.Trainer(**options, callbacks=[*callbacks, *extra])
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise RecipeError(
            f"Lightning refuses these trainer options: {error}",
            field="trainer",
            remedy="see lightning.Trainer",
        ) from error
