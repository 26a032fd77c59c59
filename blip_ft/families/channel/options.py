"""Options of ``channel``."""

from __future__ import annotations

from typing import ClassVar, Literal

from blip_ft.families.base.options import FactorisedOptions
from blip_ft.families.registry import family


@family
class ChannelOptions(FactorisedOptions):
    """One std per output channel: few variational parameters."""

    law: ClassVar[str] = "blip_ft.families.channel.posterior:ChannelPosterior"

    family: Literal["channel"] = "channel"
