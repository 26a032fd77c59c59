"""Options of ``adaptive``."""

from __future__ import annotations

from typing import ClassVar, Literal

from blip_ft.families.base.options import IndependentOptions, Refuse
from blip_ft.families.registry import family
from blip_ft.strict import Positive


@family
class AdaptiveOptions(IndependentOptions):
    """One std per row of a layer's input, from an inference network."""

    law: ClassVar[str] = "blip_ft.families.adaptive.posterior:AdaptivePosterior"
    draws_are_weights: ClassVar[bool] = False

    family: Literal["adaptive"] = "adaptive"
    min_std: Positive = 1e-4
    """least std that the inference network can give, in the same units"""
    max_std: Positive = 0.3
    """greatest; training says where the clamp binds"""

    def check(self, refuse: Refuse) -> None:
        """The std starts inside its clamp."""
        if not self.min_std < self.init_std < self.max_std:
            refuse(
                f"init_std {self.init_std} is not between min_std {self.min_std} and max_std {self.max_std}",
                "posterior.init_std",
                "change one of the three",
            )
