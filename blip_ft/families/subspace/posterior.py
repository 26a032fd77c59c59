"""``subspace``: a correlated Gaussian along the strongest directions of the data.

    w = theta + D V^T z,     z ~ N(0, S),     prior z ~ N(0, s^2 I)

theta is the mean, D = diag(rms(w0)) per matrix and path, V (r, P) has orthonormal rows, S is r x r.
V is taken from G, whose rows are gradients of model outputs with respect to the weights, times D,
over the noise of their label: the r combinations in which outputs of training and context frames are
most uncertain once the training labels are known. Directions that no frame can see carry no noise.

Closed form (Gauss-Newton; linearised, or averaged over draws of z):

    S = (I / s^2 + H / T)^-1,    H = (G_train V^T)^T (G_train V^T)                          (1)

which is where the ELBO  E_q[log p(y | z)] - T KL(N(0, S) || N(0, s^2 I))  is stationary in S, with
H averaged over q. Derivations: docs/theory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy.linalg import cholesky, solve_triangular
from torch import Tensor

from blip_ft.families.base.gram import combine, gram_matrix
from blip_ft.families.base.linear import ClosedFormData, choose_scales
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.base.posterior import ClosedFormPosterior
from blip_ft.families.base.spectrum import Spectrum
from blip_ft.families.subspace.options import SubspaceOptions
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.noise import normal
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site

#: std of an output, in units of its label's noise, below which it asks for no direction
LEAST_STD = 0.03
#: std of the latent numbers before the first fit, where directions are zero yet: of the KL in the log alone
INIT_STD = 0.003
#: rounds of the last covariance over draws, one draw per training structure each
FINAL_ROUNDS = 2


class SubspacePosterior(ClosedFormPosterior):
    """Correlated Gaussian with r latent numbers.

    Args:
        sites: the weights that carry noise.
        prior: its ``prior_scale`` is s; set by :meth:`fit` unless fixed.
        init_std: std of every latent number before the first :meth:`fit`.
        rank: r.
        storage: precision that directions are rounded to, and in which a file holds them.
    """

    options: ClassVar[type[FamilyOptions]] = SubspaceOptions
    directions: Tensor
    scale: Tensor
    prior_std: Tensor

    def __init__(
        self,
        sites: Sequence[Site],
        prior: PretrainedPrior,
        init_std: float,
        rank: int = 64,
        storage: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(sites, prior, init_std)
        self.storage = storage
        p = sum(s.numel for s in self.sites)
        self.rank = min(rank, p)
        like = prior.rms(self.sites[0].name) if self.sites else torch.zeros(())
        # zero directions: no noise before the first fit
        self.register_buffer("directions", like.new_zeros(self.rank, p))
        # eye in the weights' own precision: a scalar tensor times a float32 matrix stays float32
        self.register_buffer("scale", init_std * torch.eye(self.rank, dtype=like.dtype, device=like.device))
        self.register_buffer("prior_std", like.new_full((), prior.prior_scale))
        self._register_state_dict_hook(_directions_as_stored)

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        layers: Mapping[str, VariationalLayer],
        prior: PretrainedPrior,
        options: SubspaceOptions,
    ) -> Self:
        """See the base class."""
        del layers
        storage = torch.float32 if options.storage == "float32" else torch.float16
        return cls(sites, prior, INIT_STD, rank=options.rank, storage=storage)

    @property
    def ready(self) -> bool:
        """Whether directions were set."""
        return bool(self.sites) and bool((self.directions[0] != 0).any())

    # ---- closed form -----------------------------------------------------------------------
    def fit(self, data: ClosedFormData) -> dict[str, Any]:
        """Set V, s and S from gradient rows.

        Args:
            data: gradient rows at the present mean.

        Returns:
            ``prior_scale``, ``temperature``, ``effective_parameters`` and the table of left-out
            scores, for the receipt.
        """
        rows = data.held
        gram = gram_matrix(rows.gradients)
        train = rows.is_train
        report: dict[str, Any] = {"n_rows": len(gram), "n_train_rows": int(train.sum())}
        rows.spectrum = Spectrum.of_matrix(gram[np.ix_(train, train)])  # a step of the mean needs it again
        s, temperature = choose_scales(data, report)
        report["captured"] = self._set_directions(rows.gradients, gram, train, rows.spectrum, s, temperature)
        projected = self._project(rows.labelled)
        self.set_covariance(projected.T @ projected, s, temperature)
        report |= {
            "prior_scale": s,
            "temperature": temperature,
            "effective_parameters": self.effective_parameters(),
        }
        return report

    def _set_directions(
        self,
        gradients: Tensor,
        gram: np.ndarray,
        train: np.ndarray,
        spectrum: Spectrum,
        s: float,
        temperature: float,
    ) -> float:
        """V: the r directions in which the outputs are most uncertain after the training data.

        With K = G G^T and t the training rows, the linearised posterior covariance of all outputs is

            C = s^2 [K - K_t (K_tt + T/s^2 I)^-1 K_t^T],

        and the weights that move with output combination u are Sigma G^T u = G^T A u with
        A = s^2 [I - E_t (K_tt + T/s^2 I)^-1 K_t^T]. V spans these for the top r eigenvectors
        (goal-oriented reduction, Spantini et al., SIAM J. Sci. Comput. 39, S167, 2017) of C, weighted:
        with W = diag(C)^-1/4 the combinations are u = W v, v an eigenvector of W C W. These lose least of
        sum_i lost_i/std_i, to first order twice the sum of the stds. Unweighted they would lose least of
        the sum of variances: all of them would go to the few frames whose spread is widest, and frames
        like the training ones, on which calibration stands, be left without. The stiffest directions of
        the data, by contrast, are those the posterior leaves no width.

        Returns:
            Share of the trace of W C W that the r directions hold.
        """
        reach = np.zeros_like(gram)
        reach[train] = spectrum.solve(gram[train], temperature / s**2)
        a = s * s * (np.eye(len(gram)) - reach)
        covariance = gram @ a
        # stds far below the label's noise, rounding where forces vanish by symmetry, are not blown up
        weight = (covariance.diagonal().clip(min=0) + LEAST_STD**2) ** -0.25
        covariance = weight[:, None] * (0.5 * (covariance + covariance.T)) * weight
        values, vectors = np.linalg.eigh(covariance)
        order = np.argsort(values)[::-1][: self.rank]
        order = order[values[order] > values.max() * 1e-10]
        mix = a @ (weight[:, None] * vectors[:, order])
        mix /= np.sqrt(np.einsum("mi,mn,ni->i", mix, gram, mix))  # unit rows before orthonormalising
        v = combine(mix.T, gradients)
        lower = np.linalg.cholesky(gram_matrix(v) + 1e-12 * np.eye(len(order)))
        v = torch.linalg.solve_triangular(torch.from_numpy(lower).to(v), v, upper=False)
        self.directions.zero_()
        # rounded once, so that what is fitted is what is stored
        self.directions[: len(order)] = v.to(self.storage).to(self.directions)
        return float(values[order].sum() / values.clip(min=0).sum())

    def _project(self, gradients: Tensor) -> np.ndarray:
        """(m, r) rows of G V^T, float64."""
        return (gradients.to(self.directions) @ self.directions.T).double().cpu().numpy()

    def set_covariance(self, hessian: np.ndarray, prior_scale: float, temperature: float) -> None:
        """S = (I/s^2 + H/T)^-1, equation (1); stored as a factor L with S = L L^T."""
        self.prior_std.fill_(prior_scale)
        self.set_precision(np.eye(self.rank) / prior_scale**2 + hessian / temperature)

    def set_precision(self, precision: np.ndarray) -> None:
        """S = precision^-1."""
        lower = cholesky(precision, lower=True)
        factor = np.linalg.inv(lower).T  # L L^T = precision^-1
        self.scale.copy_(torch.from_numpy(factor))

    def precision(self) -> np.ndarray:
        """S^-1, (r, r)."""
        inverse = np.linalg.inv(self.scale.double().cpu().numpy())
        out: np.ndarray = inverse.T @ inverse
        return out

    def effective_parameters(self) -> float:
        """sum_i (1 - S_ii / s^2): how many of the r directions the data determine."""
        s2 = float(self.prior_std) ** 2
        return float(self.rank - (self.scale.double() @ self.scale.double().T).diagonal().sum() / s2)

    def settle(
        self,
        report: Mapping[str, Any],
        hessian: Callable[[Tensor, int], np.ndarray],
        *,
        final: bool,
    ) -> None:
        """The covariance averaged over draws along the directions."""
        # draws of the linearised covariance can leave the linear regime: gradients are larger there and the
        # next covariance too narrow, the one after it too wide again; their geometric mean is neither
        s, temperature = report["prior_scale"], report["temperature"]
        for draw in range(FINAL_ROUNDS if final else 1):
            before = self.precision()
            self.set_covariance(hessian(self.directions, draw), s, temperature)
            if draw:
                self.set_precision(geometric_mean(before, self.precision()))

    def describe(self, report: Mapping[str, Any]) -> str:
        """See the base class."""
        return (
            f"{self.rank} directions of {report['n_rows']} gradients hold "
            f"{100 * report['captured']:.0f} % of the spread"
        )

    # ---- the common interface ----------------------------------------------------------------
    @property
    def latent_numel(self) -> int:  # noqa: D102
        return self.rank

    def latent(self, keys: Sequence[Sequence[object]], dtype: torch.dtype) -> Tensor:
        """(len(keys), rank): one key per sample; all layers share the r numbers."""
        return torch.stack([normal((*key, "subspace"), self.rank, dtype) for key in keys])

    def sample(self, latent: Tensor) -> dict[str, Tensor]:  # noqa: D102
        z = latent @ self.scale.T.to(latent)
        flat = z @ self.directions.to(latent)
        return self._by_site(flat)

    def linear_variance(self, gradients: dict[str, Tensor]) -> Tensor:
        """|S^(1/2) V D g|^2 of each row, (B,)."""
        flat = self._side_by_side(gradients)
        # (r, P) times (P, B): the directions are read once, and never transposed in memory
        slope = self.scale.T.to(flat) @ (self.directions.to(flat) @ flat.T)
        return slope.square().sum(dim=0)

    def kl(self) -> Tensor:
        """KL(N(0, S) || N(0, s^2 I)) = 1/2 [tr S / s^2 - r - ln det(S / s^2)], nats."""
        factor = self.scale / self.prior_std
        sign_free = factor.diagonal().abs().clamp_min(torch.finfo(factor.dtype).tiny).log().sum()
        return 0.5 * (factor.square().sum() - self.rank) - sign_free

    def std(self) -> dict[str, Tensor]:  # noqa: D102
        marginal = (self.scale.T @ self.directions).square().sum(dim=0).sqrt()
        return {name: part[0] for name, part in self._by_site(marginal[None]).items()}

    def relative_std(self) -> Tensor:
        """Geometric mean over the r latent directions of posterior over prior std."""
        s2 = (self.scale.double() @ self.scale.double().T).diagonal()
        return (0.5 * s2.log()).mean().exp() / self.prior_std.double()


def _directions_as_stored(
    module: SubspacePosterior, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    """Directions were rounded to this precision when they were set: saving them so loses nothing."""
    del metadata
    state[f"{prefix}directions"] = state[f"{prefix}directions"].to(module.storage)


def geometric_mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A # B = A^1/2 (A^-1/2 B A^-1/2)^1/2 A^1/2 of positive definite matrices (Bhatia 2007, section 4.1).

    With B = L L^T it is L U diag(sqrt(values)) U^T L^T, values and U the eigenpairs of L^-1 A L^-T.
    """
    lower = cholesky(b, lower=True)
    inner = solve_triangular(lower, solve_triangular(lower, a, lower=True).T, lower=True)
    values, vectors = np.linalg.eigh(0.5 * (inner + inner.T))
    half = lower @ vectors * values.clip(min=0) ** 0.25
    out: np.ndarray = half @ half.T
    return out
