"""Likelihoods, the ELBO, proper scores and the function-space KL."""

from blip_ft.objectives.crps import fair_crps, gaussian_crps, label_crps
from blip_ft.objectives.elbo import ElboScale
from blip_ft.objectives.function_kl import function_kl
from blip_ft.objectives.likelihood import LabelNLL, Likelihood

__all__ = ["ElboScale", "LabelNLL", "Likelihood", "fair_crps", "function_kl", "gaussian_crps", "label_crps"]
