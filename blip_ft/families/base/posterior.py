"""The interface of all posterior families.

A posterior is the law of the perturbation around the mean, over all noisy sites at once, so that
weights of different layers may be correlated. It is driven by ``latent_numel`` independent
standard normal numbers per sample; ``sample`` maps them linearly to weights. Linear, because then
the mean over draws whose latent numbers sum to zero is free of first-order sampling noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from blip_ft.families.base.linear import ClosedFormData, Collected
from blip_ft.families.base.options import FamilyOptions
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.noise import RowLayout, normal
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site


class RowRecorder(Protocol):
    """Amplitudes of the rows of one evaluation in training, and what they add to the loss."""

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """(rows, 1) factors of the perturbation in every row of a layer's input."""

    def kl(self) -> Tensor:
        """(B,) KL of every structure's own weights, nats."""


class Posterior(nn.Module, ABC):
    """q(w) = law of w0 + delta + ``sample(latent)``, ``latent`` standard normal.

    Args:
        sites: the weights that carry noise.
        prior: prior over these (and perhaps more) weights.
        init_std: starting std in units of each matrix's rms.
    """

    #: keys of the recipe, and what may be asked about the family
    options: ClassVar[type[FamilyOptions]]

    def __init__(self, sites: Sequence[Site], prior: PretrainedPrior, init_std: float) -> None:
        super().__init__()
        self.sites = tuple(sites)
        # the model owns the prior; a list keeps it from being registered (and saved) twice
        self._prior = [prior]
        self.init_std = float(init_std)

    @classmethod
    @abstractmethod
    def make(
        cls,
        sites: Sequence[Site],
        layers: Mapping[str, VariationalLayer],
        prior: PretrainedPrior,
        options: Any,
    ) -> Self:
        """From a recipe.

        Args:
            sites: the weights that carry noise.
            layers: {site name: layer} of these.
            prior: prior over these (and perhaps more) weights.
            options: of the family's own class.

        Raises:
            ConversionError: the family does not suit these layers.
        """

    @property
    def family(self) -> str:
        """Name in a recipe."""
        return self.options.name()

    @property
    def factorised(self) -> bool:
        """Whether weights are independent."""
        return self.options.factorised

    @property
    def paired(self) -> bool:
        """Whether draws come in pairs +-z."""
        return self.options.paired

    @property
    def draws_are_weights(self) -> bool:
        """Whether a draw is a set of weights."""
        return self.options.draws_are_weights

    @property
    def prior(self) -> PretrainedPrior:
        """The prior that :meth:`kl` is measured against."""
        return self._prior[0]

    @property
    def ready(self) -> bool:
        """Whether there is noise to sample; families that need :meth:`fit` first say so here."""
        return bool(self.sites)

    # ---- hooks of training; nothing for most families ----------------------------------------
    @property
    def row_amplitude(self) -> Callable[[Any, Tensor], Tensor] | None:
        """Factor (rows, 1) of the perturbation in every row of a layer's input, for draws."""
        return None

    def recorder(self, rows: Mapping[str, RowLayout]) -> RowRecorder | None:
        """The same for one evaluation in training.

        Args:
            rows: layout of every kind of row in the batch.
        """
        del rows
        return None

    def epoch_report(self) -> dict[str, float] | None:
        """Numbers of the epoch that has ended, for the log; ``None`` for families without any. Called once an epoch."""
        return None

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Evaluate without moving what a family remembers of the rows seen in training: when a model is judged."""
        yield

    def epoch_counts(self) -> dict[str, Any]:
        """What :meth:`epoch_report` has counted so far, as numbers, lists and mappings: for checkpoints."""
        return {}

    def set_epoch_counts(self, counts: Mapping[str, Any]) -> None:
        """The inverse of :meth:`epoch_counts`."""
        del counts

    def describe_epoch(self, report: Mapping[str, float]) -> tuple[dict[str, Any], list[str]]:
        """What of the last epoch's report goes into the receipt, and sentences that the user should read."""
        return dict(report), []

    # ---- weights ---------------------------------------------------------------------------
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


class ClosedFormPosterior(Posterior):
    """A posterior whose covariance is set from gradients of the training frames.

    Its spread is 0 before the first :meth:`fit`; from then on :attr:`ready` is true.
    """

    @abstractmethod
    def fit(self, data: ClosedFormData) -> dict[str, Any]:
        """Set the covariance.

        Returns:
            A report for the receipt, with at least ``prior_scale``, ``temperature``, ``n_rows`` and
            ``n_train_rows``.
        """

    def collect(self) -> Collected | None:
        """What gradient rows are added to as they are made; ``None`` where they are held."""
        return None

    def statistics(self) -> dict[str, Tensor]:
        """What frames can be added to and removed from later, for a file beside the model's; empty for families without
        updates.
        """
        return {}

    def set_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`statistics`.

        Raises:
            ValueError: they are not of this posterior.
        """
        del tensors

    @abstractmethod
    def effective_parameters(self) -> float:
        """How many directions the labels determine."""

    def settle(
        self,
        report: Mapping[str, Any],
        hessian: Callable[[Tensor, int], np.ndarray],
        *,
        final: bool,
    ) -> None:
        """Correct the covariance with real draws, where a family does.

        Args:
            report: of :meth:`fit`.
            hessian: (basis (r, P), number of a draw) -> (r, r) Gauss-Newton matrix along the basis, in units of
                rms(w0), each training structure at a draw of its own.
            final: the last fit of a run.
        """
        del report, hessian, final

    def describe(self, report: Mapping[str, Any]) -> str:
        """What the posterior covers, in words."""
        return f"all {self.n_weights:,} noisy weights, {report['n_train_rows']} gradients of labels"
