"""All that a run does before it trains: load, check, convert, prove (stages 1 to 3 of ``fit``).

Nothing is written here, so that bad input leaves no half of a run behind.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from ase import Atoms
from rich.console import Console

from blip_ft.backbones.protocol import Backbone
from blip_ft.backbones.registry import get_adapter
from blip_ft.closed_form.budget import fit_to_budget
from blip_ft.closed_form.gradients import groups_of
from blip_ft.config import Recipe
from blip_ft.config.checks import check_noise
from blip_ft.data.batch.dataset import FrameDataset, GraphCache
from blip_ft.data.batch.ledger import Known, Ledger
from blip_ft.data.batch.stream import FrameStream, make_stream
from blip_ft.data.check.examine import DataReport, examine, without_bad_labels
from blip_ft.data.check.leaks import group_leaks
from blip_ft.data.check.sets import check_frames, check_units
from blip_ft.data.findings import Finding
from blip_ft.data.read.sources import mappings
from blip_ft.data.read.unused import labels_found
from blip_ft.data.references import References
from blip_ft.data.split.context import load_context
from blip_ft.data.split.sample import Dropped, dropped_of, unchecked, without_dropped
from blip_ft.data.split.splits import Splits, load_splits
from blip_ft.errors import DataError, RecipeError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.allocator import keep_memory
from blip_ft.terms import PLAIN, objective_spec
from blip_ft.training import sanity_checks
from blip_ft.training.options import try_options
from blip_ft.training.precision import check_precision
from blip_ft.training.reference_sets import fit_reference_sets, of_set, warn_outside_sets
from blip_ft.training.reference_shift import set_references, warn_outside
from blip_ft.training.replay import Probe, load_probe
from blip_ft.training.scratch import initial
from blip_ft.training.terms import Sources, load_frames

#: frames compared with the vendor's calculator in the step-0 sanity check, at least one of every set
GATE_FRAMES = 12


@dataclass
class Prepared:
    """Everything that exists once all checks have passed."""

    recipe: Recipe
    """as it is run: with what ``posterior.max_bytes`` leaves of it"""
    potential: BayesianPotential
    splits: Splits
    sets: dict[str, FrameDataset]
    findings: list[Finding]
    step_zero: sanity_checks.StepZero
    references: References | None
    references_check: dict[str, float] = field(default_factory=dict)
    context: list[Atoms] = field(default_factory=list)
    stream: Callable[[int, int], FrameStream] | None = None
    #: {term of the objective: frames that it needs beside the batches}
    frames: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    probe: Probe | None = None
    report: DataReport | None = None
    #: what the byte budget took away, in words
    reduced: list[str] = field(default_factory=list)
    #: what the pretrained model says about the frames; ``None`` where nobody has asked
    ledger: Ledger | None = None


def prepare(recipe: Recipe, console: Console, known: Mapping[bytes, Known] | None = None) -> Prepared:
    """Stages 1 to 3: load, check, convert, prove.

    Args:
        recipe: validated.
        console: where findings are printed.
        known: what the pretrained model has said in an earlier start of this run (``Ledger.known``).

    Raises:
        BlipError: anything that would make training meaningless.
    """
    check_noise(recipe)
    keep_memory()
    options = recipe.model
    adapter = get_adapter(options.adapter)
    check_precision(recipe, adapter)
    splits = load_splits(recipe.data)
    try_options(recipe, splits)
    backbone = adapter.load(options.checkpoint, trust=options.trust, **options.options)
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
    findings += labels_found(splits.roles(), use_stress=recipe.objective.use_stress)
    calculator = backbone.stock_calculator()
    original = copy.deepcopy(backbone)  # for the vendor's calculator in float64, where that is needed
    backbone.arrange()
    cache, ledger = GraphCache(1e9 * recipe.data.cache_gb), Ledger(backbone)
    ledger.take(known or {})
    sets = {role: FrameDataset(frames, backbone, cache) for role, frames in splits.roles().items()}
    report: DataReport | None = None
    dropped: Dropped | None = None
    if not options.from_scratch:  # initial weights know no units and no labels to compare with
        findings += check_units(
            splits.train,
            lambda atoms: sanity_checks.stock_predictions(calculator, atoms),
            use_stress=recipe.objective.use_stress,
            by_state=not backbone.conditions,
        )
        checked, report = _labels_checked(recipe, splits, backbone, findings, sets, ledger)
        findings = report.findings + unchecked(recipe.data)
        if checked is not splits:
            wrong = _dropped(recipe, report)
            sets = _without(sets, wrong)
            if recipe.data.stream is not None and "train" in wrong:
                dropped = dropped_of(recipe.data, [splits.train[i] for i in wrong["train"]])
                checked = replace(checked, train=without_dropped(recipe.data, splits.train, dropped))
                sets["train"] = sets["train"].relabelled(checked.train)
            splits = checked
    sets = {name.removeprefix("test/"): dataset for name, dataset in sets.items()}
    context = load_context(recipe.data, backbone, len(splits.train), console.print)
    reduced: list[str] = []
    n_context = len(context) + math.ceil(recipe.posterior.perturbed_share * len(splits.train))
    n_atoms = [len(z) for z in splits.train["numbers"]]
    recipe = fit_to_budget(recipe, backbone, n_atoms, n_context, reduced.append)
    options = recipe.model
    for line in reduced:
        console.print(line, markup=False)
    console.print(
        "frames: " + ", ".join(f"{name} {len(d)}" for name, d in sets.items()) + f"  ({splits.rule})",
        markup=False,
    )

    for line in sorted({text for d in sets.values() for text in mappings(d.frames)}):
        console.print(f"labels of {line}", markup=False)

    probe = _spread(sets, GATE_FRAMES)
    stock = sanity_checks.stock_predictions(calculator, probe)

    potential = BayesianPotential(
        backbone,
        options,
        recipe.posterior,
        seed=recipe.seed,
        n_draws=recipe.uncertainty.n_draws,
    )
    counts = potential.converted.report.counts
    _check_left_out(recipe, potential, sets["train"])
    console.print(
        f"converted {counts['converted']:,} weights: {counts['trained']:,} trained, {counts['noisy']:,} with noise; "
        f"{counts['left']:,} left as they are"
    )
    step_zero = sanity_checks.check_step_zero(
        potential,
        probe,
        stock,
        lambda atoms: sanity_checks.stock_predictions(original.double().stock_calculator(), atoms),
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
    own = None
    if recipe.data.reference_sets is not None:
        own, fits = fit_reference_sets(
            recipe.data, potential, sets["train"], splits.isolated_of, console, ledger
        )
        findings += warn_outside_sets(own, fits, sets)
        sets = {name: own.align(dataset) for name, dataset in sets.items()}
        potential.reference_sets = own
    references, check, notes = set_references(
        recipe.data if own is None else of_set(recipe.data, own.default),
        potential,
        sets["train"],
        splits.isolated if own is None else splits.isolated_of.get(own.default, {}),
        console,
        ledger,
    )
    findings += notes
    if references is not None:
        findings += warn_outside(references, sets)
    frames = load_frames(
        [PLAIN, objective_spec(recipe.objective.kind)],
        Sources(recipe, sets["train"].frames, potential, context, findings),
    )
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
        context,
        make_stream(recipe, splits, backbone, own, dropped),
        frames,
        load_probe(recipe, potential),
        report,
        reduced,
        ledger,
    )


def _labels_checked(
    recipe: Recipe,
    splits: Splits,
    backbone: Backbone,
    findings: list[Finding],
    sets: Mapping[str, FrameDataset],
    ledger: Ledger,
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
        sets=sets,
        ledger=ledger,
        sets_by=None if recipe.data.reference_sets is None else recipe.data.reference_sets.by,
    )
    dropped = _dropped(recipe, report)
    if dropped:
        return without_bad_labels(splits, dropped), report
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


def _check_left_out(recipe: Recipe, potential: BayesianPotential, train: FrameDataset) -> None:
    """Refuse what a closed form cannot be fitted with, before anything is trained.

    Raises:
        RecipeError: no weight has noise.
        DataError: the prior's scale is to be chosen by leaving groups of frames out, and there is one group.
    """
    if not recipe.posterior.closed_form:
        return
    if not potential.posterior.sites:
        raise RecipeError(
            f"posterior.family={recipe.posterior.family} is a covariance of noisy weights, and no weight has noise",
            field="model.noise",
            remedy="name modules that have some: blip-finetune inspect lists them",
        )
    if recipe.posterior.prior_scale == "auto" and len(set(groups_of(train))) < 2:
        n = len(train)
        raise DataError(
            f"the prior's scale is chosen by leaving groups of training frames out, and {n} frame{'s' * (n != 1)} "
            "make one group",
            file=train.frames["source"][0],
            field="posterior.prior_scale",
            remedy="give more frames, or sources for data.validation, data.calibration and data.test so "
            "that more are left "
            "to train on; or a number, for instance posterior.prior_scale=0.1",
        )


def _dropped(recipe: Recipe, report: DataReport) -> dict[str, dict[int, str]]:
    """The frames that ``data.bad_labels`` leaves out."""
    return {"auto": report.certain, "drop": report.bad}.get(recipe.data.bad_labels, {})


def _without(
    sets: Mapping[str, FrameDataset], bad: Mapping[str, Mapping[int, str]]
) -> dict[str, FrameDataset]:
    """The sets without frames that have a wrong label (``without_bad_labels``), with the graphs of the others."""
    return {
        role: dataset.select([i for i in range(len(dataset)) if i not in bad[role]])
        if role in bad
        else dataset
        for role, dataset in sets.items()
    }


def _spread(sets: dict[str, FrameDataset], n: int) -> list[Atoms]:
    """About ``n`` frames spread evenly over all sets, at least one of each."""
    total = sum(len(d) for d in sets.values())
    out: list[Atoms] = []
    for dataset in sets.values():
        share = min(len(dataset), max(1, round(n * len(dataset) / total)))
        out += [dataset[int(i)].atoms for i in torch.linspace(0, len(dataset) - 1, share).round()]
    return out
