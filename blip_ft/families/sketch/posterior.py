"""``sketch``: the Laplace posterior over all noisy weights in a space of m numbers, whatever the number of frames.

    w = theta + D S v,    v ~ N(0, Sigma),    Sigma = T (H + x)^-1,    H = sum of phi phi^T,    phi = S^T D g / noise

theta is the mean, D = diag(rms(w0)) per matrix and path, g the gradient of a label. S is a count sketch
(:mod:`blip_ft.families.sketch.buckets`): every weight is +- one of m numbers, by a hash, so that phi.phi' estimates
the g.g' of the full covariance (``pathwise``) without bias. x is T/s^2 but for the share of the prior's variance that
m numbers cannot hold beside what the labels determine (:func:`~blip_ft.families.sketch.statistics.ridge`). Rows are
sketched as they are made and H is summed: nothing grows with the number of frames.

The variance of an output, phi Sigma phi^T, is exact from a triangular factor, Sigma = U U^T; draws and the error bars
of forces are made of r samples U z. Derivations: docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy.linalg import cholesky
from scipy.linalg.lapack import dtrtri
from torch import Tensor

from blip_ft.errors import BlipError, CheckpointError
from blip_ft.families.base.budget import megabytes
from blip_ft.families.base.gram import as_many_threads_as_torch, mirrored
from blip_ft.families.base.linear import ClosedFormData, Collected, LinearizedModel, choose_scales
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.base.posterior import ClosedFormPosterior
from blip_ft.families.sketch.buckets import VERSION, mark, places, to_buckets, to_weights
from blip_ft.families.sketch.budget import file_bytes, least_buckets, most_buckets
from blip_ft.families.sketch.options import SketchOptions
from blip_ft.families.sketch.statistics import Known, Statistics, ridge, side
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.noise import normal
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site

#: buckets for every direction that the labels determine, where the number is chosen
PER_DIRECTION = 8
#: least eigenvalue of H, over the largest, that rounding makes of zero
ROUNDING = 1e-9


class SketchPosterior(ClosedFormPosterior):
    """Full-covariance Gaussian over m numbers that all noisy weights are hashed into.

    Args:
        sites: the weights that carry noise.
        prior: its ``prior_scale`` is s; set by the fit unless fixed.
        init_std: not used: there is no spread before :meth:`fit`.
        wanted: buckets, samples and bytes.
        seed: of the hash and of the samples.

    Attributes:
        known: what rows are added to and removed from; ``None`` before a fit, and of a model file until it is read from
            the folder of its run (``closed_form.statistics_file``).
    """

    options: ClassVar[type[FamilyOptions]] = SketchOptions
    factor: Tensor
    samples: Tensor
    spread_kl: Tensor
    determined: Tensor
    prior_std: Tensor
    hash_mark: Tensor
    place: Tensor

    def __init__(
        self,
        sites: Sequence[Site],
        prior: PretrainedPrior,
        init_std: float = 0.0,
        wanted: SketchOptions | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(sites, prior, init_std)
        self.wanted, self.seed = wanted or SketchOptions(), seed
        self.known: Known | None = None
        like = prior.rms(self.sites[0].name) if self.sites else torch.zeros(())
        # in the weights' own precision, as outputs near the data are small differences of large contributions
        self.register_buffer("factor", like.new_zeros(0, 0))
        self.register_buffer("samples", like.new_zeros(0, 0))
        self.register_buffer("spread_kl", like.new_zeros((), dtype=torch.float64))
        self.register_buffer("determined", like.new_zeros((), dtype=torch.float64))
        self.register_buffer("prior_std", like.new_full((), prior.prior_scale))
        self.register_buffer("hash_mark", torch.zeros(2, dtype=torch.int64, device=like.device))
        self.register_buffer("place", torch.zeros(0, dtype=torch.int32, device=like.device), persistent=False)
        self._register_state_dict_hook(_as_triangle)

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        layers: Mapping[str, VariationalLayer],
        prior: PretrainedPrior,
        options: SketchOptions,
    ) -> Self:
        """See the base class."""
        del layers
        return cls(sites, prior, wanted=options)

    @property
    def ready(self) -> bool:
        """Whether it was fitted."""
        return bool(self.sites) and bool(self.samples.any())

    @property
    def buckets(self) -> int:
        """m; 0 before the first fit."""
        return len(self.factor)

    # ---- closed form -------------------------------------------------------------------------
    def collect(self) -> Statistics:
        """See the base class: sums in as many buckets as the bound allows, of which a fit takes as many as it needs."""
        size = self.prior_std.element_size()
        most = most_buckets(self.wanted, self.n_weights, size) or least_buckets(self.n_weights)
        place = places(self.sites, most, self.seed).to(self.prior_std.device)

        def reduce(gradients: Tensor) -> Tensor:
            return to_buckets(gradients, place, most)

        return Statistics(reduce, most, exact=most == self.n_weights)

    def fit(self, data: ClosedFormData) -> dict[str, Any]:
        """Set s, m and the covariance from the gradient rows of the training frames.

        Args:
            data: gradient rows at the present mean, or what :meth:`collect` has made of them; rows without a label are
                not used.

        Returns:
            ``prior_scale``, ``temperature``, ``effective_parameters``, the table of left-out scores, ``buckets``,
            ``absorbed`` (:meth:`set_covariance`) and ``bytes``, for the receipt.
        """
        statistics = data.rows if isinstance(data.rows, Statistics) else self._collected(data.rows)
        report: dict[str, Any] = {"n_rows": statistics.rows, "n_train_rows": statistics.labelled}
        held = ClosedFormData(statistics, data.prior_scale, data.temperature)
        s, temperature = choose_scales(held, report)
        buckets = self._enough(statistics, temperature / s**2)
        self._set_buckets(buckets)
        matrix = statistics.matrix(buckets)
        self.known = Known(matrix, statistics.frames, statistics.labelled, s, temperature)
        absorbed = self.set_covariance(mirrored(matrix.copy(order="F")), s, temperature)
        size = self.prior_std.element_size()
        return report | {
            "prior_scale": s,
            "temperature": temperature,
            "effective_parameters": self.effective_parameters(),
            "buckets": buckets,
            "absorbed": absorbed,
            "bytes": file_bytes(buckets, self.wanted.rank, size),
        }

    def _collected(self, rows: LinearizedModel | Collected) -> Statistics:
        assert isinstance(rows, LinearizedModel)
        out = self.collect()
        features = out.features(rows.gradients)
        out.add(LinearizedModel(features, rows.targets, rows.groups, rows.scored, rows.errors, rows.keys))
        return out

    def _enough(self, statistics: Statistics, noise: float) -> int:
        """The fewest buckets that have :data:`PER_DIRECTION` for every direction that the labels determine."""
        if self.wanted.buckets != "auto":
            return statistics.width
        buckets = least_buckets(self.n_weights)
        while buckets < statistics.width:
            values = _eigenvalues(statistics.matrix(buckets))
            x = ridge(values, noise, buckets)
            if PER_DIRECTION * float(np.sum(values / (values + x))) <= buckets:
                break
            buckets *= 2
        return buckets

    def _set_buckets(self, buckets: int) -> None:
        self.place = places(self.sites, buckets, self.seed).to(self.prior_std.device)
        self.hash_mark = torch.tensor([VERSION, mark(self.place)], device=self.place.device)

    def set_covariance(self, matrix: np.ndarray, s: float, temperature: float) -> float:
        """Factor and samples of T (H + x)^-1.

        Args:
            matrix: (m, m) H, both halves.
            s: the prior's scale.
            temperature: T.

        Returns:
            Share of the prior's variance that the sketch absorbs, and that was given back.

        Raises:
            numpy.linalg.LinAlgError: H has a negative eigenvalue; the posterior is as before.
        """
        m, noise = len(matrix), temperature / s**2
        values = _eigenvalues(matrix)
        x = ridge(values, noise, m, exact=m == self.n_weights)
        with as_many_threads_as_torch():
            lower = cholesky(
                matrix / temperature + (x / temperature) * np.eye(m), lower=True, check_finite=False
            )
            inverse, _ = dtrtri(lower, lower=1, overwrite_c=1)
        upper = torch.from_numpy(np.ascontiguousarray(inverse.T))
        rank = min(self.wanted.rank, m)
        if rank == m:
            samples = upper.T
        else:
            drawn = torch.stack([normal(("sketch", "sample", self.seed, k), m) for k in range(rank)])
            samples = drawn @ upper.T / math.sqrt(rank)
        mu = values / x
        self.factor, self.samples = upper.to(self.prior_std), samples.contiguous().to(self.prior_std)
        self.prior_std.fill_(s)
        self.spread_kl.fill_(0.5 * float(np.sum(np.log1p(mu) - mu / (1 + mu))))
        self.determined.fill_(float(np.sum(mu / (1 + mu))))
        return 1 - x / noise

    def effective_parameters(self) -> float:
        """How many directions the labels determine: sum mu/(1+mu), mu an eigenvalue of H/x."""
        return float(self.determined)

    def describe(self, report: Mapping[str, Any]) -> str:
        """What the posterior covers, in words."""
        m, size = report["buckets"], self.prior_std.element_size()
        text = (
            f"{m:,} buckets of all {self.n_weights:,} noisy weights ({megabytes(report['bytes'])} in the model file), "
            f"{report['n_train_rows']} gradients of labels"
        )
        if m < self.n_weights and PER_DIRECTION * report["effective_parameters"] > m:
            more = file_bytes(2 * m, self.wanted.rank, size)
            text += (
                f"; {report['effective_parameters'] / m:.0%} of the buckets go to what the labels determine, with "
                f"posterior.max_bytes={more} there would be {2 * m:,}"
            )
        return text

    # ---- updates -----------------------------------------------------------------------------
    def add(self, rows: LinearizedModel) -> dict[str, Any]:
        """Take frames in, as a fit at the same mean, prior scale and number of buckets would have.

        Args:
            rows: features of frames that are not in it yet (``GradientRows.features``), with their keys; rows without
                a label are not used.

        Returns:
            ``n_train_rows``, ``effective_parameters`` and ``absorbed``.

        Raises:
            BlipError: a frame is in it already; or there are no statistics (:attr:`known`).
        """
        return self._change(rows, remove=False)

    def remove(self, rows: LinearizedModel) -> dict[str, Any]:
        """Take frames out again; as :meth:`add`.

        Raises:
            BlipError: a frame is not in it, or not with these rows; or there are no statistics.
        """
        return self._change(rows, remove=True)

    def _change(self, rows: LinearizedModel, *, remove: bool) -> dict[str, Any]:
        if self.known is None:
            raise BlipError(
                "this posterior has no sums that frames could be added to or removed from",
                field="statistics",
                remedy="read them from the folder of the run that made it",
            )
        if rows.gradients.shape[1] != self.buckets:
            raise ValueError(f"features of {rows.gradients.shape[1]} numbers for {self.buckets} buckets")
        known = self.known.changed(rows, remove=remove)
        whole = mirrored(known.matrix.copy(order="F"))
        try:
            absorbed = self.set_covariance(whole, known.scale, known.temperature)
        except np.linalg.LinAlgError as error:
            raise BlipError(
                "what is left after these rows were removed is no sum of rows: they are not those that were added",
                field="frames",
                remedy="make rows at the mean, with the labels, the projections and the number of the fit",
            ) from error
        self.known = known
        return {
            "n_train_rows": self.known.rows,
            "effective_parameters": self.effective_parameters(),
            "absorbed": absorbed,
        }

    def statistics(self) -> dict[str, Tensor]:
        """See the base class."""
        return {} if self.known is None else self.known.tensors() | {"hash_mark": self.hash_mark.cpu()}

    def set_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """See the base class."""
        found = dict(tensors)
        if not torch.equal(found.pop("hash_mark"), self.hash_mark.cpu()):
            raise ValueError("its weights are hashed into other buckets")
        self.known = Known.from_tensors(found)

    # ---- outputs -----------------------------------------------------------------------------
    def features(self, gradients: Tensor) -> Tensor:
        """Phi of outputs: (B, P) gradients, weights in units of rms -> (B, m)."""
        return to_buckets(gradients, self.place, self.buckets)

    def covariance(self, features: Tensor, others: Tensor | None = None) -> Tensor:
        """Posterior covariance of outputs of the linearised model, float64.

        Args:
            features: (A, m) phi of outputs (:meth:`features`), in the outputs' units or over a noise.
            others: (B, m) of other outputs; by default the same.

        Returns:
            (A, B) phi Sigma phi'^T.
        """
        along = (features @ self.factor.to(features)).double()
        return along @ (along if others is None else (others @ self.factor.to(others)).double()).T

    # ---- the common interface ----------------------------------------------------------------
    @property
    def latent_numel(self) -> int:  # noqa: D102
        return len(self.samples)

    def latent(self, keys: Sequence[Sequence[object]], dtype: torch.dtype) -> Tensor:
        """(len(keys), r): one key per sample; all layers share the r numbers."""
        return torch.stack([normal((*key, "sketch"), len(self.samples), dtype) for key in keys])

    def sample(self, latent: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return self._by_site(to_weights(latent @ self.samples.to(latent), self.place))

    def linear_variance(self, gradients: dict[str, Tensor]) -> Tensor:
        """Exact variance phi Sigma phi^T of outputs that are linear in the weights, (B,).

        Args:
            gradients: {site name: (B, *site.shape)} d(output)/d(weight).
        """
        features = self.features(self._side_by_side(gradients))
        return (features @ self.factor.to(features)).square().sum(dim=1)

    def kl(self) -> Tensor:
        """1/2 sum [ln(1 + mu) - mu/(1 + mu)], nats."""
        return self.spread_kl

    def std(self) -> dict[str, Tensor]:
        """{site name: (*site.shape)} marginal stds: of a weight that of its bucket."""
        of_bucket = self.factor.square().sum(dim=1).sqrt()
        flat = to_weights(of_bucket[None], self.place).abs()
        return {name: part[0] for name, part in self._by_site(flat).items()}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """The number of buckets is that of the file, and its hash has to be ours.

        Raises:
            CheckpointError: the weights are hashed into other buckets than when it was made.
        """
        triangle, samples = (state_dict.get(prefix + name) for name in ("factor", "samples"))
        if triangle is not None and samples is not None:
            m = side(len(triangle))
            state_dict = dict(state_dict)
            state_dict[prefix + "factor"] = whole = triangle.new_zeros(m, m)
            whole[tuple(torch.triu_indices(m, m))] = triangle
            self.factor, self.samples = self.factor.new_zeros(m, m), self.samples.new_zeros(samples.shape)
            place = places(self.sites, m, self.seed) if m else self.place
            found = state_dict.get(prefix + "hash_mark")
            if m and (found is None or found.tolist() != [VERSION, mark(place)]):
                version = "none" if found is None else int(found[0])
                raise CheckpointError(
                    f"the posterior's weights were hashed by version {version} of the sketch into other buckets than "
                    f"version {VERSION} does here: its error bars would be those of other weights",
                    field="posterior.hash_mark",
                    remedy="load it with the version of blip-ft that made it, or train again",
                )
            self.place = place.to(self.prior_std.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _eigenvalues(matrix: np.ndarray) -> np.ndarray:
    with as_many_threads_as_torch():
        values: np.ndarray = np.linalg.eigvalsh(matrix)
    if values[0] < -ROUNDING * values[-1]:
        raise np.linalg.LinAlgError("negative eigenvalue")
    return values.clip(min=0)


def _as_triangle(module: SketchPosterior, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """In files the factor without the zeros below it."""
    del metadata
    factor = module.factor
    state[prefix + "factor"] = factor[tuple(torch.triu_indices(*factor.shape, device=factor.device))]
