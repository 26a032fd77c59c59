"""The prior around the pretrained weights, and the part of the KL that holds the mean.

    p(w) = N(w0, s^2),   s = prior_scale * rms(w0)   per matrix and per e3nn path.

For a Gaussian posterior N(w0 + delta, Sigma) the KL splits into a part of the spread, which the
posterior family computes, and the part of the mean, 1/2 sum delta^2 / s^2, which is here. The
latter pulls every trained weight back to its pretrained value, also those without noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from blip_ft.variational.sites import Site, block_rms


class PretrainedPrior(nn.Module):
    """Gaussian prior centred on the pretrained weights.

    Args:
        sites: all converted weights.
        pretrained: their pretrained values, by site name.
        prior_scale: s in units of each matrix's rms.
        rest: other trained parameters, by name; held by the same penalty around their present
            values.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        pretrained: Mapping[str, Tensor],
        prior_scale: float,
        rest: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        self.prior_scale = float(prior_scale)
        self.sites = dict(sites)
        # Derived from the pretrained weights, hence not saved. Names with dots are no buffer
        # names, so the tensors are numbered in the order of the sites.
        self._number = {name: i for i, name in enumerate(self.sites)}
        for name, i in self._number.items():
            self.register_buffer(f"_rms{i}", block_rms(pretrained[name], self.sites[name]), persistent=False)
        self._rest = dict(rest or {})
        for i, parameter in enumerate(self._rest.values()):
            self.register_buffer(f"_rest{i}", parameter.detach().clone(), persistent=True)

    def refresh(self, pretrained: Mapping[str, Tensor]) -> None:
        """Measure rms(w0) again, after the pretrained weights were loaded from a file."""
        for name, i in self._number.items():
            setattr(self, f"_rms{i}", block_rms(pretrained[name], self.sites[name]))

    def restore_rest(self) -> None:
        """Put the parameters outside linear blocks back to their pretrained values."""
        with torch.no_grad():
            for i, parameter in enumerate(self._rest.values()):
                parameter.copy_(getattr(self, f"_rest{i}"))

    def rms(self, site: str) -> Tensor:
        """Root mean square of the pretrained block that each weight is in, ``site.shape``."""
        return getattr(self, f"_rms{self._number[site]}")  # type: ignore[no-any-return]

    def std(self, site: str) -> Tensor:
        """Prior std of each weight, ``site.shape``."""
        return self.prior_scale * self.rms(site)

    def _rest_std(self, start: Tensor) -> Tensor:
        """Prior std of a parameter outside linear blocks; one that starts at zero (a bias) has no
        scale of its own and takes rms 1, so that it is still allowed to move.
        """
        rms = start.square().mean().sqrt()
        return self.prior_scale * torch.where(rms > 0, rms, 1.0)

    def kl_mean(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """Half the sum of delta^2 / s^2 over all trained weights, nats, a scalar."""
        terms = [
            (delta / self.std(name)).square().sum() for name, delta in deltas.items() if delta.requires_grad
        ]
        for i, parameter in enumerate(self._rest.values()):
            start = getattr(self, f"_rest{i}")
            terms.append(((parameter - start) / self._rest_std(start)).square().sum())
        if not terms:
            return torch.zeros(())
        return 0.5 * torch.stack(terms).sum()
