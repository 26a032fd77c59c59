"""Posterior families, one file each, all with the same functions in the same order.

===============  =============================================================================
``init``         (``__init__``) from the sites, the prior and the starting std
``fit``          set what has a closed form from the data; factorised families have nothing
``latent``       keyed standard normal numbers, one row per key
``sample``       latent numbers -> perturbation of every site
``kl``           KL of the spread from the prior, nats
``std``          marginal std of every weight
===============  =============================================================================
"""

from __future__ import annotations

from blip_ft.variational.posteriors.adaptive import AdaptivePosterior
from blip_ft.variational.posteriors.base import Posterior
from blip_ft.variational.posteriors.channel import ChannelPosterior
from blip_ft.variational.posteriors.laplace import LaplacePosterior
from blip_ft.variational.posteriors.pathwise import PathwisePosterior
from blip_ft.variational.posteriors.subspace import SubspacePosterior
from blip_ft.variational.posteriors.weight import WeightPosterior

FAMILIES: dict[str, type[Posterior]] = {
    "adaptive": AdaptivePosterior,
    "channel": ChannelPosterior,
    "pathwise": PathwisePosterior,
    "posthoc_laplace": LaplacePosterior,
    "subspace": SubspacePosterior,
    "weight": WeightPosterior,
}

__all__ = [
    "FAMILIES",
    "AdaptivePosterior",
    "ChannelPosterior",
    "LaplacePosterior",
    "PathwisePosterior",
    "Posterior",
    "SubspacePosterior",
    "WeightPosterior",
]
