"""Lightning's loggers for a training, by their names in the recipe (``config.loggers``)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch.loggers
from lightning.pytorch.loggers import Logger

from blip_ft.config import Recipe
from blip_ft.config.loggers import LOGGERS, chosen_loggers, require_loggers
from blip_ft.errors import RecipeError
from blip_ft.training.logs import TensorBoardLog, make_table

#: project of W&B and experiment of MLflow where the recipe names none
PROJECT = "blip_ft"
#: those that are given up where they cannot be written
OURS = {"tensorboard": TensorBoardLog}


def make_loggers(
    recipe: Recipe, folder: Path, step: int = 0, last: Mapping[str, float] | None = None
) -> list[Logger]:
    """``metrics.csv`` and what the recipe names beside it.

    Args:
        recipe: options; services are told all of them, as hyperparameters.
        folder: of the training: that of the run, or ``plain`` in it.
        step: with which a resumed run goes on.
        last: row of the log before it.

    Raises:
        RecipeError: a package is not installed, or Lightning refuses the arguments.
    """
    chosen = chosen_loggers(recipe.trainer.get("logger"))
    require_loggers(recipe.trainer.get("logger"))
    run = recipe.name if folder.name == recipe.name else f"{recipe.name}-{folder.name}"
    defaults: dict[str, dict[str, Any]] = {
        "tensorboard": {"save_dir": folder, "name": "", "version": "tensorboard"}
        | ({"purge_step": step} if step else {}),
        "wandb": {"save_dir": folder, "name": run, "project": PROJECT},
        "mlflow": {"save_dir": str(folder / "mlruns"), "run_name": run, "experiment_name": PROJECT},
    }
    loggers: list[Logger] = [make_table(folder, step, last)]
    for name, options in chosen.items():
        if name == "csv":
            continue
        try:
            kind = OURS.get(name) or getattr(lightning.pytorch.loggers, LOGGERS[name][0])
            made: Logger = kind(**defaults[name] | options)
            if name != "tensorboard":
                made.log_hyperparams(recipe.model_dump(mode="json"))
        except (TypeError, ValueError, ImportError) as error:
            raise RecipeError(
                f"the logger '{name}' cannot be started: {error}",
                field=f"trainer.logger.{name}",
                remedy=f"its arguments are those of lightning.pytorch.loggers.{LOGGERS[name][0]}",
            ) from error
        loggers.append(made)
    return loggers


def close_loggers(loggers: Iterable[Logger]) -> None:
    """End what a service counts as one run: the next training of this process is another one."""
    if any(type(logger).__name__ == LOGGERS["wandb"][0] for logger in loggers):
        sys.modules["wandb"].finish()
