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
PROBE_FRAMES = 12


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
    """Stages 1 to 3 of a fit: load, check, convert, prove.

    Args:
        recipe: validated.
        console: where findings are printed.
        known: what the pretrained model has said in an earlier start of this run (``Ledger.known``).

    Raises:
        BlipError: anything that would make training meaningless.
    """
    check_noise(recipe)
    keep_memory()
    stages = _Stages(recipe, console)
    stages.load(known or {})
    stages.check_data()
    stages.fit_to_budget()
    stages.convert()
    stages.bring_energies_together()
    return stages.end()


class _Stages:
    """What is known so far, and how each stage adds to it.

    Args:
        recipe: validated.
        console: where findings are printed.
    """

    def __init__(self, recipe: Recipe, console: Console) -> None:
        self.recipe, self.console = recipe, console
        self.findings: list[Finding] = []
        self.report: DataReport | None = None
        self.dropped: Dropped | None = None
        self.reduced: list[str] = []

    def load(self, known: Mapping[bytes, Known]) -> None:
        """Frames and the pretrained model."""
        recipe, options = self.recipe, self.recipe.model
        adapter = get_adapter(options.adapter)
        check_precision(recipe, adapter)
        self.splits = load_splits(recipe.data)
        try_options(recipe, self.splits)
        backbone = adapter.load(options.checkpoint, trust=options.trust, **options.options)
        if recipe.objective.use_stress and not backbone.has_stress:
            raise RecipeError(
                f"'{options.checkpoint}' predicts no stress, so it cannot be trained on stress labels",
                field="objective.use_stress",
                remedy="objective.use_stress=false, or a model whose forces and stress come from its energy",
            )
        if options.from_scratch:
            backbone = self._initial(backbone)
        if options.dtype == "float64":
            backbone.double()
        self.calculator = backbone.stock_calculator()
        # for the vendor's calculator in float64, where that is needed
        self.original = copy.deepcopy(backbone)
        backbone.arrange()
        self.backbone, self.ledger = backbone, Ledger(backbone)
        self.ledger.take(known)
        cache = GraphCache(1e9 * recipe.data.cache_gb)
        self.sets = {
            role: FrameDataset(frames, backbone, cache) for role, frames in self.splits.roles().items()
        }

    def _initial(self, backbone: Backbone) -> Backbone:
        """The same architecture with the vendor's initial weights."""
        train = self.recipe.model.train
        backbone = initial(backbone, self.recipe.seed)
        self.console.print(backbone.origin["checkpoint"])
        if "rest" not in ([train] if isinstance(train, str) else train):
            self.console.print(
                "parameters outside linear blocks keep initial values: see model.train", style="yellow"
            )
        return backbone

    def check_data(self) -> None:
        """Frames by themselves, then labels beside the pretrained model; without what is to be dropped."""
        recipe, splits, backbone = self.recipe, self.splits, self.backbone
        self.findings = check_frames(splits, backbone) + group_leaks(splits)
        self.findings += labels_found(splits.roles(), use_stress=recipe.objective.use_stress)
        if not recipe.model.from_scratch:  # initial weights know no units and no labels to compare with
            self.findings += check_units(
                splits.train,
                lambda atoms: sanity_checks.stock_predictions(self.calculator, atoms),
                use_stress=recipe.objective.use_stress,
                by_state=not backbone.conditions,
            )
            checked, self.report = _labels_checked(
                recipe, splits, backbone, self.findings, self.sets, self.ledger
            )
            self.findings = self.report.findings + unchecked(recipe.data)
            if checked is not splits:
                self._drop(checked, _dropped(recipe, self.report))
        self.sets = {name.removeprefix("test/"): dataset for name, dataset in self.sets.items()}
        self.context = load_context(recipe.data, backbone, len(self.splits.train), self.console.print)

    def _drop(self, checked: Splits, wrong: Mapping[str, Mapping[int, str]]) -> None:
        """Go on without frames that have a wrong label."""
        data, train = self.recipe.data, self.splits.train
        self.sets = _without(self.sets, wrong)
        if data.stream is not None and "train" in wrong:
            self.dropped = dropped_of(data, [train[i] for i in wrong["train"]])
            checked = replace(checked, train=without_dropped(data, train, self.dropped))
            self.sets["train"] = self.sets["train"].relabelled(checked.train)
        self.splits = checked

    def fit_to_budget(self) -> None:
        """The recipe with what ``posterior.max_bytes`` leaves of it."""
        recipe, train = self.recipe, self.splits.train
        n_context = len(self.context) + math.ceil(recipe.posterior.perturbed_share * len(train))
        n_atoms = [len(z) for z in train["numbers"]]
        self.recipe = fit_to_budget(recipe, self.backbone, n_atoms, n_context, self.reduced.append)
        for line in self.reduced:
            self.console.print(line, markup=False)
        sizes = ", ".join(f"{name} {len(d)}" for name, d in self.sets.items())
        self.console.print(f"frames: {sizes}  ({self.splits.rule})", markup=False)
        for line in sorted({text for d in self.sets.values() for text in mappings(d.frames)}):
            self.console.print(f"labels of {line}", markup=False)

    def convert(self) -> None:
        """Variational layers, and the proof that step 0 is the pretrained model."""
        recipe = self.recipe
        probe = _spread(self.sets, PROBE_FRAMES)
        stock = sanity_checks.stock_predictions(self.calculator, probe)
        self.potential = BayesianPotential(
            self.backbone,
            recipe.model,
            recipe.posterior,
            seed=recipe.seed,
            n_draws=recipe.uncertainty.n_draws,
        )
        counts = self.potential.converted.report.counts
        _check_left_out(recipe, self.potential, self.sets["train"])
        self.console.print(
            f"converted {counts['converted']:,} weights: {counts['trained']:,} trained, "
            f"{counts['noisy']:,} with noise; {counts['left']:,} left as they are"
        )
        zero = self.step_zero = sanity_checks.check_step_zero(
            self.potential,
            probe,
            stock,
            lambda atoms: sanity_checks.stock_predictions(self.original.double().stock_calculator(), atoms),
        )
        double = f" ({zero.n_checked_in_float64} of them in float64)" if zero.n_checked_in_float64 else ""
        self.console.print(
            f"step 0 equals the vendor's calculator on {zero.n_frames} frames: "
            f"{zero.energy_ev_per_atom:.1e} eV/atom, {zero.forces_ev_per_ang:.1e} eV/Å{double}"
        )

    def bring_energies_together(self) -> None:
        """Energies per element that bring the zero of the labels and that of the model together."""
        data, splits = self.recipe.data, self.splits
        isolated: Mapping[int, float] = splits.isolated
        self.own_sets = None
        if data.reference_sets is not None:
            own, fits = fit_reference_sets(
                data, self.potential, self.sets["train"], splits.isolated_of, self.console, self.ledger
            )
            self.findings += warn_outside_sets(own, fits, self.sets)
            self.sets = {name: own.align(dataset) for name, dataset in self.sets.items()}
            self.potential.reference_sets = self.own_sets = own
            data, isolated = of_set(data, own.default), splits.isolated_of.get(own.default, {})
        self.references, self.references_check, notes = set_references(
            data, self.potential, self.sets["train"], isolated, self.console, self.ledger
        )
        self.findings += notes
        if self.references is not None:
            self.findings += warn_outside(self.references, self.sets)

    def end(self) -> Prepared:
        """Frames of the objective's terms; everything that was found is printed."""
        recipe = self.recipe
        frames = load_frames(
            [PLAIN, objective_spec(recipe.objective.kind)],
            Sources(recipe, self.sets["train"].frames, self.potential, self.context, self.findings),
        )
        for finding in self.findings:
            style = None if finding.severity == "info" else "yellow"
            # [ ] are no styles here
            self.console.print(str(finding), style=style, soft_wrap=True, markup=False)
        return Prepared(
            recipe,
            self.potential,
            self.splits,
            self.sets,
            self.findings,
            self.step_zero,
            self.references,
            self.references_check,
            self.context,
            make_stream(recipe, self.splits, self.backbone, self.own_sets, self.dropped),
            frames,
            load_probe(recipe, self.potential),
            self.report,
            self.reduced,
            self.ledger,
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
