"""Likelihoods, the ELBO and proper scores."""

from blip_ft.objectives.crps import fair_crps
from blip_ft.objectives.elbo import ElboScale
from blip_ft.objectives.likelihood import GaussianLikelihood, LabelNLL

__all__ = ["ElboScale", "GaussianLikelihood", "LabelNLL", "fair_crps"]
