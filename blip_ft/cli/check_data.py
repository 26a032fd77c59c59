"""``blip-finetune check``: the data report of a recipe, without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blip_ft.allocator import keep_memory
from blip_ft.backbones.registry import get_adapter
from blip_ft.config import Recipe
from blip_ft.data.check.examine import DataReport, examine
from blip_ft.data.check.replay import examine_replay
from blip_ft.data.findings import SEVERITIES, Finding, from_error
from blip_ft.data.split.sample import unchecked
from blip_ft.data.split.splits import load_splits
from blip_ft.errors import DataError


def check_data(recipe: Recipe, progress: Callable[[int, int], Any] | None = None) -> DataReport:
    """Everything that ``fit`` would check about the data, as a report.

    What would stop a run (an unreadable file, a structure in two roles, a wrong unit) is a finding
    of severity ``error``; where nothing can be read, it is the only one.

    Args:
        recipe: a validated recipe.
        progress: called with the number of frames compared with the model and of all.

    Raises:
        BlipError: the model cannot be loaded.
    """
    keep_memory()
    options = recipe.model
    try:
        splits = load_splits(recipe.data)
    except DataError as error:
        return DataReport([from_error(error)], {})
    backbone = get_adapter(options.adapter).load(options.checkpoint, trust=options.trust, **options.options)
    if options.dtype == "float64":
        backbone.double()
    backbone.arrange()
    try:
        report = examine(
            splits,
            backbone,
            use_stress=recipe.objective.use_stress,
            most=recipe.data.check_frames,
            progress=progress,
            sets_by=None if recipe.data.reference_sets is None else recipe.data.reference_sets.by,
        )
    except DataError as error:
        return DataReport([from_error(error)], {})
    try:
        report.findings += examine_replay(recipe, backbone, progress)
    except DataError as error:
        report.findings.append(from_error(error))
    report.findings += unchecked(recipe.data)
    report.findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    report.findings.append(Finding("coverage", "info", [], splits.rule))
    return report
