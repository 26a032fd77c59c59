"""What the ASE calculators of this package share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from blip_ft.backbones import electrons
from blip_ft.backbones.protocol import Prediction


class ModelCalculator(Calculator):
    """An ASE calculator of a model; charge and spin in ``atoms.info`` count as part of the structure."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """As in ASE, and charge and spin in ``atoms.info`` count."""
        return electrons.changes(self.atoms, atoms, super().check_state(atoms, tol))

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate ``atoms``."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        self.results: dict[str, Any] = self.evaluated(self.atoms)

    @abstractmethod
    def evaluated(self, atoms: Atoms) -> dict[str, Any]:
        """``results`` of a structure."""


def results_of(prediction: Prediction, *, stress: bool) -> dict[str, Any]:
    """Energy (eV), forces (eV/Å) and stress (eV/Å^3) of one structure in float64, as ASE has them.

    Args:
        prediction: of a batch of one.
        stress: whether the structure has one.
    """
    assert prediction.forces is not None
    energy = float(prediction.energy[0])
    results: dict[str, Any] = {
        "energy": energy,
        "free_energy": energy,
        "forces": prediction.forces.detach().double().cpu().numpy(),
    }
    if stress and prediction.stress is not None:
        results["stress"] = prediction.stress[0].detach().double().cpu().numpy()
    return results
