"""Options of ``posthoc_laplace``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Self

from blip_ft.families.base.budget import Fitted, Room, fit_full_covariance
from blip_ft.families.base.options import ClosedFormOptions
from blip_ft.families.registry import family


@family
class LaplaceOptions(ClosedFormOptions):
    """The full covariance as low rank plus diagonal, after plain fine-tuning: a baseline."""

    law: ClassVar[str] = "blip_ft.families.posthoc_laplace.posterior:LaplacePosterior"
    after_plain: ClassVar[bool] = True
    paired: ClassVar[bool] = True
    row_dtype: ClassVar[str] = "float64"

    family: Literal["posthoc_laplace"] = "posthoc_laplace"

    def fit_to_budget(self, room: Room, say: Callable[[str], object]) -> Fitted[Self]:
        """As many projections as fit."""
        projections = fit_full_covariance(self, room, say)
        return Fitted(self.model_copy(update={"projections": projections}), room.noise)
