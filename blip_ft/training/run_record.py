"""The conversion receipt: what was done to which model, with which data and versions."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from blip_ft.config import Recipe
from blip_ft.data.frame import fingerprint
from blip_ft.version import __version__

if TYPE_CHECKING:
    from blip_ft.training.prepare import Prepared


def make_record(recipe: Recipe, prepared: Prepared, *, seconds: float) -> dict[str, Any]:
    """JSON-serialisable record of a run."""
    potential, references = prepared.potential, prepared.references
    report = potential.converted.report
    return {
        "blip_ft": __version__,
        "base": potential.backbone.origin | {"adapter": potential.backbone.name},
        "versions": potential.backbone.versions()
        | {"torch": torch.__version__, "python": platform.python_version()},
        "seed": recipe.seed,
        "conversion": {"counts": report.counts, "modules": report.rows},
        "step_zero": prepared.step_zero.to_dict(),
        "posterior": potential.fit_reports,
        "budget": prepared.reduced,
        "references": None if references is None else asdict(references) | prepared.references_check,
        "reference_sets": None if potential.reference_sets is None else potential.reference_sets.to_dict(),
        "data": {
            "rule": prepared.splits.rule,
            "dropped": prepared.splits.dropped,
            "sets": {
                name.removeprefix("test/"): {"n_frames": len(frames), "fingerprint": fingerprint(frames)}
                for name, frames in prepared.splits.roles().items()
            },
            "findings": [asdict(f) for f in prepared.findings],
        },
        "seconds": round(seconds, 1),
    }
