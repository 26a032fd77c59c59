"""Calibrated error bars of a potential, as numbers: what they are, applied and stored.

They are fitted by :mod:`blip_ft.uncertainty.calibration`, which says what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

#: properties that are calibrated; energy means energy per atom
PROPERTIES = ("energy", "forces", "stress")


class Predicted(Protocol):
    """Predictions of a set of structures: F of them, n atoms in all; units of the ASE properties.

    Each property has its epistemic std beside it, ``energy_std`` and so on, or ``None``.
    """

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        """(F,) atoms of each structure."""


@dataclass(frozen=True)
class PropertyCalibration:
    """Error bars of one property: total std = sqrt(aleatoric^2 + (scale * epistemic)^2).

    Attributes:
        aleatoric: a, in the unit of the property (eV/atom, eV/Å, eV/Å^3).
        scale: c, a number.
        n_residuals: residuals the fit stands on.
        n_frames: frames they come from.
        nll_before: mean Gaussian NLL with the epistemic std alone; ``None`` where it is
            infinite (no spread).
        nll_after: mean Gaussian NLL with the total std.
        zms_before: mean of (residual / epistemic std)^2; 1 is right, below 1 the model's own
            error bars are too wide, above 1 too narrow; ``None`` without spread.
        excess_kurtosis: of the z-scores after calibration; 0 for a Gaussian, above about 2 the
            tails are heavy and Gaussian intervals at high levels are too short. ``None`` for
            fewer than four residuals.
        conformal: split-conformal factor of the total std per level in ``LEVELS``; ``inf``
            where the frames are too few for that level.
        left_out: frames whose labels are wrong beyond doubt, which took no part in the fit.
        carried_by: the frame without which the error bars would be narrower by ``carried_factor``, where
            that is 2 or more and no chance; else ``""``.
        carried_factor: see there.
    """

    aleatoric: float = 0.0
    scale: float = 1.0
    n_residuals: int = 0
    n_frames: int = 0
    nll_before: float | None = None
    nll_after: float | None = None
    zms_before: float | None = None
    excess_kurtosis: float | None = None
    conformal: dict[float, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    carried_by: str = ""
    carried_factor: float = 1.0

    def __post_init__(self) -> None:
        for key in ("aleatoric", "scale"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{key} must be finite and not negative, got {value}")

    @property
    def measured(self) -> bool:
        """Whether labels say what these numbers are; without, the aleatoric part is unknown, and so is the total."""
        return self.n_residuals > 0 or self.aleatoric > 0

    def for_new_frames(self) -> PropertyCalibration:
        """The same error bars, widened for having been fitted on few frames.

        A width estimated from F independent frames is right for *these* frames. For a new one the
        estimate's own error adds: to first order the variance grows by (F + 1) / (F - 1), as that of
        the predictive Student-t of a Gaussian sample with unknown mean and variance. Components of
        one frame are not independent, so frames are what is counted. Unchanged below three frames.
        """
        if self.n_frames < 3:
            return self
        factor = math.sqrt((self.n_frames + 1) / (self.n_frames - 1))
        return replace(self, aleatoric=factor * self.aleatoric, scale=factor * self.scale)

    def total(self, epistemic: ArrayLike | None) -> FloatArray:
        """Total std for an epistemic std of the same unit; ``None`` counts as no spread."""
        spread = np.asarray(0.0 if epistemic is None else epistemic, dtype=np.float64)
        return np.sqrt(self.aleatoric**2 + (self.scale * spread) ** 2)

    def conformal_quantile(self, level: float) -> float:
        """Factor f such that prediction ± f * total std holds a share ``level`` of new labels.

        Raises:
            KeyError: no factor was stored for this level.
        """
        for known, factor in self.conformal.items():
            if math.isclose(known, level):
                return factor
        raise KeyError(f"no conformal factor at level {level}; stored: {sorted(self.conformal)}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form; infinite conformal factors become ``None``, and so does an unknown aleatoric std."""
        tree = asdict(self)
        if not self.measured:
            tree["aleatoric"] = None
        tree["conformal"] = {str(k): v if math.isfinite(v) else None for k, v in self.conformal.items()}
        tree["left_out"] = list(self.left_out)
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> PropertyCalibration:
        """Inverse of :meth:`to_dict`."""
        factors = {float(k): math.inf if v is None else v for k, v in tree.get("conformal", {}).items()}
        changed: dict[str, Any] = {"conformal": factors, "left_out": tuple(tree.get("left_out", ()))}
        if tree.get("aleatoric") is None:
            changed["aleatoric"] = 0.0
        return cls(**{**tree, **changed})


@dataclass(frozen=True)
class Calibration:
    """Calibrated error bars of energy (per atom), forces and stress.

    A property without calibration labels keeps the identity, which says nothing: no aleatoric noise, scale 1,
    ``n_residuals`` 0, not ``measured``. Predictions have no aleatoric and no total std of it.
    """

    energy: PropertyCalibration = PropertyCalibration()
    forces: PropertyCalibration = PropertyCalibration()
    stress: PropertyCalibration = PropertyCalibration()

    @classmethod
    def identity(cls) -> Calibration:
        """The posterior's own error bars, unchanged."""
        return cls()

    @classmethod
    def constant(cls, *, energy: float = 0.0, forces: float = 0.0, stress: float = 0.0) -> Calibration:
        """One std for all (eV/atom, eV/Å, eV/Å^3) and no spread; 0 means no error bar."""
        values = {"energy": energy, "forces": forces, "stress": stress}
        return cls(**{k: PropertyCalibration(v, 0.0) for k, v in values.items()})

    def for_new_frames(self) -> Calibration:
        """Every property widened; see :meth:`PropertyCalibration.for_new_frames`."""
        return Calibration(
            self.energy.for_new_frames(), self.forces.for_new_frames(), self.stress.for_new_frames()
        )

    def total_std(self, prediction: Predicted) -> dict[str, FloatArray]:
        """Total std of every property that has an error bar, in the units of ``prediction``.

        ``energy`` (F,) is that of the **total** energy: n_atoms times that per atom. A property
        for which the model states no spread and the calibration no noise is left out.
        """
        total: dict[str, FloatArray] = {}
        for name in PROPERTIES:
            item: PropertyCalibration = getattr(self, name)
            mean, std = per_atom(prediction, name)
            if std is not None or item.aleatoric > 0:
                total[name] = np.broadcast_to(item.total(std), mean.shape).copy()
        if "energy" in total:
            total["energy"] *= prediction.n_atoms
        return total

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return {name: getattr(self, name).to_dict() for name in PROPERTIES}

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Calibration:
        """Inverse of :meth:`to_dict`."""
        return cls(**{n: PropertyCalibration.from_dict(tree[n]) for n in PROPERTIES if n in tree})


def per_atom(prediction: Predicted, name: str) -> tuple[FloatArray, FloatArray | None]:
    """Prediction and epistemic std of a property, energies per atom."""
    mean: FloatArray = getattr(prediction, name)
    std: FloatArray | None = getattr(prediction, f"{name}_std")
    if name == "energy":
        mean = mean / prediction.n_atoms
        std = None if std is None else std / prediction.n_atoms
    return mean, std
