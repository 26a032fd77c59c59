"""Log likelihood of a structure's labels.

NLL of a structure = **sum** over its labels: the energy per atom once, 3n force components, six
stress components; each with the noise std of its kind. A sum, not a mean: a mean over
components would temper the likelihood by 3n without anyone seeing it. Labels that are missing
(NaN) contribute nothing. Weights of frames and atoms are exponents of the likelihood: a frame of
weight 2 counts as two frames.

====================  ========================================================================
``gaussian``          independent Gaussian labels
``student_t``         independent labels with nu degrees of freedom: single outliers pull less
``joint_student_t``   one unknown noise level per structure, for its energy, forces and stress
                      together: labels are Gaussian with variance sigma^2 (nu-2) / g, g ~ chi^2(nu)
                      common to the structure; integrated over g this is the multivariate t (Lange,
                      Little and Taylor, J. Am. Stat. Assoc. 84, 881, 1989). A badly converged
                      frame loses its weight as a whole
====================  ========================================================================

In all three the std of a label is the recipe's noise std: the scale of the t is
sigma sqrt((nu-2)/nu), hence nu > 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.config import ObjectiveConfig

LOG_2PI = math.log(2 * math.pi)
#: order of the noise stds
KINDS = ("energy", "forces", "stress")


@dataclass
class LabelNLL:
    """NLL of each structure, (B,) nats, by kind of label."""

    energy: Tensor
    forces: Tensor
    stress: Tensor
    joint: Tensor | None = None  # of all labels together, where they are not independent

    @property
    def total(self) -> Tensor:
        """(B,) of all labels of a structure."""
        return self.energy + self.forces + self.stress if self.joint is None else self.joint


class Likelihood(nn.Module):
    """Labels with three noise stds.

    Args:
        config: ``energy_std`` (eV/atom), ``forces_std`` (eV/Å), ``stress_std`` (eV/Å^3) and
            whether they are learned. Learned from large values they soak up the spread and the
            posterior never learns, so they are fixed by default. ``likelihood`` and
            ``degrees_of_freedom`` choose the law.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        stds = [config.energy_std, config.forces_std, config.stress_std]
        self.log_std = nn.Parameter(
            torch.tensor(stds, dtype=torch.float64).log(), requires_grad=config.learn_noise
        )
        self.use_stress = config.use_stress
        self.law, self.nu = config.likelihood, config.degrees_of_freedom

    @property
    def std(self) -> dict[str, float]:
        """Present noise stds: energy (eV/atom), forces (eV/Å), stress (eV/Å^3)."""
        return dict(zip(KINDS, self.log_std.exp().tolist(), strict=True))

    def forward(self, prediction: Prediction, batch: Batch) -> LabelNLL:
        """NLL of each structure of a batch, in float64."""
        zero = prediction.energy.new_zeros(batch.n_structures, dtype=torch.float64)
        out = {"energy": zero, "forces": zero, "stress": zero}
        square, count, scales = zero, zero, zero
        for kind, (predicted, label, rows) in compared(prediction, batch, stress=self.use_stress).items():
            # Only the label decides: a prediction that is NaN where there is a label must not pass
            # as a missing label, or a model that broke down would look like a perfect one.
            known = ~torch.isnan(label)
            log_std = self.log_std[KINDS.index(kind)]
            # where first, arithmetic after: a NaN in the untaken branch would poison the gradient
            z = torch.where(known, predicted - label, 0.0) / log_std.exp()
            counted = known * row_weights(batch, kind)
            terms = ((self._minus_log_density(z) + log_std) * counted).flatten(1).sum(dim=1)
            out[kind] = zero.index_add(0, rows, terms)
            if self.law == "joint_student_t":
                square = square.index_add(0, rows, (z.square() * counted).flatten(1).sum(dim=1))
                number = counted.double().flatten(1).sum(dim=1)
                count = count.index_add(0, rows, number)
                scales = scales.index_add(0, rows, number * log_std)
        joint = self._joint(square, count) + scales if self.law == "joint_student_t" else None
        weight = frame_weights(batch)
        return LabelNLL(
            **{kind: nll * weight for kind, nll in out.items()},
            joint=None if joint is None else joint * weight,
        )

    def _minus_log_density(self, z: Tensor) -> Tensor:
        """Elementwise, of a label of std 1."""
        if self.law == "gaussian":
            return 0.5 * z.square() + 0.5 * LOG_2PI
        return self._joint(z.square(), torch.ones_like(z))

    def _joint(self, square: Tensor, count: Tensor) -> Tensor:
        """-log density of the multivariate t in ``count`` dimensions, std 1 each, |z|^2 = ``square``."""
        nu = self.nu
        return (
            torch.lgamma(torch.as_tensor(nu / 2, dtype=count.dtype))
            - torch.lgamma((nu + count) / 2)
            + 0.5 * count * math.log(math.pi * (nu - 2))
            + 0.5 * (nu + count) * torch.log1p(square / (nu - 2))
        )


def frame_weights(batch: Batch) -> Tensor:
    """(B,) factor of each structure's log likelihood; ones where the data give none."""
    return batch.labels.get("weight", torch.ones_like(batch.n_atoms, dtype=torch.float64))


def row_weights(batch: Batch, kind: str) -> Tensor:
    """(n, 1) factor of each atom's terms for ``forces``, else a single one."""
    if kind == "forces" and "atom_weight" in batch.labels:
        return batch.labels["atom_weight"][:, None]
    return batch.n_atoms.new_ones((), dtype=torch.float64)


def compared(
    prediction: Prediction, batch: Batch, *, stress: bool
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Predictions beside labels, kind by kind, float64.

    Returns:
        {kind: (predicted, label, structure of each row)}: ``energy`` (B, 1) eV/atom, ``forces``
        (n, 3) eV/Å, ``stress`` (B, 6) eV/Å^3; kinds that one side lacks are left out.
    """
    each = torch.arange(batch.n_structures, device=batch.n_atoms.device)
    n = batch.n_atoms.double()
    labels = batch.labels
    out: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    if "energy" in labels:
        energy = prediction.energy.double() / n
        out["energy"] = (energy[:, None], (labels["energy"] / n)[:, None], each)
    if "forces" in labels and prediction.forces is not None:
        out["forces"] = (prediction.forces.double(), labels["forces"], batch.structure)
    if stress and "stress" in labels and prediction.stress is not None:
        out["stress"] = (prediction.stress.double(), labels["stress"], each)
    return out
