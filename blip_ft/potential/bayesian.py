"""A backbone with a posterior over its weights and energies on the user's reference.

:class:`BayesianPotential` is what is trained, saved and predicted with. It owns

- the converted backbone, the prior around its pretrained weights and the posterior,
- ``references``: one energy per element (eV), added in float64 outside the network, as DFT totals
  of hundreds of eV per atom would eat the digits of a float32 sum,
- ``n_draws`` fixed posterior draws, numbered and reproducible,
- the calibration of its error bars and the distance from its training atoms, once fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blip_ft.backbones.parts import evaluate_parts
from blip_ft.backbones.parts_in_turn import evaluate_in_turn
from blip_ft.backbones.protocol import Backbone, Batch, Prediction
from blip_ft.backbones.rows import rows_of
from blip_ft.config import ModelConfig
from blip_ft.data.split.reference_sets import ReferenceSets
from blip_ft.errors import BlipError
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.build import make_posterior, make_prior
from blip_ft.potential.calibration import Calibration
from blip_ft.potential.distance import FeatureDistance
from blip_ft.system.side_by_side import width
from blip_ft.variational.convert import convert
from blip_ft.variational.drawn import DrawnWeights, SamplesAhead
from blip_ft.variational.lora import LowRank
from blip_ft.variational.noise import OFF, Noise, keyed_row_normal, keyed_signs, numbered

MAX_ATOMIC_NUMBER = 119

_DRAWING: ContextVar[tuple[BayesianPotential, int, float] | None] = ContextVar("drawing", default=None)


@contextmanager
def drawing(potential: BayesianPotential, n_draws: int, amplitude: float | None = None) -> Iterator[None]:
    """With ``n_draws`` draws, on whose number each of them depends, and perhaps another width; in this thread alone."""
    token = _DRAWING.set((potential, n_draws, potential.amplitude if amplitude is None else amplitude))
    try:
        yield
    finally:
        _DRAWING.reset(token)


class BayesianPotential(nn.Module):
    """A pretrained potential with variational weights.

    Args:
        backbone: a freshly loaded backbone; converted in place.
        model: which weights are trained and which carry noise.
        posterior: family and its options (``blip_ft.config.PosteriorConfig``).
        seed: of all noise.
        n_draws: fixed draws to predict with.

    Raises:
        ConversionError: a pattern matches nothing, or the noise mode does not suit the family or
            the noisy weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: ModelConfig,
        posterior: FamilyOptions,
        *,
        seed: int = 0,
        n_draws: int = 16,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.model_config, self.posterior_config = model, posterior
        self.seed, self.n_draws = seed, n_draws
        backbone.arrange()
        self.converted = convert(
            backbone,
            train="none" if model.mean == "frozen" else model.train,
            noise=model.noise,
            low_rank=LowRank(model.lora.rank, model.lora.alpha) if model.mean == "lora" else None,
        )
        self.prior = make_prior(self.converted, posterior)
        self.posterior = make_posterior(self.converted, self.prior, posterior)
        self.references: dict[int, float] = {}
        #: other sets of energies, relative to those references; None where there is one set
        self.reference_sets: ReferenceSets | None = None
        self.calibration: Calibration | None = None
        #: where the training atoms are in feature space; None before the end of a fit
        self.ood: FeatureDistance | None = None
        #: width of all draws, in training and after, in units of the posterior's; stds are divided by it
        self.amplitude = 1.0
        #: what every fit of a closed form has chosen, and what a clamp has held back, for the receipt
        self.fit_reports: list[dict[str, Any]] = []
        self._drawn = DrawnWeights()
        self._ahead = SamplesAhead()
        self._draws: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    # ---- parts ---------------------------------------------------------------------------
    @property
    def mean_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the mean: differences from w0 or their factors, and ``rest``."""
        return [*self.converted.mean_parameters, *self.converted.rest.values()]

    def kl(self) -> Tensor:
        """KL(q || p) of mean and spread, nats, a scalar."""
        mean = self.prior.kl_mean(self.converted.deltas)
        return mean + self.posterior.kl().to(mean) + self.prior.kl_scale().to(mean)

    def use_reference_set(self, name: str) -> None:
        """Put energies onto the zero of one of the sets that the model was trained on (``data.reference_sets``).

        Raises:
            BlipError: it was trained on one set, or on none of this name.
        """
        if self.reference_sets is None:
            raise BlipError(
                f"the model has no reference set '{name}': it was trained on one set of energies",
                field="reference set",
                remedy="leave it out; data.reference_sets of a recipe makes several",
            )
        sets = self.reference_sets.relative_to(name)
        for z, energy in self.reference_sets.shifts[name].items():
            self.references[z] = self.references.get(z, 0.0) + energy
        self.reference_sets = sets

    def reference_energy(self, batch: Batch) -> Tensor:
        """(B,) sum of the per-element references of each structure, eV, float64."""
        atoms = self._atom_references(batch)
        return atoms.new_zeros(batch.n_structures).index_add(0, batch.structure, atoms)

    def _atom_references(self, batch: Batch) -> Tensor:
        """(n,) reference of each atom, eV, float64."""
        table = torch.zeros(MAX_ATOMIC_NUMBER, dtype=torch.float64, device=batch.numbers.device)
        for number, energy in self.references.items():
            table[number] = energy
        return table[batch.numbers]

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
    def perturbed(self, noise: Noise, batch: Batch) -> Iterator[None]:
        """Perturb the weights while a batch is evaluated.

        Raises:
            ValueError: the noise is keyed by structure, but the batch has no keys.
        """
        if noise.keyed and len(batch.keys) != batch.n_structures:
            raise ValueError(f"noise of mode '{noise.mode}' is keyed by structure: set batch.keys")
        state = self.converted.noise
        state.structure_kl = None
        if noise.mode == "off" or not self.posterior.ready:
            with state.perturbed():
                yield
            return
        rows = {} if noise.mode == "draw" else rows_of(batch)
        recorder = self.posterior.recorder(rows) if noise.mode != "draw" else None
        with state.perturbed(noise.mode, self._weights(noise, batch), rows):
            if noise.mode == "local":
                state.variances = self.posterior.row_variances()
                state.row_normal = keyed_row_normal(self.seed, noise.epoch, batch.keys, noise.sample)
            elif noise.mode == "flipout":
                state.signs = keyed_signs(self.seed, noise.epoch, batch.keys, noise.sample)
            state.row_amplitude = recorder or self.posterior.row_amplitude
            yield
            if recorder is not None:
                state.structure_kl = recorder.kl()

    def _weights(self, noise: Noise, batch: Batch) -> dict[str, Tensor]:
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
            return self._structure_weights(batch.keys, noise.epoch, noise.sample)
        keys = [("flipout", self.seed, noise.step, *numbered(noise.sample))]
        return self._perturbation(self.posterior.latent(keys, self.backbone.dtype))

    def expect(self, structures: Sequence[int]) -> None:
        """Say which structures the next batches of training bring, by their keys: noise is then made for many
        at once.
        """
        self._ahead.expect(() if self.posterior.factorised else structures)

    def _perturbation(self, latent: Tensor) -> dict[str, Tensor]:
        """{site name: (B, *site.shape)} of latent numbers, at the width of the draws."""
        return self.posterior.sample(self.drawing[1] * latent.to(self.backbone.device, self.backbone.dtype))

    def _structure_weights(self, structures: Sequence[int], epoch: int, sample: int) -> dict[str, Tensor]:
        """Training noise of each structure, with that of others of the epoch where these are expected."""
        dtype = self.backbone.dtype

        def make(some: Sequence[int]) -> dict[str, Tensor]:
            keys = [("structure", self.seed, epoch, key, *numbered(sample)) for key in some]
            return self._perturbation(self.posterior.latent(keys, dtype))

        expected = self._ahead.get(
            structures,
            (epoch, sample),
            make,
            size=self.posterior.n_weights * dtype.itemsize,
            tensors=self._made_of,
            values=(self.drawing[1], dtype, self.backbone.device),
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
            latent = amplitude * latents[[draw]].to(self.backbone.device, self.backbone.dtype)
            return {name: w[0] for name, w in self.posterior.sample(latent).items()}

        if self.posterior.factorised:  # one product per weight, and parameters that may want gradients
            return make()
        return self._drawn.get(
            draw,
            make,
            tensors=[latents, *self._made_of()],
            values=(amplitude, self.backbone.dtype, self.backbone.device),
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
        wanted = (n, self.seed, self.backbone.dtype)
        kept = self._draws  # one object, as another thread may put another in its place
        if kept is not None and kept[0] == wanted:
            return kept[1]
        keys = [("draw", self.seed, k) for k in range(n // 2 if paired else n)]
        latent = self.posterior.latent(keys, self.backbone.dtype)
        if paired:
            latent = torch.stack([latent, -latent], dim=1).flatten(0, 1)
        else:
            latent = (latent - latent.mean(dim=0)) * math.sqrt(n / (n - 1))
        self._draws = wanted, latent
        return latent

    # ---- evaluation ----------------------------------------------------------------------
    def forward(
        self,
        batch: Batch,
        noise: Noise = OFF,
        *,
        forces: bool = True,
        stress: bool = False,
        create_graph: bool = False,
    ) -> Prediction:
        """Evaluate a batch with the mean weights or with noise.

        Args:
            batch: from ``backbone.collate``.
            noise: none by default.
            forces: compute forces.
            stress: compute stress.
            create_graph: keep the graph, to train on forces.

        Returns:
            Energies, also those of the atoms, in float64 on the user's reference; other
            quantities as the backbone gives them (``blip_ft.backbones.protocol``).
        """

        def evaluate(batch: Batch) -> tuple[Prediction, Tensor | None]:
            with self.perturbed(noise, batch):
                out: Prediction = self.backbone(
                    batch, forces=forces, stress=stress, create_graph=create_graph
                )
            return out, self.structure_kl

        if batch.in_turn:
            out, own = evaluate_in_turn(evaluate, batch.parts, self.parameters())
            self.converted.noise.structure_kl = own
        elif self._in_parts(batch, noise):
            out, own = evaluate_parts(evaluate, batch.parts, self.parameters())
            self.converted.noise.structure_kl = own
        else:
            out, _ = evaluate(batch)
        return self.on_reference(out, batch)

    def _in_parts(self, batch: Batch, noise: Noise) -> bool:
        """Whether the parts of a batch are evaluated in its place."""
        # draws and latent numbers given one by one are numbered by the structures of the whole batch
        whole = isinstance(noise.draw, Sequence) or noise.latent is not None
        # families of another kind keep means over the rows of a step
        return len(batch.parts) > 1 and not whole and self.posterior.draws_are_weights and width("cpu") > 1

    def on_reference(self, out: Prediction, batch: Batch) -> Prediction:
        """The backbone's prediction with its energies in float64 on the user's reference."""
        out.energy = out.energy.double() + self.reference_energy(batch)
        if out.node_energy is not None:
            out.node_energy = out.node_energy.double() + self._atom_references(batch)
        return out

    def train(self, mode: bool = True) -> BayesianPotential:
        """Vendors' dropout and batch statistics stay off: noise comes from the posterior alone."""
        super().train(False)
        return self

    def to_dtype(self, dtype: Literal["float32", "float64"]) -> BayesianPotential:
        """The same potential in another precision."""
        self._draws = None
        self._drawn.clear()
        self.to(getattr(torch, dtype))
        return self
