"""A torch model whose linear layers are variational, with a posterior over their weights.

What a potential is beyond a model of atoms is :mod:`blip_ft.potential`; here is what any model has: means that are
trained, noise that is keyed, fixed draws, the KL from the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from blip_ft.errors import BlipError
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.build import make_posterior, make_prior
from blip_ft.variational.convert import Converted
from blip_ft.variational.drawn import DrawnWeights, SamplesAhead
from blip_ft.variational.noise import Noise, RowLayout, keyed_row_normal, keyed_signs, numbered

_DRAWING: ContextVar[tuple[VariationalModel, int, float] | None] = ContextVar("drawing", default=None)


@contextmanager
def drawing(model: VariationalModel, n_draws: int, amplitude: float | None = None) -> Iterator[None]:
    """With ``n_draws`` draws, on whose number each of them depends, and perhaps another width; in this thread alone."""
    token = _DRAWING.set((model, n_draws, model.amplitude if amplitude is None else amplitude))
    try:
        yield
    finally:
        _DRAWING.reset(token)


class VariationalModel(nn.Module):
    """Base of models with variational layers; a subclass calls :meth:`vary` and evaluates inside :meth:`perturbed_by`.

    Attributes:
        converted: what was converted.
        prior: around the weights before training.
        posterior: over the noisy weights.
        seed: of all noise.
        n_draws: fixed draws.
        amplitude: width of all draws, in training and after, in units of the posterior's; stds are divided by it.
    """

    converted: Converted

    def vary(self, converted: Converted, options: FamilyOptions, *, seed: int, n_draws: int) -> None:
        """Put a prior and a posterior over the weights of a converted model.

        Raises:
            ConversionError: the noise mode does not suit the family or the noisy weights.
        """
        self.converted = converted
        self.seed, self.n_draws = seed, n_draws
        self.prior = make_prior(converted, options)
        self.posterior = make_posterior(converted, self.prior, options)
        self.amplitude = 1.0
        self._drawn = DrawnWeights()
        self._ahead = SamplesAhead()
        self._draws: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    # ---- parts ---------------------------------------------------------------------------
    @property
    def mean_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the mean: differences from w0 or their factors, and ``rest``."""
        return [*self.converted.mean_parameters, *self.converted.rest.values()]

    def kl(self) -> Tensor:
        """KL(q || p) of mean and spread, nats, a scalar."""
        mean = self.prior.kl_mean(self.converted.deltas)
        return mean + self.posterior.kl().to(mean) + self.prior.kl_scale().to(mean)

    # ---- noise ---------------------------------------------------------------------------
    @property
    def structure_kl(self) -> Tensor | None:
        """(B,) KL of each structure's own weights in this thread's last call with training noise, nats; ``None`` for
        families whose weights are shared by all structures.
        """
        return self.converted.noise.structure_kl

    @property
    def drawing(self) -> tuple[int, float]:
        """Number and width of the draws: ``n_draws`` and ``amplitude``, or what :func:`drawing` has put in
        their place.
        """
        other = _DRAWING.get()
        return (self.n_draws, self.amplitude) if other is None or other[0] is not self else other[1:]

    @contextmanager
    def perturbed_by(
        self, noise: Noise, keys: Sequence[int], rows: Callable[[], Mapping[str, RowLayout]]
    ) -> Iterator[None]:
        """Perturb the weights while a batch is evaluated.

        Args:
            noise: which perturbation.
            keys: of the batch's structures, in noise that is keyed by them.
            rows: gives the layout of every kind of row of the batch.
        """
        state = self.converted.noise
        state.structure_kl = None
        if noise.mode == "off" or not self.posterior.ready:
            with state.perturbed():
                yield
            return
        layouts = {} if noise.mode == "draw" else rows()
        recorder = self.posterior.recorder(layouts) if noise.mode != "draw" else None
        with state.perturbed(noise.mode, self._weights(noise, keys), layouts):
            if noise.mode == "local":
                state.variances = self.posterior.row_variances()
                state.row_normal = keyed_row_normal(self.seed, noise.epoch, keys, noise.sample)
            elif noise.mode == "flipout":
                state.signs = keyed_signs(self.seed, noise.epoch, keys, noise.sample)
            state.row_amplitude = recorder or self.posterior.row_amplitude
            yield
            if recorder is not None:
                state.structure_kl = recorder.kl()

    def _weights(self, noise: Noise, keys: Sequence[int]) -> dict[str, Tensor]:
        """Perturbation of each site's weights; none in ``local``, whose noise is that of rows."""
        if noise.mode == "local":
            return {}
        if noise.mode == "draw":
            assert noise.draw is None or isinstance(noise.draw, int)
            return self._weights_of(noise.draw or 0)
        if isinstance(noise.draw, Sequence):
            drawn = {k: self._weights_of(k) for k in dict.fromkeys(noise.draw)}
            return {s.name: torch.stack([drawn[k][s.name] for k in noise.draw]) for s in self.posterior.sites}
        if noise.latent is not None:
            return self._perturbation(noise.latent)
        if noise.mode == "structure":
            return self._structure_weights(keys, noise.epoch, noise.sample)
        of_step = [("flipout", self.seed, noise.step, *numbered(noise.sample))]
        return self._perturbation(self.posterior.latent(of_step, self.dtype))

    def expect(self, structures: Sequence[int]) -> None:
        """Say which structures the next batches of training bring, by their keys: noise is then made for many
        at once.
        """
        self._ahead.expect(() if self.posterior.factorised else structures)

    def _perturbation(self, latent: Tensor) -> dict[str, Tensor]:
        """{site name: (B, *site.shape)} of latent numbers, at the width of the draws."""
        return self.posterior.sample(self.drawing[1] * latent.to(self.device, self.dtype))

    def _structure_weights(self, structures: Sequence[int], epoch: int, sample: int) -> dict[str, Tensor]:
        """Training noise of each structure, with that of others of the epoch where these are expected."""
        dtype = self.dtype

        def make(some: Sequence[int]) -> dict[str, Tensor]:
            keys = [("structure", self.seed, epoch, key, *numbered(sample)) for key in some]
            return self._perturbation(self.posterior.latent(keys, dtype))

        expected = self._ahead.get(
            structures,
            (epoch, sample),
            make,
            size=self.posterior.n_weights * dtype.itemsize,
            tensors=self._made_of,
            values=(self.drawing[1], dtype, self.device),
        )
        return make(structures) if expected is None else expected

    def _made_of(self) -> list[Tensor]:
        """All tensors that a sample of the posterior depends on."""
        parts = (self.posterior, self.prior)
        return [t for part in parts for t in (*part.parameters(), *part.buffers())]

    def _weights_of(self, draw: int) -> dict[str, Tensor]:
        """{site name: (*site.shape)} perturbation of a fixed draw, which families of correlated weights make once."""
        n_draws, amplitude = self.drawing
        latents = self.draw_latents(n_draws)

        def make() -> dict[str, Tensor]:
            latent = amplitude * latents[[draw]].to(self.device, self.dtype)
            return {name: w[0] for name, w in self.posterior.sample(latent).items()}

        if self.posterior.factorised:  # one product per weight, and parameters that may want gradients
            return make()
        return self._drawn.get(
            draw,
            make,
            tensors=[latents, *self._made_of()],
            values=(amplitude, self.dtype, self.device),
        )

    def draw_latents(self, n: int) -> Tensor:
        """(n, latent_numel) latent numbers of the fixed draws, which sum to zero.

        Families with ``paired`` draws: z_1, -z_1, z_2, -z_2, ..., each z independent and standard normal.
        All others: centred.

        Each row is exactly standard normal, but the rows sum to zero: they are independent
        normals minus their mean, times sqrt(n/(n-1)). As samples are linear in the latent
        numbers, the mean over the n draws of any output that is linear in the weights is then the
        output of the mean weights, without the 1/sqrt(n) sampling noise; the population variance
        over the n draws (divisor n) is unbiased.

        Raises:
            BlipError: fewer than two draws, which have no spread; an odd number where they come in pairs.
        """
        if n < 2:
            raise BlipError(
                f"{n} posterior draw has no spread",
                remedy="use two draws or more, or 0 for the mean weights without uncertainties",
                field="n_draws",
            )
        paired = self.posterior.paired
        if paired and n % 2:
            raise BlipError(
                f"draws of '{self.posterior.family}' come in pairs, and {n} is odd",
                remedy=f"use {n - 1} or {n + 1}",
                field="n_draws",
            )
        wanted = (n, self.seed, self.dtype)
        kept = self._draws  # one object, as another thread may put another in its place
        if kept is not None and kept[0] == wanted:
            return kept[1]
        keys = [("draw", self.seed, k) for k in range(n // 2 if paired else n)]
        latent = self.posterior.latent(keys, self.dtype)
        if paired:
            latent = torch.stack([latent, -latent], dim=1).flatten(0, 1)
        else:
            latent = (latent - latent.mean(dim=0)) * math.sqrt(n / (n - 1))
        self._draws = wanted, latent
        return latent
