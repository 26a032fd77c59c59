"""Options that work costs minutes to try, tried before the pretrained model runs.

Lightning is imported here, so what reading the data shows comes first.
"""

from __future__ import annotations

import tempfile
import typing
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from blip_ft.config import Recipe
from blip_ft.data.batch.sampler import EpochBatchSampler, PackedBatchSampler
from blip_ft.data.read.plan import label_options
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.splits import Splits, load_role
from blip_ft.errors import DataError, RecipeError

#: smallest values of numbers of a training; no epochs at all leave the closed form at the pretrained mean
LEAST = {"max_epochs": 0, "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 1}


def try_options(recipe: Recipe, splits: Splits) -> None:
    """Raise what an option would raise later.

    Raises:
        RecipeError: an argument of the Trainer that cannot be, or options that Lightning refuses.
        DataError: batches that cannot be made, or a source that cannot be read.
    """
    check_types(recipe.trainer)
    world = try_trainer(recipe)
    try_sampler(recipe, splits, world)
    try_sources(recipe)


def check_types(options: dict[str, Any]) -> None:
    """Arguments of the Trainer against the types that Lightning names.

    Raises:
        RecipeError: one is of another type, or a number of steps or epochs that no training has.
    """
    from lightning import Trainer

    hints = typing.get_type_hints(Trainer.__init__)
    for key, value in options.items():
        problem = _type_problem(hints[key], value)
        if problem is not None:
            raise _refused(f"trainer.{key}={value!r} is not what it takes: {problem}", key)
    for key, least in LEAST.items():
        value = options.get(key)
        if isinstance(value, int) and value < least:
            raise _refused(
                f"trainer.{key}={value} is no number of a training: the schedule needs its length", key
            )


def _type_problem(hint: Any, value: Any) -> str | None:
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        return "; ".join(dict.fromkeys(e["msg"].lower() for e in error.errors()))
    return None


def _refused(problem: str, key: str) -> RecipeError:
    return RecipeError(problem, field=f"trainer.{key}", remedy="see the arguments of lightning.Trainer")


def try_trainer(recipe: Recipe) -> int:
    """Make a Trainer as training will.

    Returns:
        The number of ranks.

    Raises:
        RecipeError: Lightning refuses it.
    """
    from blip_ft.training.loop import make_trainer

    with tempfile.TemporaryDirectory() as folder:
        return int(make_trainer(recipe, Path(folder), [], logs=False).world_size)


def try_sampler(recipe: Recipe, splits: Splits, world: int) -> None:
    """Make the sampler as training will; sizes in edges are known when the graphs are.

    Raises:
        DataError: it cannot make batches.
        RecipeError: a validation is wanted after more steps than an epoch has.
    """
    data, train = recipe.data, splits.train
    if data.stream is not None or data.batch_by == "edges":
        return
    try:
        if data.batch_by == "structures":
            steps = len(EpochBatchSampler(len(train), data.batch_size, recipe.seed, world=world))
        else:
            sizes = [len(numbers) for numbers in train["numbers"]]
            steps = len(
                PackedBatchSampler(sizes, data.batch_size, recipe.seed, world=world, name=data.batch_by)
            )
    except DataError as error:
        raise DataError(
            error.problem, file=train["source"][0], field=error.field, remedy=error.remedy
        ) from error
    every = recipe.trainer.get("val_check_interval")
    by_epoch = recipe.trainer.get("check_val_every_n_epoch", 1) is not None
    if isinstance(every, int) and by_epoch and every > steps:
        raise _refused(
            f"trainer.val_check_interval={every}, and an epoch has {steps} steps", "val_check_interval"
        )


def try_sources(recipe: Recipe) -> None:
    """Read what terms and references will need beside the roles.

    Raises:
        DataError: a source cannot be read, or an energy is of no element.
    """
    data = recipe.data
    replay = data.replay
    if data.context is not None:
        load_source(data.context, labels=False, **label_options(data))
    if replay is not None and replay.source is not None:
        load_role(data, replay.source, labels=replay.labels == "own")
    if replay is not None and replay.probe is not None:
        load_role(data, replay.probe, labels=False)
    if recipe.objective.frames is not None:
        load_role(data, recipe.objective.frames, labels=False)
    if data.references == "given":
        from blip_ft.training.reference_shift import given_energies

        given_energies(data)
