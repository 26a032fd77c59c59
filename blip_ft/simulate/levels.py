"""The level of a model's calibration frames, wherever it is kept."""

from __future__ import annotations

from pathlib import Path

from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.levels import Levels
from blip_ft.uncertainty.calibration import levels_of
from blip_ft.uncertainty.results import SetPrediction


def known_levels(potential: BayesianPotential, folder: str | Path) -> Levels | None:
    """Of the model itself, or of the run that it lies in: models of earlier versions do not carry it.

    Args:
        potential: the model.
        folder: what it was opened from.
    """
    predictions = Path(folder) / "predictions" / "blip-calibration.npz"
    if potential.levels is not None or potential.calibration is None or not predictions.is_file():
        return potential.levels
    return levels_of(SetPrediction.load(predictions), potential.calibration)
