"""``weight``: independent weights, one std per weight (mean-field Gaussian)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blip_ft.families.base.factorised import FactorisedPosterior
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.weight.options import WeightOptions
from blip_ft.variational.sites import Site


class WeightPosterior(FactorisedPosterior):
    """Mean-field variational inference (Blundell et al., arXiv 1505.05424) around w0."""

    options: ClassVar[type[FamilyOptions]] = WeightOptions

    @staticmethod
    def log_std_shape(site: Site) -> tuple[int, ...]:  # noqa: D102
        return site.shape

    @staticmethod
    def expand(log_std: Tensor, site: Site) -> Tensor:  # noqa: D102
        del site
        return log_std
