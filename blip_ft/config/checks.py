"""What no single key can say: values that belong together, and the arguments of Lightning's Trainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from blip_ft.config.data import DataConfig
from blip_ft.config.posterior import CLOSED, PAIRED
from blip_ft.config.recipe import Recipe
from blip_ft.errors import RecipeError, nearest


def check_recipe(recipe: Recipe, file: Path | None) -> None:
    """All checks in turn, the first failure is raised.

    Args:
        recipe: validated key by key.
        file: where it was read from, for messages.

    Raises:
        RecipeError: options that do not fit together, or an unknown key below ``trainer``.
    """
    _check_trainer(recipe.trainer, file)
    _check_family(recipe, file)
    _check_data(recipe.data, file)


#: arguments of Lightning's Trainer that recipes have, known without its seconds of imports
COMMON = {
    "accelerator",
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "devices",
    "enable_progress_bar",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "log_every_n_steps",
    "max_epochs",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "num_nodes",
    "precision",
    "strategy",
}


def _check_trainer(options: dict[str, Any], file: Path | None) -> None:
    """Keys of ``trainer`` against Lightning's own, which is imported for others than the common ones."""
    if COMMON.issuperset(options):
        return
    from lightning import Trainer

    valid = [p for p in inspect.signature(Trainer.__init__).parameters if p != "self"]
    for key in options:
        if key not in valid:
            raise RecipeError(
                f"unknown key 'trainer.{key}': {nearest(key, valid)}",
                file=file,
                field=f"trainer.{key}",
                remedy="trainer.* are the keyword arguments of lightning.Trainer",
            )


def _check_family(recipe: Recipe, file: Path | None) -> None:
    """Options that only some posterior families and objectives have."""
    options, objective = recipe.posterior, recipe.objective
    closed = options.family in CLOSED

    def refuse(message: str, field: str, remedy: str) -> None:
        raise RecipeError(message, file=file, field=field, remedy=remedy)

    for key, default, families in (("max_bytes", None, CLOSED), ("storage", "auto", ("subspace",))):
        if options.family not in families and getattr(options, key) != default:
            refuse(
                f"posterior.{key} is for {', '.join(families)}, not for '{options.family}'",
                f"posterior.{key}",
                "remove the key",
            )
    for key in ("n_draws", "calibration_draws", "linearity_draws"):
        if options.family in PAIRED and (n := getattr(recipe.uncertainty, key)) % 2:
            refuse(
                f"draws of posterior.family={options.family} come in pairs, and {n} is odd",
                f"uncertainty.{key}",
                f"use {n - 1} or {n + 1}" if n > 3 else f"use {n + 1}",
            )
    if recipe.data.context is not None and options.family != "subspace" and objective.kind != "function_kl":
        refuse(
            f"nothing reads these structures: posterior.family={options.family} puts noise on all noisy weights and "
            "chooses no directions",
            "data.context",
            "remove the key, or use posterior.family=subspace or objective.kind=function_kl",
        )
    if closed and options.mode != "structure":
        refuse(
            f"'{options.mode}' noise needs independent weights, the {options.family} posterior correlates them",
            "posterior.mode",
            "use posterior.mode=structure",
        )
    if closed and options.prior == "dropout":
        refuse(
            f"the closed form of posterior.family={options.family} needs a prior of fixed width",
            "posterior.prior",
            "use posterior.prior=pretrained, or posterior.family=weight",
        )
    if options.empirical_bayes and (
        options.family not in ("channel", "weight") or options.prior == "dropout"
    ):
        refuse(
            "empirical Bayes scales need a 'pretrained' prior and posterior.family 'channel' or 'weight', not "
            f"'{options.prior}' and '{options.family}'",
            "posterior.empirical_bayes",
            "remove the key"
            + (": prior_scale=auto already chooses the scale from the data" if closed else ""),
        )
    if options.family == "adaptive" and not options.min_std < options.init_std < options.max_std:
        refuse(
            f"init_std {options.init_std} is not between min_std {options.min_std} and max_std {options.max_std}",
            "posterior.init_std",
            "change one of the three",
        )
    if options.family == "posthoc_laplace" and objective.kind != "elbo":
        refuse(
            f"posthoc_laplace is a covariance after plain fine-tuning, not after '{objective.kind}'",
            "objective.kind",
            "remove the key",
        )
    if closed and "crps" in objective.kind:
        refuse(
            f"objective.kind '{objective.kind}' learns the spread step by step, that of '{options.family}' has "
            "a closed form",
            "objective.kind",
            "use objective.kind=elbo, or posterior.family=channel, weight or adaptive",
        )
    if "crps" in objective.kind and objective.draws == 1:
        refuse("the fair CRPS needs two draws or more", "objective.draws", "use objective.draws=2 or more")
    if "crps" in objective.kind and objective.learn_noise:
        refuse(
            "the CRPS is measured in units of the label noise, which cannot be learned from it",
            "objective.learn_noise",
            "use objective.kind=elbo, or fixed noise",
        )
    if objective.replay is not None and objective.kind != "function_kl":
        refuse(
            f"objective.kind '{objective.kind}' replays no frames",
            "objective.replay",
            "use objective.kind=function_kl, or remove the key",
        )
    given = objective.replay is not None or recipe.data.context is not None
    if objective.kind == "function_kl" and not given and options.context == 0:
        refuse(
            "objective.kind 'function_kl' has no frames to compare on",
            "objective.replay",
            "give frames here or as data.context, or posterior.context > 0",
        )
    if closed:
        return
    for key, value in (
        ("posterior.prior_scale", options.prior_scale),
        ("objective.temperature", objective.temperature),
    ):
        if value == "auto":
            refuse(
                f"'auto' has a closed form for posterior.family={', '.join(CLOSED)}, not for '{options.family}'",
                key,
                "give numbers; posterior.prior_scale=0.1 objective.temperature=0.0003 are a start",
            )


def check_noise(recipe: Recipe) -> None:
    """Refuse a covariance of noisy weights without any; only what trains needs it.

    Raises:
        RecipeError: a family with a closed form, and ``model.noise`` is none.
    """
    if recipe.posterior.family in CLOSED and recipe.model.noise in ("none", [], ["none"]):
        raise RecipeError(
            f"posterior.family={recipe.posterior.family} is a covariance of noisy weights, and no weight is to have noise",
            field="model.noise",
            remedy="name modules (model.noise=all or readout), or use posterior.family=channel, which does without noise",
        )


def _check_data(data: DataConfig, file: Path | None) -> None:
    """Options of the data that belong together."""
    if (data.references == "given") != bool(data.reference_energies):
        raise RecipeError(
            "data.references: given and data.reference_energies need each other",
            file=file,
            field="data.references",
            remedy="set both: references: given, reference_energies: {Si: -0.8, O: -1.9}",
        )
    if (data.split.by == "file") != (data.split.file is not None):
        raise RecipeError(
            "data.split.by: file and data.split.file need each other",
            file=file,
            field="data.split",
            remedy="set both, the file being the splits.json of a run's folder",
        )
    if data.stream is not None:
        for role in ("validation", "calibration", "test"):
            if getattr(data, role) is None:
                raise RecipeError(
                    f"a stream is not divided: there are no frames for {role}",
                    file=file,
                    field=f"data.{role}",
                    remedy=f"give data.{role} a source",
                )
        if data.batch_by != "structures":
            raise RecipeError(
                "the sizes of a stream's structures are not known beforehand",
                file=file,
                field="data.batch_by",
                remedy="use data.batch_by: structures",
            )
