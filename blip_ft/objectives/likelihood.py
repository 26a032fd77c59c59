"""Log likelihood of a structure's labels.

NLL of a structure = **sum** over its labels: the energy per atom once, 3n force components, six
stress components; each Gaussian with the noise std of its kind. A sum, not a mean: a mean over
components would temper the likelihood by 3n without anyone seeing it. Labels that are missing
(NaN) contribute nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip_ft.backbone import Batch, Prediction
from blip_ft.config import ObjectiveConfig

LOG_2PI = math.log(2 * math.pi)


@dataclass
class LabelNLL:
    """NLL of each structure, (B,) nats, by kind of label."""

    energy: Tensor
    forces: Tensor
    stress: Tensor

    @property
    def total(self) -> Tensor:
        """(B,) sum over all labels of a structure."""
        return self.energy + self.forces + self.stress


class GaussianLikelihood(nn.Module):
    """Gaussian labels with three noise stds.

    Args:
        config: ``energy_std`` (eV/atom), ``forces_std`` (eV/Å), ``stress_std`` (eV/Å^3) and
            whether they are learned. Learned from large values they soak up the spread and the
            posterior never learns, so they are fixed by default.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        stds = [config.energy_std, config.forces_std, config.stress_std]
        self.log_std = nn.Parameter(
            torch.tensor(stds, dtype=torch.float64).log(), requires_grad=config.learn_noise
        )
        self.use_stress = config.use_stress

    @property
    def std(self) -> dict[str, float]:
        """Present noise stds: energy (eV/atom), forces (eV/Å), stress (eV/Å^3)."""
        return dict(zip(("energy", "forces", "stress"), self.log_std.exp().tolist(), strict=True))

    def forward(self, prediction: Prediction, batch: Batch) -> LabelNLL:
        """NLL of each structure of a batch, in float64."""
        n = batch.n_atoms.double()
        zero = prediction.energy.new_zeros(batch.n_structures, dtype=torch.float64)
        energy, forces, stress = zero, zero, zero
        if "energy" in batch.labels:
            energy = self._nll(prediction.energy.double() / n, batch.labels["energy"] / n, 0)
        if "forces" in batch.labels and prediction.forces is not None:
            terms = self._nll(prediction.forces.double(), batch.labels["forces"], 1).sum(dim=1)
            forces = zero.index_add(0, batch.structure, terms)
        if self.use_stress and "stress" in batch.labels and prediction.stress is not None:
            stress = self._nll(prediction.stress.double(), batch.labels["stress"], 2).sum(dim=1)
        return LabelNLL(energy, forces, stress)

    def _nll(self, predicted: Tensor, label: Tensor, kind: int) -> Tensor:
        """Elementwise Gaussian NLL; zero where the label is NaN.

        Only the label decides: a prediction that is NaN where there is a label must not pass as
        a missing label, or a model that broke down would look like a perfect one.
        """
        known = ~torch.isnan(label)
        # where first, arithmetic after: a NaN in the untaken branch would poison the gradient
        z = torch.where(known, predicted - label, 0.0) / self.log_std[kind].exp()
        return (0.5 * z.square() + self.log_std[kind] + 0.5 * LOG_2PI) * known
