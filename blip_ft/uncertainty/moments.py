"""What a prediction with error bars of one batch is, however it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip_ft.backbones.protocol import Prediction


@dataclass
class BatchMoments:
    """Mean and epistemic covariance of a batch; float64, units of ``Prediction``.

    Attributes:
        mean: mean prediction.
        energy_std: (B,) eV; None without draws, like all that follow.
        forces_cov: (n, 3, 3) (eV/Å)^2 covariance of each atom's force.
        stress_std: (B, 6) eV/Å^3.
        node_energy_std: (n,) eV.
        sampling_error: relative std of ``forces_std`` and ``stress_std`` that were estimated from a few draws or
            directions (for directions the worst case, ``linearized.relative_error``); 0 where they are exact.
        ood_score: (n,) distance from the training atoms, see ``uncertainty.ood``; needs no draws, ``None``
            for a model without it.
    """

    mean: Prediction
    energy_std: Tensor | None = None
    forces_cov: Tensor | None = None
    stress_std: Tensor | None = None
    node_energy_std: Tensor | None = None
    sampling_error: float = 0.0
    ood_score: Tensor | None = None

    @classmethod
    def concatenate(cls, parts: Sequence[BatchMoments]) -> BatchMoments:
        """Those of several batches, made alike, as of one."""
        return cls(
            mean=Prediction(**_concatenated([vars(part.mean) for part in parts])),
            sampling_error=parts[0].sampling_error,
            **_concatenated([{k: getattr(part, k) for k in _TENSORS} for part in parts]),
        )

    @property
    def forces_std(self) -> Tensor | None:
        """(n, 3) std of each force component in the lab frame, eV/Å."""
        return (
            None if self.forces_cov is None else self.forces_cov.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        )

    @property
    def forces_std_norm(self) -> Tensor | None:
        """(n,) square root of the trace of each force covariance, eV/Å; rotation invariant."""
        if self.forces_cov is None:
            return None
        return self.forces_cov.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(0).sqrt()


_TENSORS = ("energy_std", "forces_cov", "stress_std", "node_energy_std", "ood_score")


def _concatenated(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    return {name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}


def to_double(prediction: Prediction) -> Prediction:
    """The same numbers in float64, without a graph."""
    parts = {k: v.detach().double() for k, v in vars(prediction).items() if v is not None}
    return Prediction(**parts)
