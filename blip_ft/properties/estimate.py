"""A quantity with its error bar, which sums and differences keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blip_ft.errors import BlipError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A quantity (number or array) with the epistemic error bar of one posterior.

    Attributes:
        mean: of the mean model; of families whose draws are single the mean over draws.
        draws: (K, *shape of ``mean``) value of each draw at the posterior's full, calibrated width.
        unit: of both.
        source: whose draws these are. Draw k of two estimates of one source is the same model.
    """

    mean: Floats
    draws: Floats
    unit: str
    source: str

    @property
    def std(self) -> Floats:
        """Epistemic std over the draws, which are centred or come in pairs: the divisor is K."""
        off = self.draws - self.mean
        return np.asarray(np.sqrt(np.mean(off**2, axis=0)))

    def __add__(self, other: Estimate) -> Estimate:
        return self._with(other, 1.0)

    def __sub__(self, other: Estimate) -> Estimate:
        return self._with(other, -1.0)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(factor * self.mean, factor * self.draws, self.unit, self.source)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Estimate:
        return self * (1 / divisor)

    def _with(self, other: Estimate, sign: float) -> Estimate:
        """Draw by draw.

        Raises:
            BlipError: other draws, or another unit.
        """
        if self.source != other.source:
            raise BlipError(
                "these two were computed with different draws, so nothing is known of their correlation",
                remedy="compute both with the same model and number of draws",
            )
        if self.unit != other.unit:
            raise BlipError(f"{self.unit} and {other.unit} cannot be added")
        return Estimate(
            self.mean + sign * other.mean, self.draws + sign * other.draws, self.unit, self.source
        )

    def __str__(self) -> str:
        if self.mean.ndim:
            return f"mean {self.mean}, std {self.std} {self.unit}"
        return f"{self.mean:.6g} ± {self.std:.2g} {self.unit}"
