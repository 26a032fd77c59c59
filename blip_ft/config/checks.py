"""What no single key can say: values that belong together, and the arguments of Lightning's Trainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from blip_ft.config.data import DataConfig
from blip_ft.config.loggers import chosen_loggers
from blip_ft.config.recipe import Recipe
from blip_ft.errors import RecipeError, nearest
from blip_ft.families.base.options import Refuse
from blip_ft.families.registry import FAMILIES
from blip_ft.terms import OBJECTIVES, TermSpec, objective_spec


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
    _check_parts(recipe, file)


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
    "logger",
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
    chosen_loggers(options.get("logger"))
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
    """What the posterior family, the terms of the objective and other sections want of each other."""
    options, objective = recipe.posterior, recipe.objective
    family, kind, spec = options.family, objective.kind, objective_spec(objective.kind)
    compares = any(term.compares for term in spec.specs)

    def refuse(message: str, field: str, remedy: str) -> None:
        raise RecipeError(message, file=file, field=field, remedy=remedy)

    options.check(refuse)
    for key in ("n_draws", "calibration_draws", "linearity_draws"):
        if options.paired and (n := getattr(recipe.uncertainty, key)) % 2:
            refuse(
                f"draws of posterior.family={family} come in pairs, and {n} is odd",
                f"uncertainty.{key}",
                f"use {n - 1} or {n + 1}" if n > 3 else f"use {n + 1}",
            )
    if recipe.data.context is not None and not options.needs_context and not compares:
        refuse(
            f"nothing reads these structures: posterior.family={family} puts noise on all noisy weights and "
            "chooses no directions",
            "data.context",
            f"remove the key, or use posterior.family={_families('needs_context')} or "
            f"objective.kind={_comparing()}",
        )
    if options.after_plain and not spec.as_plain:
        refuse(
            f"{family} is a covariance after plain fine-tuning, not after '{kind}'",
            "objective.kind",
            "remove the key",
        )
    for term in spec.specs:
        _check_term(term, recipe, refuse)
    if objective.frames is not None and not compares:
        refuse(
            f"objective.kind '{kind}' replays no frames",
            "objective.frames",
            f"use objective.kind={_comparing()}, or remove the key",
        )
    given = objective.frames is not None or recipe.data.context is not None
    if compares and not given and options.perturbed_share == 0:
        refuse(
            f"objective.kind '{kind}' has no frames to compare on",
            "objective.frames",
            "give frames here or as data.context, or posterior.perturbed_share > 0",
        )
    if options.closed_form:
        return
    for key, value in (
        ("posterior.prior_scale", options.prior_scale),
        ("objective.temperature", objective.temperature),
    ):
        if value == "auto":
            refuse(
                f"'auto' has a closed form for posterior.family={_families('closed_form')}, not for '{family}'",
                key,
                "give numbers; posterior.prior_scale=0.1 objective.temperature=0.0003 are a start",
            )


def _families(capability: str, *, value: bool = True) -> str:
    """Families that have a capability, or have not."""
    return ", ".join(name for name in FAMILIES.known() if getattr(FAMILIES[name], capability) is value)


def _comparing() -> str:
    """Objectives that compare predictions on frames beside the training frames."""
    return ", ".join(n for n in OBJECTIVES.known() if any(t.compares for t in OBJECTIVES[n].specs))


def _check_term(term: TermSpec, recipe: Recipe, refuse: Refuse) -> None:
    """What one term of the objective needs."""
    objective = recipe.objective
    if term.learns_spread and recipe.posterior.closed_form:
        refuse(
            f"objective.kind '{objective.kind}' learns the spread step by step, that of "
            f"'{recipe.posterior.family}' has a closed form",
            "objective.kind",
            f"use objective.kind=elbo, or posterior.family={_families('closed_form', value=False)}",
        )
    if objective.draws is not None and objective.draws < term.least_draws:
        refuse(
            f"the term '{term.name}' needs {term.least_draws} draws or more",
            "objective.draws",
            f"use objective.draws={term.least_draws} or more",
        )
    if term.fixed_noise and objective.learn_noise:
        refuse(
            f"the term '{term.name}' is measured in units of the label noise, which cannot be learned from it",
            "objective.learn_noise",
            "use objective.kind=elbo, or fixed noise",
        )


def check_noise(recipe: Recipe) -> None:
    """Refuse a covariance of noisy weights without any; only what trains needs it.

    Raises:
        RecipeError: a family with a closed form, and ``model.noise`` is none.
    """
    if recipe.posterior.closed_form and recipe.model.noise in ("none", [], ["none"]):
        raise RecipeError(
            f"posterior.family={recipe.posterior.family} is a covariance of noisy weights, and no weight "
            f"is to have noise",
            field="model.noise",
            remedy="name modules (model.noise=all or readout), or use posterior.family=channel, which "
            "does without noise",
        )


def _check_data(data: DataConfig, file: Path | None) -> None:
    """Options of the data that belong together."""
    sets = data.reference_sets
    if sets is not None and (data.reference_energies or (data.references == "given") != bool(sets.energies)):
        raise RecipeError(
            "with data.reference_sets, data.references: given and data.reference_sets.energies need each other, and "
            "data.reference_energies are of no set",
            file=file,
            field="data.reference_sets",
            remedy="set references: given, reference_sets: "
            "{default: pbe, energies: {pbe: {Si: -0.8}, r2scan: {Si: -1.1}}}; "
            "or neither, and each set's references are fitted",
        )
    if sets is None and (data.references == "given") != bool(data.reference_energies):
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


def _check_parts(recipe: Recipe, file: Path | None) -> None:
    """What ``data.atoms_at_once`` needs: structures that feel nothing of each other, and the frames of a batch."""
    if recipe.data.atoms_at_once is None:
        return
    if not recipe.posterior.draws_are_weights:
        raise RecipeError(
            f"the spread of posterior.family={recipe.posterior.family} depends on all structures of a batch, which "
            "cannot be divided",
            file=file,
            field="data.atoms_at_once",
            remedy="remove the key and use a smaller data.batch_size",
        )
    if recipe.data.num_workers:
        raise RecipeError(
            "batches that workers have made cannot be divided",
            file=file,
            field="data.atoms_at_once",
            remedy="remove the key, or use data.num_workers=0",
        )
