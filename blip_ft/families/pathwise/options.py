"""Options of ``pathwise``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from blip_ft.families.base.budget import Fitted, Room, fit_full_covariance, fit_samples
from blip_ft.families.base.options import TrainedClosedFormOptions
from blip_ft.families.registry import family


@family
class PathwiseOptions(TrainedClosedFormOptions):
    """The full covariance of all noisy weights, as samples of it."""

    law: ClassVar[str] = "blip_ft.families.pathwise.posterior:PathwisePosterior"
    paired: ClassVar[bool] = True

    family: Literal["pathwise"] = "pathwise"
    rank: Annotated[int, Field(ge=1)] = 128
    """number of samples"""

    def fit_to_budget(self, room: Room, say: Callable[[str], object]) -> Fitted[Self]:
        """As many projections as fit, then as many samples."""
        projections = fit_full_covariance(self, room, say)
        rank = fit_samples(self.rank, self.max_bytes, room, say)
        return Fitted(self.model_copy(update={"projections": projections, "rank": rank}), room.noise)
