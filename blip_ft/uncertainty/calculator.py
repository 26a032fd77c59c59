"""An ASE calculator that also says how sure it is."""

from __future__ import annotations

from typing import Any

from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError, all_changes

from blip_ft.backbones.calculator import ModelCalculator
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.uncertainty.outputs import OURS, STANDARD
from blip_ft.uncertainty.predict import Method, predict_atoms


class BlipCalculator(ModelCalculator):
    """Energy, forces and stress of the mean weights (``pathwise``) or as the mean over draws, with stds.

    Either way forces are the gradient of the energy: every draw is conservative. ``*_std`` are
    epistemic (from the posterior, times the calibrated scale), ``*_std_aleatoric`` the scatter of the labels
    found on the calibration frames, ``*_std_total`` both. Where no calibration frame had a label of a property, its
    scatter is unknown: there is no ``*_std_aleatoric`` and no ``*_std_total`` of it.

    ``results`` holds the rows of :data:`blip_ft.uncertainty.outputs.OUTPUTS` that the method gives, with their
    shapes and units.

    Args:
        potential: from ``blip_ft.load``.
        n_draws: fewer draws than the model has are faster; 0 gives the mean weights without
            uncertainties. By default all.
        method: ``draws``: mean and std over the draws. ``energy``: the mean weights' prediction and,
            from the same backward call, ``energy_std`` of the linearised model: the fastest, for
            molecular dynamics. ``linear``: also its exact ``forces_cov`` and ``stress_std``, or an
            estimate from ``n_draws`` random directions.

    Models that take charge and spin (``Backbone.conditions``) find them in ``atoms.info``; a change of either is a
    change of the structure.

    Structures that are not periodic in all directions have no stress: asking for it raises
    ``PropertyNotImplementedError``.
    """

    implemented_properties = ["free_energy", *STANDARD, *OURS]

    def __init__(
        self,
        potential: BayesianPotential,
        *,
        n_draws: int | None = None,
        method: Method = "draws",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.potential, self.n_draws, self.method = potential, n_draws, method

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate all draws on ``atoms``."""
        super().calculate(atoms, properties, system_changes)
        missing = [p for p in properties or [] if p not in self.results]
        if missing:
            raise PropertyNotImplementedError(
                f"{', '.join(missing)}: no stress without periodicity in all directions, no std that the calculator's "
                "method does not give, no aleatoric or total std of what no calibration frame had a label of"
            )

    def evaluated(self, atoms: Atoms) -> dict[str, Any]:
        """``results`` of a structure."""
        (item,) = predict_atoms(self.potential, [atoms], n_draws=self.n_draws, method=self.method)
        results = {k: v for k, v in item.items() if v is not None}
        return results | {"free_energy": results["energy"]}
