"""Options of ``subspace``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ByteSize, Field

from blip_ft.families.base.budget import Fitted, Room
from blip_ft.families.base.options import TrainedClosedFormOptions
from blip_ft.families.registry import family
from blip_ft.families.subspace.budget import fit, projections_of


@family
class SubspaceOptions(TrainedClosedFormOptions):
    """A correlated Gaussian along the directions in which training and context frames are most uncertain."""

    law: ClassVar[str] = "blip_ft.families.subspace.posterior:SubspacePosterior"
    needs_context: ClassVar[bool] = True

    family: Literal["subspace"] = "subspace"
    rank: Annotated[int, Field(ge=1)] = 128
    """number of directions r"""
    projections: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """random projections of each structure's forces that stand for all of them; ``all``: 8"""
    max_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """bound on the directions in the model file, and on the gradients held in memory while they are
    fitted: a number of bytes or ``200 MB``. Where the recipe needs more, the run stores half precision, then takes
    fewer projections, then a lower rank (not below 32), then puts noise on fewer weights (``scalar``,
    ``readout``). The run says so; docs/uncertainty.md"""
    storage: Literal["auto", "float32", "float16"] = "auto"
    """how directions are stored; ``auto``: ``float16``, or ``float32`` where
    ``max_bytes`` is given and leaves room"""

    def projections_of_fit(self, *, last: bool) -> int:
        """R of a fit; half of them where it is not the last."""
        r = projections_of(self)
        return r if last else max(1, r // 2)

    def fit_to_budget(self, room: Room, say: Callable[[str], object]) -> Fitted[Self]:
        """Storage, projections, rank and scope; without a bound nothing changes."""
        if self.max_bytes is None:
            return Fitted(self, room.noise)
        found = fit(self, int(self.max_bytes), room, say)
        smaller = {
            "rank": found.rank,
            "projections": found.projections,
            "storage": "float32" if found.storage == "float32" else "float16",
        }
        return Fitted(self.model_copy(update=smaller), found.scope.noise)
