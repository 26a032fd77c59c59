"""The interface of all posterior families.

A posterior is the law of the perturbation around the mean, over all noisy sites at once, so that
weights of different layers may be correlated. It is driven by ``latent_numel`` independent
standard normal numbers per sample; ``sample`` maps them linearly to weights. Linear, because then
the mean over draws whose latent numbers sum to zero is free of first-order sampling noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blip_ft.variational.noise import normal
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site


class Posterior(nn.Module, ABC):
    """q(w) = law of w0 + delta + ``sample(latent)``, ``latent`` standard normal.

    Args:
        sites: the weights that carry noise.
        prior: prior over these (and perhaps more) weights.
        init_std: starting std in units of each matrix's rms.
    """

    #: name in a recipe
    family: ClassVar[str]
    #: whether weights are independent, as ``local`` noise needs
    factorised: ClassVar[bool]
    #: whether a draw is a set of weights, which a vendor's file can hold
    draws_are_weights: ClassVar[bool] = True
    #: whether draws come in pairs +-z and spreads are those of half their differences: for families that
    #: move so many weights that curvature would drown the spread near the data
    paired: ClassVar[bool] = False

    def __init__(self, sites: Sequence[Site], prior: PretrainedPrior, init_std: float) -> None:
        super().__init__()
        self.sites = tuple(sites)
        # the model owns the prior; a list keeps it from being registered (and saved) twice
        self._prior = [prior]
        self.init_std = float(init_std)

    @property
    def prior(self) -> PretrainedPrior:
        """The prior that :meth:`kl` is measured against."""
        return self._prior[0]

    @property
    def ready(self) -> bool:
        """Whether there is noise to sample; families that need :meth:`fit` first say so here."""
        return bool(self.sites)

    def fit(self, context: Any) -> dict[str, Any]:
        """Set what has a closed form. ``context`` gives the model and its training frames.

        Returns:
            A report for the receipt; empty where there is nothing to fit.
        """
        return {}

    @property
    def n_weights(self) -> int:
        """Weights that carry noise."""
        return sum(s.numel for s in self.sites)

    @property
    @abstractmethod
    def latent_numel(self) -> int:
        """Standard normal numbers per sample."""

    def latent(self, keys: Sequence[Sequence[object]], dtype: torch.dtype) -> Tensor:
        """(len(keys), latent_numel) normals; each row is a function of its key and the layers."""
        rows = [torch.cat([normal((*key, s.name), s.numel, dtype) for s in self.sites]) for key in keys]
        return torch.stack(rows) if rows else torch.zeros(0, self.latent_numel, dtype=dtype)

    @abstractmethod
    def sample(self, latent: Tensor) -> dict[str, Tensor]:
        """(B, latent_numel) -> {site name: (B, *site.shape)} perturbations; linear in ``latent``."""

    def _by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """(B, n_weights) in units of rms, all sites side by side -> {site name: (B, *site.shape)} of weights."""
        parts = flat.split([s.numel for s in self.sites], dim=1)
        return {
            s.name: part.reshape(-1, *s.shape) * self.prior.rms(s.name)
            for s, part in zip(self.sites, parts, strict=True)
        }

    def _side_by_side(self, gradients: dict[str, Tensor]) -> Tensor:
        """{site name: (B, *site.shape)} d(output)/d(weight) -> (B, n_weights), weights in units of rms."""
        return torch.cat([(gradients[s.name] * self.prior.rms(s.name)).flatten(1) for s in self.sites], dim=1)

    def linear_variance(self, gradients: dict[str, Tensor]) -> Tensor:
        """Variance of an output that is linear in the weights: g^T Sigma g, (B,).

        Args:
            gradients: {site name: (B, *site.shape)} d(output)/d(weight).
        """
        first = next(iter(gradients.values()))
        latent = first.new_zeros(len(first), self.latent_numel).requires_grad_(True)
        with torch.enable_grad():
            sampled = self.sample(latent)
            value = torch.stack([(g * sampled[name]).sum() for name, g in gradients.items()]).sum()
        (slope,) = torch.autograd.grad(value, latent)
        return slope.square().sum(dim=1)

    @abstractmethod
    def kl(self) -> Tensor:
        """KL of the spread, KL(N(0, Sigma) || N(0, s^2)), nats; the mean's part is the prior's."""

    @abstractmethod
    def std(self) -> dict[str, Tensor]:
        """{site name: (*site.shape)} marginal std of every weight."""

    def row_variances(self) -> dict[str, Tensor]:
        """{site name: (*site.shape)} variances for noise of mode ``local``, before any amplitude."""
        return {name: s.square() for name, s in self.std().items()}

    def relative_std(self) -> Tensor:
        """Geometric mean over weights of posterior std over prior std: 1 is the prior, 0 is none."""
        logs = [(s / self.prior.std(n)).clamp_min(1e-30).log().double().mean() for n, s in self.std().items()]
        return torch.stack(logs).mean().exp() if logs else torch.zeros(())
