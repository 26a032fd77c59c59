"""What the two factorised families share: independent weights with std = unit * exp(rho).

The unit is the prior's: rms(w0) of the weight's path, or |theta| under the dropout prior.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from blip_ft.families.base.options import FactorisedOptions
from blip_ft.families.base.posterior import Posterior
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site


class FactorisedPosterior(Posterior):
    """Independent Gaussian weights; subclasses say which weights share a log std.

    KL per weight of the spread, with u = ln(sigma / s):  1/2 [exp(2u) - 1 - 2u]
    (Gaussian KL with equal means; tested against ``torch.distributions``).
    """

    def __init__(self, sites: Sequence[Site], prior: PretrainedPrior, init_std: float) -> None:
        super().__init__(sites, prior, init_std)
        start = math.log(init_std)
        self.log_std = nn.ParameterList(
            nn.Parameter(
                torch.full(
                    self.log_std_shape(s),
                    start,
                    dtype=prior.rms(s.name).dtype,
                    device=prior.rms(s.name).device,
                )
            )
            for s in self.sites
        )

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        layers: Mapping[str, VariationalLayer],
        prior: PretrainedPrior,
        options: FactorisedOptions,
    ) -> Self:
        """See the base class."""
        del layers
        return cls(sites, prior, options.init_std)

    @staticmethod
    @abstractmethod
    def log_std_shape(site: Site) -> tuple[int, ...]:
        """Shape of the log std parameter of a site."""

    @staticmethod
    @abstractmethod
    def expand(log_std: Tensor, site: Site) -> Tensor:
        """Log std of every weight, ``site.shape``."""

    @property
    def latent_numel(self) -> int:  # noqa: D102
        return sum(s.numel for s in self.sites)

    def sample(self, latent: Tensor) -> dict[str, Tensor]:  # noqa: D102
        std = self.std()
        parts = latent.split([s.numel for s in self.sites], dim=1)
        return {
            s.name: eps.reshape(-1, *s.shape) * std[s.name] for s, eps in zip(self.sites, parts, strict=True)
        }

    def kl(self) -> Tensor:  # noqa: D102
        terms = [torch.zeros(())]
        for site, log_std in zip(self.sites, self.log_std, strict=True):
            u = self.expand(log_std, site) - self.prior.relative(site.name).log()  # the unit cancels
            terms.append((0.5 * (torch.exp(2 * u) - 1) - u).sum())
        return torch.stack([t.to(terms[-1]) for t in terms]).sum()

    def std(self) -> dict[str, Tensor]:  # noqa: D102
        return {
            site.name: self.prior.unit(site.name) * self.expand(log_std, site).exp()
            for site, log_std in zip(self.sites, self.log_std, strict=True)
        }

    def relative_std(self) -> Tensor:
        """As in the base class; the unit cancels, which may be 0 for some weights."""
        if not self.sites:
            return torch.zeros(())
        logs = [
            (self.expand(log_std, site) - self.prior.relative(site.name).log()).double().mean()
            for site, log_std in zip(self.sites, self.log_std, strict=True)
        ]
        return torch.stack(logs).mean().exp()
