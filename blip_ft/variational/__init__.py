"""The mathematics of variational layers; knows no chemistry and imports no backend."""

from blip_ft.variational.convert import ConversionReport, Converted, convert, plan, unload
from blip_ft.variational.noise import MODES, Mode, NoiseState, RowLayout, normal
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Block, Site

__all__ = [
    "MODES",
    "Block",
    "ConversionReport",
    "Converted",
    "Mode",
    "NoiseState",
    "PretrainedPrior",
    "RowLayout",
    "Site",
    "convert",
    "normal",
    "plan",
    "unload",
]
