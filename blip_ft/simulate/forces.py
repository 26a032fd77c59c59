"""Forces of a simulation, and its error bars by the cheapest means that hold.

Dynamics runs on the mean weights, or on those of one draw. Now and then there are error bars: the std of the energy
from the gradient that gives the forces (``uncertainty.linearized``), those of the forces from K draws,

    C_i = 1/K sum_k d_ik d_ik^T,      d_ik = (F_i(theta + a A z_k) - F_i(theta)) / a,            (1)

differences from the forces of the mean weights, which a simulation has anyway. At the amplitude a of a model's
draws they are as good as half the differences of pairs +z and -z, at half the evaluations (docs/benchmarks.md).
Each error bar takes other draws than the one before, so that what few draws get wrong does not stay.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray

from blip_ft.backbones.calculator import ModelCalculator, results_of
from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.families.model import drawing
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.uncertainty.draws import evaluate_draws
from blip_ft.uncertainty.linearized import predict_linearized
from blip_ft.uncertainty.moments import to_double
from blip_ft.variational.noise import OFF, Noise

Floats = NDArray[np.float64]
#: atoms up to which draws are evaluated in one call on a CPU: 4 draws of SevenNet-0 take 3.6 calls of the mean model
#: together and 4.3 apart for 9 atoms, 6.1 and 4.3 for 36
TOGETHER = 16


@dataclass(frozen=True)
class ErrorBars:
    """Error bars of one structure of n atoms.

    Attributes:
        energy_std: epistemic std of the total energy, calibrated, eV.
        forces_std: (n, 3) of the force components, likewise, eV/Å.
        forces_std_norm: (n,) root of the sum of their squares, eV/Å.
        forces_total: (n,) root of the sum of the squares of the total stds (with the scatter of labels), eV/Å.
        sampling_error: relative std of the stds of forces that comes from few draws.
    """

    energy_std: float
    forces_std: Floats
    forces_std_norm: Floats
    forces_total: Floats
    sampling_error: float


class Forces(ModelCalculator):
    """Energy (eV), forces (eV/Å) and, where asked for, stress (eV/Å^3) of one set of weights; scores of the atoms.

    Args:
        potential: the model.
        stress: also stress.
        draw: number of the draw whose weights are used, of how many, at which width; by default the mean weights.

    Attributes:
        with_energy_std: the next evaluation also gives ``energy_std``, from the same backward call.
    """

    def __init__(
        self, potential: BayesianPotential, *, stress: bool, draw: tuple[int, int, float] | None = None
    ) -> None:
        super().__init__()
        self.potential, self.stress, self.draw = potential, stress, draw
        self.with_energy_std = False
        self._batch: Batch | None = None

    @property
    def linear(self) -> bool:
        """Whether the std of the energy comes with the forces."""
        return (
            self.draw is None
            and self.potential.posterior.ready
            and self.potential.posterior.draws_are_weights
        )

    def evaluated(self, atoms: Atoms) -> dict[str, Any]:
        """``results`` of a structure."""
        backbone = self.potential.backbone
        backbone.check(atoms)
        batch = self._batch = backbone.batch([atoms]).to(backbone.device)
        if self.with_energy_std and self.linear:
            moments = predict_linearized(self.potential, batch, method="energy", stress=self.stress)
            assert moments.energy_std is not None
            std = self._calibration.energy.scale * float(moments.energy_std[0])
            return self._read(moments.mean, batch) | {"energy_std": std}
        with torch.no_grad():  # the backbone switches autograd on for its own forces
            return self._read(to_double(self._of_weights(batch)), batch)

    def _of_weights(self, batch: Batch) -> Prediction:
        out: Prediction
        if self.draw is None:
            out = self.potential(batch, OFF, stress=self.stress)
            return out
        number, of, amplitude = self.draw
        with drawing(self.potential, of, amplitude):
            out = self.potential(batch, Noise("draw", draw=number), stress=self.stress)
        return out

    def _read(self, out: Prediction, batch: Batch) -> dict[str, Any]:
        results = results_of(out, stress=self.stress)
        if self.potential.ood is not None and out.node_features is not None:
            results["ood_score"] = _numpy(self.potential.ood.score(out.node_features, batch.numbers))
        return results

    @property
    def _calibration(self) -> Calibration:
        return self.potential.calibration or Calibration.identity()

    @property
    def has_error_bars(self) -> bool:
        """Whether the model has draws."""
        return self.draw is None and self.potential.posterior.ready

    def error_bars(self, n_draws: int, turn: int) -> ErrorBars:
        """Error bars of the structure that was evaluated last; its results stay as they are.

        Args:
            n_draws: K.
            turn: number of this error bar in the run: another one, other draws.
        """
        assert self._batch is not None
        posterior = self.potential.posterior
        # of a pair +z, -z one is taken
        stride = 2 if posterior.paired else 1
        of = max(self.potential.n_draws, stride * n_draws)
        numbers = [(stride * ((turn * n_draws + k) % (of // stride))) for k in range(n_draws)]
        batch = self._batch
        if self.potential.backbone.device.type == "cpu" and batch.numbers.numel() > TOGETHER:
            batch = replace(batch, copies=None)
        with drawing(self.potential, of):
            draws = evaluate_draws(self.potential, batch, of, stress=False, chosen=numbers)
        amplitude, calibration = self.potential.amplitude, self._calibration
        off = np.stack([_numpy(d.forces) - self.results["forces"] for d in draws]) / amplitude
        scale, noise = calibration.forces.scale, calibration.forces.aleatoric
        std = scale * np.sqrt(np.square(off).mean(axis=0))
        norm = np.sqrt(np.square(std).sum(axis=1))
        energy_std = self.results.get("energy_std")
        if energy_std is None:
            steps = np.array([float(d.energy[0]) - self.results["energy"] for d in draws]) / amplitude
            energy_std = calibration.energy.scale * float(np.sqrt(np.square(steps).mean()))
        return ErrorBars(
            energy_std=energy_std,
            forces_std=std,
            forces_std_norm=norm,
            forces_total=np.sqrt(3 * noise**2 + norm**2),
            sampling_error=1 / np.sqrt(2 * n_draws),
        )


def _numpy(value: torch.Tensor | None) -> Floats:
    assert value is not None
    return np.asarray(value.detach().double().cpu().numpy())
