"""``pathwise``: the Laplace posterior over all noisy weights, held as r samples of it.

    w = theta + D A^T z,     z ~ N(0, I_r),     rows of A: a_k / sqrt(r),     a_k ~ N(0, Sigma)

theta is the mean, D = diag(rms(w0)) per matrix and path, and Sigma = (I/s^2 + G^T G / T)^-1 the
Gauss-Newton posterior around it: G has the gradients of the training labels, times D, over their noise.
No eigenvectors are needed. A sample of the prior is moved to a sample of the posterior by the labels
that it got wrong (Matheron's rule; Wilson et al., JMLR 22, 105, 2021):

    a = s eps - s^2 G^T (s^2 G G^T + T)^-1 (s G eps + sqrt(T) xi),     eps, xi standard normal,       (1)

one solve for all r samples together. A^T A is an unbiased estimate of Sigma; the
std of an output from it is off by 1/sqrt(2 r), relative. Directions that no label determines have the
prior's width, in all P dimensions: draws at full width are far outside the linear regime. They are narrow
therefore (``posterior.amplitude``) and come in pairs +-z, whose half differences are free of second
order (``Posterior.paired``). Derivations: docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from blip_ft.families.base.gram import blocks, combine
from blip_ft.families.base.linear import ClosedFormData, choose_scales
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.base.posterior import ClosedFormPosterior
from blip_ft.families.base.spectrum import Spectrum
from blip_ft.families.pathwise.options import PathwiseOptions
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.noise import normal
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site


class PathwisePosterior(ClosedFormPosterior):
    """Full-covariance Gaussian over all noisy weights, as r of its samples.

    Args:
        sites: the weights that carry noise.
        prior: its ``prior_scale`` is s; set by the fit unless fixed.
        init_std: not used: there is no spread before :meth:`fit`.
        rank: r.
        seed: of the samples.
    """

    options: ClassVar[type[FamilyOptions]] = PathwiseOptions
    directions: Tensor
    spread_kl: Tensor
    determined: Tensor
    prior_std: Tensor

    def __init__(
        self,
        sites: Sequence[Site],
        prior: PretrainedPrior,
        init_std: float = 0.0,
        rank: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(sites, prior, init_std)
        self.rank, self.seed = rank, seed
        like = prior.rms(self.sites[0].name) if self.sites else torch.zeros(())
        # in the weights' own precision: outputs near the data are small differences of large contributions,
        # which half precision would drown
        self.register_buffer("directions", like.new_zeros(rank, self.n_weights))
        self.register_buffer("spread_kl", like.new_zeros((), dtype=torch.float64))
        self.register_buffer("determined", like.new_zeros((), dtype=torch.float64))
        self.register_buffer("prior_std", like.new_full((), prior.prior_scale))

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        layers: Mapping[str, VariationalLayer],
        prior: PretrainedPrior,
        options: PathwiseOptions,
    ) -> Self:
        """See the base class."""
        del layers
        return cls(sites, prior, rank=options.rank)

    @property
    def ready(self) -> bool:
        """Whether it was fitted."""
        return bool(self.sites) and bool((self.directions[0] != 0).any())

    # ---- closed form -------------------------------------------------------------------------
    def fit(self, data: ClosedFormData) -> dict[str, Any]:
        """Set s and the samples from the gradient rows of the training frames.

        Args:
            data: gradient rows at the present mean; rows without a label are not used.

        Returns:
            ``prior_scale``, ``temperature``, ``effective_parameters`` and the table of left-out
            scores, for the receipt.
        """
        gradients = data.held.labelled
        report: dict[str, Any] = {"n_rows": len(data.held.gradients), "n_train_rows": len(gradients)}
        s, temperature = choose_scales(data, report)
        self._set_samples(gradients, data.held.spectrum, s, temperature)
        return report | {
            "prior_scale": s,
            "temperature": temperature,
            "effective_parameters": self.effective_parameters(),
        }

    def _set_samples(self, gradients: Tensor, spectrum: Spectrum, s: float, temperature: float) -> None:
        """Equation (1), in units of s: eps - G^T (G G^T + T/s^2)^-1 (G eps + sqrt(T)/s xi).

        The buffer holds eps until they are moved: no array as large as the samples is made beside them.
        """
        directions, noise = self.directions, temperature / s**2
        for k, row in enumerate(directions):
            row.copy_(self._normal("prior", k, directions.shape[1]))
        xi = torch.stack([self._normal("labels", k, len(gradients)) for k in range(self.rank)])
        xi = math.sqrt(noise) * xi.double().to(directions.device)
        unit = s / math.sqrt(self.rank)
        if (
            spectrum.of_weights
        ):  # the same as (G^T G + T/s^2)^-1 (T/s^2 eps - sqrt(T)/s G^T xi): nothing cancels
            pulled = combine(xi.cpu().numpy(), gradients, torch.float64)
            moved = (noise * directions.double() - pulled.to(directions.device)).cpu().numpy()
            directions.copy_(torch.from_numpy(unit * spectrum.solve(moved.T, noise).T))
        else:
            wrong = xi
            for b in blocks(gradients):
                wrong.addmm_(directions[:, b].double(), gradients[:, b].double().T)
            move = torch.from_numpy(spectrum.solve(wrong.cpu().numpy().T, noise).T.copy())
            move = move.to(directions.device)
            for b in blocks(gradients):
                sample = torch.addmm(directions[:, b].double(), move, gradients[:, b].double(), alpha=-1)
                directions[:, b] = (unit * sample).to(directions)
        mu = spectrum.values / noise
        self.prior_std.fill_(s)
        self.spread_kl.fill_(0.5 * float(np.sum(np.log1p(mu) - mu / (1 + mu))))
        self.determined.fill_(float(np.sum(mu / (1 + mu))))

    def _normal(self, what: str, k: int, count: int) -> Tensor:
        return normal(("pathwise", what, self.seed, k), count, torch.float32)

    def effective_parameters(self) -> float:
        """How many directions the labels determine: sum mu/(1+mu), mu = s^2/T times an eigenvalue of G G^T."""
        return float(self.determined)

    # ---- the common interface ----------------------------------------------------------------
    @property
    def latent_numel(self) -> int:  # noqa: D102
        return self.rank

    def latent(self, keys: Sequence[Sequence[object]], dtype: torch.dtype) -> Tensor:
        """(len(keys), rank): one key per sample; all layers share the r numbers."""
        return torch.stack([normal((*key, "pathwise"), self.rank, dtype) for key in keys])

    def sample(self, latent: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return self._by_site(latent @ self.directions.to(latent))

    def linear_variance(self, gradients: dict[str, Tensor]) -> Tensor:
        """|A D g|^2 of each row, (B,).

        Args:
            gradients: {site name: (B, *site.shape)} d(output)/d(weight).
        """
        flat = self._side_by_side(gradients)
        return (self.directions.to(flat) @ flat.T).square().sum(dim=0)

    def kl(self) -> Tensor:
        """1/2 sum [ln(1 + mu) - mu/(1 + mu)], nats: that of Sigma itself, not of its r samples."""
        return self.spread_kl

    def std(self) -> dict[str, Tensor]:
        """{site name: (*site.shape)} marginal stds, from the r samples."""
        parts = self._by_site(self.directions.square().sum(dim=0).sqrt()[None])
        return {name: part[0] for name, part in parts.items()}
