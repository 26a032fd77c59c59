"""Make the report of a finished run again from the files in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blip_ft.config import load_recipe
from blip_ft.data.findings import Finding
from blip_ft.errors import BlipError
from blip_ft.files import set_name
from blip_ft.potential.calibration import Calibration
from blip_ft.report import write_report
from blip_ft.uncertainty.diagnostics import find_diagnostics
from blip_ft.uncertainty.results import SetPrediction
from blip_ft.verify.verdict import VERDICT


def rewrite_report(folder: str | Path) -> Path:
    """Write ``report.html`` of a run once more, for instance after an update of the program.

    Args:
        folder: of a finished run.

    Returns:
        Path of the report.

    Raises:
        BlipError: a file of the run is missing or damaged, or the report cannot be written.
    """
    folder = Path(folder)
    metrics, history, receipt = (_read(folder / f"{name}.json") for name in ("metrics", "history", "receipt"))
    calibration = Calibration.from_dict(_read(folder / "calibration.json"))
    predictions: dict[str, dict[str, SetPrediction]] = {}
    for path in sorted((folder / "predictions").glob("*-*.npz")):
        model, _, name = path.stem.partition("-")
        predictions.setdefault(model, {})[set_name(name)] = SetPrediction.load(path)
    return write_report(
        folder,
        recipe=load_recipe(str(folder / "recipe.yaml"), finished=True),
        metrics=metrics,
        predictions=predictions,
        calibration=calibration,
        history=history,
        receipt=receipt,
        findings=[Finding(**finding) for finding in receipt["data"]["findings"]],
        signatures=find_diagnostics(
            metrics=metrics["blip"], calibration=calibration, history=history["blip"]
        ),
        data=_read(folder / "data_report.json") if (folder / "data_report.json").exists() else None,
        drift=_read(folder / "drift.json") if (folder / "drift.json").exists() else None,
        linearity=_read(folder / "linearity.json") if (folder / "linearity.json").exists() else None,
        verdict=_read(folder / VERDICT) if (folder / VERDICT).exists() else None,
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BlipError(
            f"not a file of a finished run: {error}",
            file=path,
            remedy="give the folder of a run that has finished",
        ) from error
