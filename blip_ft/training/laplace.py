"""Fits ``posthoc_laplace`` to a plainly fine-tuned model.

Gradient rows, the left-out rule for the prior's scale and the width of the draws are those of the
subspace posterior's fit (``training.subspace``), so that the two families differ in the covariance
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ase import Atoms
from rich.console import Console

from blip_ft.config import Recipe
from blip_ft.data import FrameDataset
from blip_ft.potential import BayesianPotential
from blip_ft.training.subspace import SubspaceFitter
from blip_ft.variational.posteriors.laplace import LaplacePosterior
from blip_ft.variational.posteriors.subspace import Rows, SubspaceData


class LaplaceFitter:
    """Sets the covariance around the present mean.

    Args:
        recipe: options.
        potential: plainly fine-tuned; its posterior is set.
        sets: needs ``train`` and ``validation``.
        console: for progress.
        unlabelled: structures (``data.context``), as for the subspace posterior.
    """

    def __init__(
        self,
        recipe: Recipe,
        potential: BayesianPotential,
        sets: dict[str, FrameDataset],
        console: Console,
        unlabelled: Sequence[Atoms] = (),
    ) -> None:
        assert isinstance(potential.posterior, LaplacePosterior)
        self.posterior = potential.posterior
        self.recipe, self.potential, self.sets, self.console = recipe, potential, sets, console
        self._shared = SubspaceFitter(recipe, potential, sets, console, unlabelled)

    def fit(self) -> dict[str, Any]:
        """Directions, prior scale and covariance; a report for the receipt."""
        scale = self.recipe.posterior.prior_scale
        data = SubspaceData(
            rows=self._rows(),
            prior_scale=None if scale == "auto" else float(scale),
            temperature=self.recipe.objective.kl_temperature,
        )
        report = self.posterior.fit(data)
        self.potential.prior.prior_scale = report["prior_scale"]
        self.potential.amplitude = self.recipe.posterior.amplitude
        report |= {
            "amplitude": self.potential.amplitude,
            "effective_parameters": self.posterior.effective_parameters(),
        }
        self.console.print(
            f"posterior: {len(self.posterior.mu)} of {report['n_train_rows']} directions narrowed by the labels; "
            f"prior scale {report['prior_scale']:.3g}, "
            f"{report['effective_parameters']:.0f} effective parameters, "
            f"draws at {self.potential.amplitude:.2g} of the width"
        )
        self.potential.fit_reports.append({"final": True} | report)
        return report

    def _rows(self) -> Rows:
        """Rows of the training frames; frames without labels would not enter."""
        context, self._shared.context = self._shared.context, []
        try:
            rows = self._shared.rows()
            # its directions reach further down, where combinations of rows cancel
            rows.gradients = rows.gradients.double()
            return rows
        finally:
            self._shared.context = context
