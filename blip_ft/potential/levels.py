"""What error bars and scores were on the calibration frames, atom by atom: the yardstick of simulations.

A guard of a simulation asks whether an atom is less certain than those were on which the error bars are known to
be right. Three numbers are enough for that, and travel with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: share of the calibration atoms that are below a level
QUANTILE = 0.95


@dataclass(frozen=True)
class Levels:
    """Quantiles (:data:`QUANTILE`) over the atoms of the calibration frames.

    Attributes:
        forces_std: of the total std of an atom's force, sqrt(sum over components of total std^2), eV/Å; ``None``
            for a model without error bars.
        ood_score: of the out-of-distribution score; ``None`` for a model without it.
        n_atoms: atoms they come from.
    """

    forces_std: float | None
    ood_score: float | None
    n_atoms: int

    def __post_init__(self) -> None:
        for name in ("forces_std", "ood_score"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"levels.{name} must be finite and above 0, got {value}")

    @classmethod
    def of(
        cls, total_std: NDArray[np.float64] | None, ood_score: NDArray[np.float64] | None, n_atoms: int
    ) -> Levels:
        """From what was predicted for calibration frames.

        Args:
            total_std: (n, 3) total std of each force component, eV/Å.
            ood_score: (n,).
            n_atoms: n.
        """
        norm = None if total_std is None else np.sqrt(np.square(total_std).sum(axis=1))
        return cls(_quantile(norm), _quantile(ood_score), n_atoms)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Levels:
        """Inverse of :meth:`to_dict`."""
        return cls(**tree)


def _quantile(values: NDArray[np.float64] | None) -> float | None:
    """``None`` where there are no values, or none that tells atoms apart from nothing."""
    known = np.zeros(0) if values is None else values[np.isfinite(values)]
    level = float(np.quantile(known, QUANTILE)) if known.size else 0.0
    return level if level > 0 else None
