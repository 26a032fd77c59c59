"""``adaptive``: independent weights whose std depends on the input of their layer.

    q(w | x) = N(theta, alpha(x) rms(w0)^2),    one alpha per row of the layer's input.

alpha comes from a small network (inference network) that reads the row itself: for layers on edges
("message" blocks) alpha, for layers on atoms ("update" blocks) beta. The rows are invariant numbers
(scalars, and squared norms of vectors) and depend smoothly on the positions. The network is part of
the energy's graph, so the force of a draw is the gradient of its energy.

This is the family of the BLIP paper (arXiv 2508.14022) with three changes, for which docs/theory.md
has the reasons: the unit is rms(w0) and not |theta| (unless ``prior: dropout``), the network is
differentiated through, and it reads the layer's own input and not the first one.

In ``structure``, ``flipout`` and ``draw`` mode the weights of a row are theta + sqrt(alpha(row)) rms xi
with one xi for all rows, so the layer stays equivariant and a draw an ordinary potential; ``local``
takes one xi per row (local reparameterisation), as the paper does.

The KL is not that of one set of weights but of each structure's:

    KL_n = sum over layers of P_l mean over the rows r of n of 1/2 [alpha_r/s^2 - 1 - ln(alpha_r/s^2)],

P_l the weights of the layer: exact for one weight sample per structure where alpha is the same for all
of its rows. The loss has T KL_n for every structure, without 1/N, so T must be far below 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from blip_ft.errors import BlipError, ConversionError
from blip_ft.families.adaptive.options import AdaptiveOptions
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.base.posterior import Posterior
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.noise import RowLayout, normal
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site

#: width of the networks' hidden layer
HIDDEN = 32
#: weight of the newest call in the running mean of ln alpha
MOMENTUM = 0.05
#: share of the rows from which on a clamp is worth a line
CLAMP_SHARE = 0.01


class InferenceNetwork(nn.Module):
    """(rows, k) invariant numbers -> (rows,) ln alpha before the clamp, minus its start.

    RowLayout are divided by sqrt(1 + their mean square), which bounds them smoothly. The last layer
    starts at zero, so alpha starts as one number. Weights are a function of ``key`` alone.
    """

    def __init__(self, k: int, key: str, like: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(k, HIDDEN, dtype=like.dtype, device=like.device)
        self.last = nn.Linear(HIDDEN, 1, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            start = normal(("inference network", key), HIDDEN * k).reshape(HIDDEN, k)
            self.first.weight.copy_(start * math.sqrt(2 / max(k, 1)))
            self.first.bias.zero_()
            self.last.weight.zero_()
            self.last.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x / (1 + x.square().mean(dim=1, keepdim=True)).sqrt()
        out: Tensor = self.last(nn.functional.silu(self.first(x)))
        return out.squeeze(1)


class AdaptivePosterior(Posterior):
    """Input-dependent spread.

    Args:
        sites: the weights that carry noise.
        prior: prior over these (and perhaps more) weights; one scale for all paths.
        init_std: sqrt(alpha) at the start.
        inputs: {site name: number of invariant inputs of its layer}.
        kinds: {site name: ``message`` or ``update``}.
        std_range: sqrt(alpha) is kept between these, smoothly.

    Attributes:
        log_alpha: (sites,) running mean of ln alpha over the rows seen in training.
    """

    options: ClassVar[type[FamilyOptions]] = AdaptiveOptions
    log_alpha: Tensor

    def __init__(
        self,
        sites: Sequence[Site],
        prior: PretrainedPrior,
        init_std: float,
        *,
        inputs: Mapping[str, int],
        kinds: Mapping[str, str],
        std_range: tuple[float, float] = (1e-4, 0.3),
    ) -> None:
        super().__init__(sites, prior, init_std)
        low, high = (2 * math.log(v) for v in std_range)
        if not low < 2 * math.log(init_std) < high:
            raise ValueError(f"init_std {init_std} is not inside the range {std_range}")
        self._centre, self._half = (low + high) / 2, (high - low) / 2
        self._start = self._centre + self._half * math.atanh(
            (2 * math.log(init_std) - self._centre) / self._half
        )
        self._index = {s.name: i for i, s in enumerate(self.sites)}
        self.kinds = {s.name: kinds[s.name] for s in self.sites}
        self.networks = nn.ModuleList(
            InferenceNetwork(inputs[s.name], s.name, prior.rms(s.name)) for s in self.sites
        )
        self.register_buffer("log_alpha", torch.full((len(self.sites),), 2 * math.log(init_std)))
        self._clamped: dict[str, list[int]] = {}
        self._watched = True

    @classmethod
    def make(
        cls,
        sites: Sequence[Site],
        layers: Mapping[str, VariationalLayer],
        prior: PretrainedPrior,
        options: AdaptiveOptions,
    ) -> Self:
        """See the base class."""
        widths = {name: layer.n_invariants for name, layer in layers.items()}
        blind = [name for name, width in widths.items() if width is None]
        if blind:
            raise ConversionError(
                f"posterior.family 'adaptive' reads invariant inputs, and {len(blind)} noisy modules (first: "
                f"{blind[0]}) have none that are known",
                remedy="use model.noise=scalar",
                field="model.noise",
            )
        return cls(
            sites,
            prior,
            options.init_std,
            inputs={name: width for name, width in widths.items() if width is not None},
            kinds={n: "update" if layer.rows == "atom" else "message" for n, layer in layers.items()},
            std_range=(options.min_std, options.max_std),
        )

    # ---- alpha -----------------------------------------------------------------------------
    def log_alpha_of(self, site: str, invariants: Tensor) -> tuple[Tensor, Tensor]:
        """(rows,) ln alpha, and the same before the clamp.

        The clamp is c + h tanh((u - c)/h): within the range to rounding, without kinks, so that
        forces stay continuous where it binds, and with a gradient that leads back.
        """
        u = self._start + self.networks[self._index[site]](invariants)
        return self._centre + self._half * torch.tanh((u - self._centre) / self._half), u

    def amplitude(self, layer: Any, x: Tensor) -> Tensor:
        """(rows, 1) sqrt(alpha) of every row of a layer's input."""
        log_alpha, _ = self.log_alpha_of(layer.site.name, layer.invariants(x))
        return (0.5 * log_alpha).exp().unsqueeze(1)

    def kl_per_weight(self, log_alpha: Tensor) -> Tensor:
        """1/2 [alpha/s^2 - 1 - ln(alpha/s^2)]; rms(w0), or theta, cancels."""
        v = log_alpha - 2 * math.log(self.prior.prior_scale)
        return 0.5 * (v.exp() - 1 - v)

    @torch.no_grad()
    def watch(self, name: str, log_alpha: Tensor, u: Tensor) -> None:
        """Update the running mean and count what the clamp holds back; ``u`` is before it."""
        if not len(u) or not self._watched:
            return
        i = self._index[name]
        self.log_alpha[i].lerp_(log_alpha.mean().to(self.log_alpha), MOMENTUM)
        outside = int(((u - self._centre).abs() > self._half).sum())
        seen = self._clamped.setdefault(self.kinds[name], [0, 0])
        seen[0] += outside
        seen[1] += len(u)

    def clamped(self) -> dict[str, float]:
        """Share of rows since the last call that the clamp holds back, for ``message`` and ``update``.

        Those whose ln alpha would be outside the range without it; forgets what it counted.
        """
        out = {kind: bound / seen for kind, (bound, seen) in self._clamped.items() if seen}
        self._clamped = {}
        return out

    # ---- hooks of training ---------------------------------------------------------------------
    @property
    def row_amplitude(self) -> Callable[[Any, Tensor], Tensor]:
        """sqrt(alpha)."""
        return self.amplitude

    def recorder(self, rows: Mapping[str, RowLayout]) -> Recorder:
        """See :class:`Recorder`."""
        return Recorder(self, rows)

    @contextmanager
    def unwatched(self) -> Iterator[None]:  # noqa: D102
        before, self._watched = self._watched, False
        try:
            yield
        finally:
            self._watched = before

    def epoch_report(self) -> dict[str, float]:
        """``clamped_message`` and ``clamped_update``: :meth:`clamped`."""
        return {f"clamped_{kind}": share for kind, share in self.clamped().items()}

    def epoch_counts(self) -> dict[str, Any]:  # noqa: D102
        return {kind: list(counts) for kind, counts in self._clamped.items()}

    def set_epoch_counts(self, counts: Mapping[str, Any]) -> None:  # noqa: D102
        self._clamped = {kind: list(values) for kind, values in counts.items()}

    def describe_epoch(self, report: Mapping[str, float]) -> tuple[dict[str, Any], list[str]]:
        """Shares by kind of block, and a sentence where the clamp binds."""
        shares = {key.removeprefix("clamped_"): share for key, share in report.items()}
        return {"clamped": shares}, [
            f"the std of {kind} blocks meets its clamp on {100 * share:.0f} % of the rows: "
            "see posterior.min_std and posterior.max_std"
            for kind, share in shares.items()
            if share > CLAMP_SHARE
        ]

    # ---- the common interface ----------------------------------------------------------------
    @property
    def latent_numel(self) -> int:  # noqa: D102
        return sum(s.numel for s in self.sites)

    def sample(self, latent: Tensor) -> dict[str, Tensor]:
        """Perturbations of amplitude 1; the layer multiplies each row's part by sqrt(alpha)."""
        parts = latent.split([s.numel for s in self.sites], dim=1)
        return {
            s.name: eps.reshape(-1, *s.shape) * self.prior.unit(s.name)
            for s, eps in zip(self.sites, parts, strict=True)
        }

    def row_variances(self) -> dict[str, Tensor]:
        """At amplitude 1, like :meth:`sample`."""
        return {s.name: self.prior.unit(s.name).square() for s in self.sites}

    def linear_variance(self, gradients: dict[str, Tensor]) -> Tensor:
        """Gradients by weights do not determine it: the variance has a factor in every row.

        Raises:
            BlipError: always; error bars come from draws.
        """
        raise BlipError(
            "the spread of the 'adaptive' posterior depends on the input: it has no std from one pass",
            remedy="predict with draws",
        )

    def kl(self) -> Tensor:
        """Zero: the KL of the spread belongs to each structure (:class:`Recorder`)."""
        return torch.zeros(())

    def std(self) -> dict[str, Tensor]:
        """At the running geometric mean of alpha over rows."""
        typical = (0.5 * self.log_alpha).exp()
        return {s.name: typical[i] * self.prior.unit(s.name) for i, s in enumerate(self.sites)}

    def relative_std(self) -> Tensor:
        """Geometric mean over weights of the typical std over the prior's."""
        if not self.sites:
            return torch.zeros(())
        sizes = self.log_alpha.new_tensor([s.numel for s in self.sites])
        mean = (sizes * self.log_alpha).sum() / sizes.sum()
        return (0.5 * mean).double().exp() / self.prior.prior_scale


class Recorder:
    """Amplitudes of one evaluation in training, and what they add to the loss.

    Args:
        posterior: gives the amplitudes; its running mean and its count of clamped rows are updated.
        rows: layout of every kind of row in the batch.
    """

    def __init__(self, posterior: AdaptivePosterior, rows: Mapping[str, RowLayout]) -> None:
        self.posterior, self.rows = posterior, rows
        # a tied weight meets rows in several places: its mean is over all of them
        self._sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """(rows, 1) sqrt(alpha) of every row of a layer's input."""
        name, rows = layer.site.name, self.rows[layer.rows]
        log_alpha, u = self.posterior.log_alpha_of(name, layer.invariants(x))
        kl = rows.sum(self.posterior.kl_per_weight(log_alpha).double())
        counts = torch.tensor(rows.counts, dtype=torch.float64, device=x.device)
        if name in self._sums:
            _, before, rows_before = self._sums[name]
            kl, counts = kl + before, counts + rows_before
        self._sums[name] = (layer.site.numel, kl, counts)
        self.posterior.watch(name, log_alpha.detach(), u.detach())
        return (0.5 * log_alpha).exp().unsqueeze(1)

    def kl(self) -> Tensor:
        """(B,) KL_n of every structure, nats, float64; a layer without rows adds nothing."""
        parts = [n * kl / counts.clamp_min(1) for n, kl, counts in self._sums.values()]
        return torch.stack(parts).sum(dim=0)
