"""``blip-finetune check``: the data report of a recipe, without training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blip_ft.backbones.registry import get_adapter
from blip_ft.config import Recipe
from blip_ft.data.batch.dataset import FrameDataset, GraphCache
from blip_ft.data.batch.ledger import Ledger
from blip_ft.data.check.examine import DataReport, examine
from blip_ft.data.check.replay import examine_replay
from blip_ft.data.findings import SEVERITIES, Finding, from_error
from blip_ft.data.split.sample import unchecked
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import DataError
from blip_ft.system.allocator import keep_memory

if TYPE_CHECKING:
    from blip_ft.training.cost import Cost


@dataclass
class Checked:
    """What ``check`` has found.

    Attributes:
        report: on the data.
        cost: what the run would take; ``None`` if nobody asked, the data stop the run, or its frames are a stream.
    """

    report: DataReport
    cost: Cost | None = None


def check_data(recipe: Recipe, progress: Callable[[int, int], Any] | None = None) -> DataReport:
    """The report of :func:`check_run`, without the cost."""
    return check_run(recipe, progress, cost=False).report


def check_run(
    recipe: Recipe,
    progress: Callable[[int, int], Any] | None = None,
    *,
    cost: bool = True,
    largest: bool = False,
) -> Checked:
    """Everything that ``fit`` would check about the data, as a report.

    What would stop a run (an unreadable file, a structure in two roles, a wrong unit) is a finding
    of severity ``error``; where nothing can be read, it is the only one.

    Args:
        recipe: a validated recipe.
        progress: called with the number of frames compared with the model and of all.
        cost: also predict what the run would take.
        largest: with it the largest structure that fits into memory.

    Raises:
        BlipError: the model cannot be loaded, or the recipe cannot be run with it.
    """
    started = time.monotonic()
    keep_memory()
    options = recipe.model
    try:
        splits = load_splits(recipe.data)
    except DataError as error:
        return Checked(DataReport([from_error(error)], {}))
    backbone = get_adapter(options.adapter).load(options.checkpoint, trust=options.trust, **options.options)
    if options.dtype == "float64":
        backbone.double()
    backbone.arrange()
    cache, ledger = GraphCache(1e9 * recipe.data.cache_gb), Ledger(backbone)
    sets = {role: FrameDataset(frames, backbone, cache) for role, frames in splits.roles().items()}
    try:
        report = examine(
            splits,
            backbone,
            use_stress=recipe.objective.use_stress,
            most=recipe.data.check_frames,
            progress=progress,
            sets=sets,
            ledger=ledger,
            sets_by=None if recipe.data.reference_sets is None else recipe.data.reference_sets.by,
        )
    except DataError as error:
        return Checked(DataReport([from_error(error)], {}))
    try:
        report.findings += examine_replay(recipe, backbone, progress)
    except DataError as error:
        report.findings.append(from_error(error))
    report.findings += unchecked(recipe.data)
    report.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    report.findings.append(Finding("coverage", "info", [], splits.rule))
    spent = time.monotonic() - started
    if not cost or any(f.severity == "error" for f in report.findings):
        return Checked(report)
    from blip_ft.training.cost import predict_cost  # Lightning takes seconds to import

    unknown = sum(map(len, sets.values())) - len(ledger)
    predicted = predict_cost(recipe, splits, backbone, sets, spent=spent, unknown=unknown, largest=largest)
    return Checked(report, predicted)
