"""Options of ``sketch``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ByteSize, Field

from blip_ft.families.base.budget import Fitted, Room
from blip_ft.families.base.options import STEERING, ClosedFormOptions
from blip_ft.families.registry import family
from blip_ft.families.sketch.budget import algebra, fit_buckets, fit_projections


@family
class SketchOptions(ClosedFormOptions):
    """The full covariance of all noisy weights in a sketch of fixed size, whatever the number of frames."""

    law: ClassVar[str] = "blip_ft.families.sketch.posterior:SketchPosterior"
    paired: ClassVar[bool] = True
    orthonormal_projections: ClassVar[bool] = True

    family: Literal["sketch"] = "sketch"
    buckets: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """numbers m that the noisy weights are hashed into; ``auto``: as many as the labels need (eight for every
    direction that they determine), as far as ``max_bytes`` allows"""
    rank: Annotated[int, Field(ge=1)] = 128
    """samples that draws and the error bars of forces are made of; that of the energy needs none"""
    projections: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """orthonormal random projections of each structure's forces that stand for all of them, no more than it has
    components; ``all``: every component while the training set has no more than 2,000 in all, else 8 or more
    projections"""
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """bound on the posterior in the model file: a number of bytes or ``40 MB``. Without a bound 10 MB, or what
    ``buckets`` take where they are given"""

    start: Annotated[float, Field(ge=0, le=1)] = 0.6
    """share of the epochs after which the posterior is fitted for the first time and the noise comes in; it is fitted
    again at the end"""

    @property
    def first_fit(self) -> float:
        """As the recipe says."""
        return self.start

    def projections_of_fit(self, *, last: bool) -> int | None:
        """R of a fit, ``None`` for every force component; half of it, at most 8, where it only steers the noise."""
        if self.projections == "all":
            return None if last else STEERING
        return self.projections if last else min(max(1, self.projections // 2), STEERING)

    def fit_to_budget(self, room: Room, say: Callable[[str], object]) -> Fitted[Self]:
        """Projections for the number of frames; buckets are chosen when the labels' gradients are known."""
        fit_buckets(self, room)
        projections = fit_projections(self.projections, room, say)
        return Fitted(self.model_copy(update={"projections": projections}), room.noise)

    def algebra(self, rows: float, weights: int, number: int, *, moves: bool) -> tuple[float, float]:
        """See the base class."""
        del moves
        return algebra(self, rows, weights, number)
