"""What users of the library call: a trained potential, and what can be done with it."""

from __future__ import annotations

from pathlib import Path

from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import load_model
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.predict import Method


class Potential(BayesianPotential):
    """A potential with error bars, as :func:`load` returns it."""

    def calculator(self, *, n_draws: int | None = None, method: Method = "draws") -> BlipCalculator:
        """An ASE calculator; see :class:`blip_ft.uncertainty.calculator.BlipCalculator`."""
        return BlipCalculator(self, n_draws=n_draws, method=method)


def load(
    path: str | Path, *, dtype: str | None = None, device: str = "cpu", reference_set: str | None = None
) -> Potential:
    """Open a trained potential; see :func:`blip_ft.potential.checkpoint.load_model`."""
    return load_model(path, dtype=dtype, device=device, reference_set=reference_set, kind=Potential)
