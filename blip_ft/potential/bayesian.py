"""A backbone with a posterior over its weights and energies on the user's reference.

:class:`BayesianPotential` is what is trained, saved and predicted with. It owns

- the converted backbone, the prior around its pretrained weights and the posterior,
- ``references``: one energy per element (eV), added in float64 outside the network, as DFT totals
  of hundreds of eV per atom would eat the digits of a float32 sum,
- ``n_draws`` fixed posterior draws, numbered and reproducible,
- the calibration of its error bars and the distance from its training atoms, once fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from blip_ft.backbones.parts import evaluate_parts
from blip_ft.backbones.parts_in_turn import evaluate_in_turn
from blip_ft.backbones.protocol import Backbone, Batch, Prediction
from blip_ft.backbones.rows import rows_of
from blip_ft.config import ModelConfig
from blip_ft.data.split.reference_sets import ReferenceSets
from blip_ft.errors import BlipError
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.model import VariationalModel
from blip_ft.potential.calibration import Calibration
from blip_ft.potential.distance import FeatureDistance
from blip_ft.potential.levels import Levels
from blip_ft.system.side_by_side import width
from blip_ft.variational.convert import convert
from blip_ft.variational.lora import LowRank
from blip_ft.variational.noise import OFF, Noise

MAX_ATOMIC_NUMBER = 119


class BayesianPotential(VariationalModel):
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
        backbone.arrange()
        converted = convert(
            backbone,
            train="none" if model.mean == "frozen" else model.train,
            noise=model.noise,
            low_rank=LowRank(model.lora.rank, model.lora.alpha) if model.mean == "lora" else None,
        )
        self.vary(converted, posterior, seed=seed, n_draws=n_draws)
        self.references: dict[int, float] = {}
        #: other sets of energies, relative to those references; None where there is one set
        self.reference_sets: ReferenceSets | None = None
        self.calibration: Calibration | None = None
        #: error bars and scores of the calibration frames, which simulations are compared with
        self.levels: Levels | None = None
        #: where the training atoms are in feature space; None before the end of a fit
        self.ood: FeatureDistance | None = None
        #: what every fit of a closed form has chosen, and what a clamp has held back, for the receipt
        self.fit_reports: list[dict[str, Any]] = []

    # ---- energies ------------------------------------------------------------------------
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
    @contextmanager
    def perturbed(self, noise: Noise, batch: Batch) -> Iterator[None]:
        """Perturb the weights while a batch is evaluated.

        Raises:
            ValueError: the noise is keyed by structure, but the batch has no keys.
        """
        if noise.keyed and len(batch.keys) != batch.n_structures:
            raise ValueError(f"noise of mode '{noise.mode}' is keyed by structure: set batch.keys")
        with self.perturbed_by(noise, batch.keys, lambda: rows_of(batch)):
            yield

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
