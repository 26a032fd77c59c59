"""``posthoc_laplace``: the Laplace approximation after plain fine-tuning, full covariance.

    q(w) = N(theta, Sigma),   Sigma = s^2 D [I - V^T diag(mu / (1 + mu)) V] D,   mu = s^2 lambda / T

theta is the mean that plain fine-tuning left, D = diag(rms(w0)), s the prior's scale, T a temperature;
lambda and V (k, P) are the eigenvalues and orthonormal eigenvectors of G^T G, G the gradient rows of the
training labels over their noise, times D (Gauss-Newton). This is (D^-2/s^2 + D^-1 G^T G D^-1 / T)^-1 by
Woodbury's identity: low rank plus diagonal, nothing left out but directions with mu < ``NEGLIGIBLE``.

Directions that no label determines keep the prior's width: all P weights carry noise, unlike in
``subspace``. A baseline under its usual name (MacKay 1992; Daxberger et al., arXiv 2106.14806).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from blip_ft.families.base.gram import blocks, gram_matrix
from blip_ft.families.base.linear import ClosedFormData, choose_scales
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.base.posterior import ClosedFormPosterior
from blip_ft.families.base.spectrum import Spectrum
from blip_ft.families.posthoc_laplace.options import LaplaceOptions
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site

#: directions that the labels narrow by less than this share of the prior's variance are left out
NEGLIGIBLE = 1e-3
#: eigenvalues below this share of the largest are rounding of the Gram matrix
FLOOR = 1e-13


class LaplacePosterior(ClosedFormPosterior):
    """Low-rank-plus-diagonal Gaussian over all noisy weights.

    Args:
        sites: the weights that carry noise.
        prior: its ``prior_scale`` is s; set by the fit unless fixed.
        init_std: not used: there is no spread before :meth:`fit`.
    """

    options: ClassVar[type[FamilyOptions]] = LaplaceOptions
    directions: Tensor
    mu: Tensor
    prior_std: Tensor

    def __init__(
        self, sites: tuple[Site, ...] | list[Site], prior: PretrainedPrior, init_std: float = 0.0
    ) -> None:
        super().__init__(sites, prior, init_std)
        like = prior.rms(self.sites[0].name) if self.sites else torch.zeros(())
        # V is kept in the weights' own precision: 1 - mu/(1+mu) is a small difference, which half
        # precision would drown
        self.register_buffer("directions", like.new_zeros(0, self.latent_numel))
        self.register_buffer("mu", like.new_zeros(0))
        self.register_buffer("prior_std", like.new_zeros(()))
        self._eigenvalues: np.ndarray = np.zeros(0)
        self._all: Tensor = self.directions

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        layers: Mapping[str, VariationalLayer],
        prior: PretrainedPrior,
        options: LaplaceOptions,
    ) -> Self:
        """See the base class."""
        del layers, options
        return cls(list(sites), prior)

    @property
    def ready(self) -> bool:
        """Whether it was fitted."""
        return bool(self.sites) and bool(self.prior_std > 0)

    # ---- closed form -------------------------------------------------------------------------
    def fit(self, data: ClosedFormData) -> dict[str, Any]:
        """Set V, s and T from the gradient rows of the training frames.

        Args:
            data: gradient rows at the present mean; rows without a label are not used.

        Returns:
            ``prior_scale``, ``temperature``, ``effective_parameters`` and the table of left-out
            scores (the same rule as for ``subspace``), for the receipt.
        """
        rows = data.held
        gradients = rows.labelled
        report: dict[str, Any] = {"n_rows": len(rows.gradients), "n_train_rows": len(gradients)}
        s, temperature = choose_scales(data, report)
        self._set_directions(gradients, rows.spectrum)
        self.set_covariance(s, temperature)
        return report | {
            "prior_scale": s,
            "temperature": temperature,
            "effective_parameters": self.effective_parameters(),
        }

    def _set_directions(self, gradients: Tensor, spectrum: Spectrum) -> None:
        """Eigenvectors of G^T G, strongest first; by those of G G^T: V = Lambda^(-1/2) U^T G.

        In float64 block by block, and kept in the weights' precision: nothing as large as the rows is made beside V.
        """
        values, vectors = spectrum.values, spectrum.vectors
        order = np.argsort(values)[::-1]
        order = order[values[order] > values.max() * FLOOR]
        self._eigenvalues = values[order]
        if spectrum.of_weights:
            self._all = torch.from_numpy(vectors[:, order].T.copy()).to(self.prior_std)
            return
        mix = torch.from_numpy((vectors[:, order] / np.sqrt(values[order])).T.copy()).to(gradients.device)
        # what rounding lost of the weak directions' orthogonality, the strong ones kept as they are
        overlap = np.zeros((len(order), len(order)))
        for b in blocks(gradients):
            overlap += gram_matrix(mix @ gradients[:, b].double())
        lower = torch.from_numpy(np.linalg.cholesky(overlap)).to(mix)
        mix = torch.linalg.solve_triangular(lower, mix, upper=False)
        self._all = self.prior_std.new_empty(len(order), gradients.shape[1])
        for b in blocks(gradients):
            self._all[:, b] = (mix @ gradients[:, b].double()).to(self._all)

    def set_covariance(self, prior_scale: float, temperature: float) -> None:
        """Take mu = s^2 lambda / T, for the directions of the last :meth:`fit`."""
        mu = prior_scale**2 * self._eigenvalues / temperature
        keep = int((mu > NEGLIGIBLE).sum())
        self.directions = self._all[:keep].contiguous()
        self.mu = torch.from_numpy(mu[:keep].copy()).to(self.prior_std)
        self.prior_std.fill_(prior_scale)

    def effective_parameters(self) -> float:
        """How many directions the labels determine: sum mu/(1+mu)."""
        return float((self.mu.double() / (1 + self.mu.double())).sum())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """The number of directions is that of the file."""
        for name in ("directions", "mu"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                own = getattr(self, name)
                setattr(self, name, own.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ---- the common interface ----------------------------------------------------------------
    @property
    def latent_numel(self) -> int:  # noqa: D102
        return self.n_weights

    def sample(self, latent: Tensor) -> dict[str, Tensor]:
        """Noise s D [eps - V^T (1 - (1+mu)^(-1/2)) V eps]: complement and low-rank part.

        The matrix in brackets is the symmetric root of I - V^T diag(mu/(1+mu)) V.
        """
        v = self.directions.to(latent)
        drop = 1 - (1 + self.mu.to(latent)).rsqrt()
        flat = self.prior_std.to(latent) * (latent - ((latent @ v.T) * drop) @ v)
        return self._by_site(flat)

    def linear_variance(self, gradients: dict[str, Tensor]) -> Tensor:
        """Exact variance g^T Sigma g of outputs that are linear in the weights, (B,).

        As s^2 (|g - V^T V g|^2 + sum (V g)^2 / (1 + mu)), without differences of large numbers.

        Args:
            gradients: {site name: (B, *site.shape)} d(output)/d(weight).
        """
        flat = self._side_by_side(gradients)
        v = self.directions.to(flat)
        along = flat @ v.T
        rest = (flat - along @ v).square().sum(dim=1)
        within = (along.square() / (1 + self.mu.to(flat))).sum(dim=1)
        return self.prior_std.to(flat).square() * (rest + within)

    def kl(self) -> Tensor:
        """1/2 sum [ln(1 + mu) - mu/(1 + mu)], nats."""
        return 0.5 * (torch.log1p(self.mu) - self.mu / (1 + self.mu)).sum()

    def std(self) -> dict[str, Tensor]:  # noqa: D102
        narrowed = (self.mu / (1 + self.mu))[:, None] * self.directions.square()
        marginal = self.prior_std * (1 - narrowed.sum(dim=0)).clamp_min(0).sqrt()
        return {name: part[0] for name, part in self._by_site(marginal[None]).items()}
