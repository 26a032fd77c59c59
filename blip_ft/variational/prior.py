"""The prior around the pretrained weights, and the part of the KL that holds the mean.

``pretrained``:  p(w) = N(w0, s^2),  s = prior_scale * rms(w0)  per matrix and per e3nn path.

For a Gaussian posterior N(w0 + delta, Sigma) the KL splits into a part of the spread, which the
posterior family computes, and the part of the mean, 1/2 sum delta^2 / s^2, which is here. The
latter pulls every trained weight back to its pretrained value, also those without noise.

With ``empirical_bayes`` every path (block) has its own scale, the one that maximises the ELBO, held
by a scaled inverse chi-squared law of ``EMPIRICAL_BAYES_WEIGHTS`` pseudo-weights at
``prior_scale``: :meth:`PretrainedPrior.update`.

``dropout``:  p(w) = N(0, alpha0 theta^2),  theta = w0 + delta,  prior_scale = sqrt(alpha0)

is the prior of variational dropout (Kingma, Salimans and Welling, arXiv 1506.02557) and of the BLIP
paper (arXiv 2508.14022). With the posterior N(theta, alpha theta^2),

    KL = 1/2 [(alpha + 1) / alpha0 + ln(alpha0 / alpha) - 1]     per weight:

theta cancels. Up to the constant 1/(2 alpha0) this is the KL of two Gaussians of equal mean, so
nothing holds the mean near the pretrained weights. It is here for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from blip_ft.variational.sites import Site, block_rms

#: pseudo-weights at the recipe's scale that every path counts beside its own weights, so that
#: small paths keep that scale and no scale falls to zero
EMPIRICAL_BAYES_WEIGHTS = 10.0


class HasMean(Protocol):
    """A layer with a pretrained weight and the mean's difference from it."""

    @property
    def pretrained(self) -> Tensor:
        """w0."""

    @property
    def delta(self) -> Tensor:
        """The mean minus w0."""


class PretrainedPrior(nn.Module):
    """Gaussian prior centred on the pretrained weights.

    Args:
        sites: all converted weights.
        pretrained: their pretrained values, by site name.
        prior_scale: s in units of each matrix's rms.
        rest: other trained parameters, by name; held by the same penalty around their present
            values.
        empirical_bayes: let :meth:`update` give every path its own scale.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        pretrained: Mapping[str, Tensor],
        prior_scale: float,
        rest: Mapping[str, nn.Parameter] | None = None,
        *,
        empirical_bayes: bool = False,
    ) -> None:
        super().__init__()
        self.prior_scale = float(prior_scale)
        self.sites = dict(sites)
        self.empirical_bayes = empirical_bayes
        # Derived from the pretrained weights, hence not saved. Names with dots are no buffer
        # names, so the tensors are numbered in the order of the sites.
        self._number = {name: i for i, name in enumerate(self.sites)}
        for name, i in self._number.items():
            self.register_buffer(f"_rms{i}", block_rms(pretrained[name], self.sites[name]), persistent=False)
            if empirical_bayes:
                self.register_buffer(f"_path{i}", torch.ones_like(self.rms(name)))
        self._rest = dict(rest or {})
        for i, parameter in enumerate(self._rest.values()):
            self.register_buffer(f"_rest{i}", parameter.detach().clone(), persistent=True)

    def refresh(self, pretrained: Mapping[str, Tensor]) -> None:
        """Measure rms(w0) again, after the pretrained weights were loaded from a file."""
        for name, i in self._number.items():
            setattr(self, f"_rms{i}", block_rms(pretrained[name], self.sites[name]))

    @property
    def rest(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The trained parameters outside linear blocks, each with its pretrained value."""
        return [(parameter, getattr(self, f"_rest{i}")) for i, parameter in enumerate(self._rest.values())]

    def restore_rest(self) -> None:
        """Put the parameters outside linear blocks back to their pretrained values."""
        with torch.no_grad():
            for parameter, start in self.rest:
                parameter.copy_(start)

    # ---- scales --------------------------------------------------------------------------
    def rms(self, site: str) -> Tensor:
        """Root mean square of the pretrained block that each weight is in, ``site.shape``."""
        return getattr(self, f"_rms{self._number[site]}")  # type: ignore[no-any-return]

    def unit(self, site: str) -> Tensor:
        """What factorised posteriors measure their stds in, ``site.shape``: rms(w0)."""
        return self.rms(site)

    def relative(self, site: str) -> Tensor:
        """Prior std of each weight over its :meth:`unit`; ``site.shape``, or () if it is one number."""
        if self.empirical_bayes:
            path: Tensor = getattr(self, f"_path{self._number[site]}")
            return self.prior_scale * path
        return self.rms(site).new_full((), self.prior_scale)

    def std(self, site: str) -> Tensor:
        """Prior std of each weight, ``site.shape``."""
        return self.relative(site) * self.unit(site)

    @torch.no_grad()
    def update(self, deltas: Mapping[str, Tensor], stds: Mapping[str, Tensor]) -> dict[str, list[float]]:
        """Empirical Bayes: the scale of every path at its best for the present posterior.

        d(KL)/ds = 0 for the n weights of a path gives s^2 = mean(delta^2 + sigma^2); nu
        pseudo-weights at the recipe's scale s0 make it

            s^2 = (sum (delta^2 + sigma^2) / rms^2 + nu s0^2) / (n + nu),

        the M step of a variational EM: the loss cannot rise by it. Weights that carry no noise and
        are not trained tell nothing and keep their scale.

        Args:
            deltas: {site: delta} of all sites; those that are trained require grad.
            stds: {site: posterior std} of those that carry noise.

        Returns:
            {site: scale of each of its paths, in units of the path's rms}.
        """
        out: dict[str, list[float]] = {}
        for name, site in self.sites.items():
            trained = deltas[name].requires_grad
            if not self.empirical_bayes or not (trained or name in stds):
                continue
            square = torch.zeros_like(self.rms(name))
            if trained:
                square = square + deltas[name].square()
            if name in stds:
                square = square + stds[name].square()
            flat = (square / self.rms(name).square()).reshape(-1)
            path = getattr(self, f"_path{self._number[name]}").reshape(-1)
            out[name] = []
            for block in site.blocks:
                part = slice(block.start, block.start + block.numel)
                total = float(flat[part].double().sum()) / self.prior_scale**2 + EMPIRICAL_BAYES_WEIGHTS
                path[part] = (total / (block.numel + EMPIRICAL_BAYES_WEIGHTS)) ** 0.5
                out[name].append(self.prior_scale * float(path[part][0]) if block.numel else 0.0)
        return out

    def kl_scale(self) -> Tensor:
        """What the hyper-prior of the paths' scales adds to the loss, nats, a scalar.

        nu/2 [s0^2/s^2 + ln(s^2/s0^2) - 1] per path: the KL of nu pseudo-weights. Zero without
        empirical Bayes.
        """
        terms = [torch.zeros((), dtype=torch.float64)]
        if self.empirical_bayes:
            for name, site in self.sites.items():
                flat = getattr(self, f"_path{self._number[name]}").reshape(-1)
                for block in site.blocks:
                    square = flat[block.start].double().square() if block.numel else torch.ones(())
                    terms.append(0.5 * EMPIRICAL_BAYES_WEIGHTS * (1 / square + square.log() - 1))
        return torch.stack([t.to(terms[-1]) for t in terms]).sum()

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
        for parameter, start in self.rest:
            terms.append(((parameter - start) / self._rest_std(start)).square().sum())
        if not terms:
            return torch.zeros(())
        return 0.5 * torch.stack(terms).sum()


class DropoutPrior(PretrainedPrior):
    """N(0, alpha0 theta^2), theta the posterior's own mean; ``prior_scale`` is sqrt(alpha0).

    Args:
        layers: {site: its layer}, kept, as theta = w0 + delta moves in training.
        noisy: names of the sites that carry noise.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        layers: Mapping[str, HasMean],
        prior_scale: float,
        noisy: Sequence[str],
        rest: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        super().__init__(sites, {name: layers[name].pretrained for name in sites}, prior_scale, rest)
        # a list keeps the layers, which the model owns, from being registered (and saved) twice
        self._layers = [dict(layers)]
        self._noisy = tuple(noisy)

    def unit(self, site: str) -> Tensor:
        """|theta| of each weight: stds of the posterior and the prior are multiples of it."""
        layer = self._layers[0][site]
        return (layer.pretrained + layer.delta).abs()

    def kl_mean(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """theta^2 / (2 alpha0 theta^2) = 1/(2 alpha0) per weight with noise: a constant, nats."""
        del deltas
        weights = sum(self.sites[name].numel for name in self._noisy)
        return torch.full((), 0.5 * weights / self.prior_scale**2)
