"""``channel``: independent weights, one std per output channel of each matrix and path."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from blip_ft.families.base.factorised import FactorisedPosterior
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.channel.options import ChannelOptions
from blip_ft.variational.sites import Site, expand_channels


class ChannelPosterior(FactorisedPosterior):
    """Few variational parameters: all weights into one output channel share their relative std."""

    options: ClassVar[type[FamilyOptions]] = ChannelOptions

    @staticmethod
    def log_std_shape(site: Site) -> tuple[int, ...]:  # noqa: D102
        return (site.channels,)

    @staticmethod
    def expand(log_std: Tensor, site: Site) -> Tensor:  # noqa: D102
        return expand_channels(log_std, site)
