"""Options of ``weight``."""

from __future__ import annotations

from typing import ClassVar, Literal

from blip_ft.families.base.options import FactorisedOptions
from blip_ft.families.registry import family


@family
class WeightOptions(FactorisedOptions):
    """One std per weight (mean-field Gaussian)."""

    law: ClassVar[str] = "blip_ft.families.weight.posterior:WeightPosterior"

    family: Literal["weight"] = "weight"
