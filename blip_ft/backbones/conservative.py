"""What conservative backbones share: forces and stress as gradients of one energy.

A conservative adapter says how to compute energies from differentiable leaves (edge vectors, or
positions and a strain), and how to turn the gradients of the summed energy with respect to these
leaves into forces and stress. :class:`ConservativeBackbone` does the rest: it decides which
graphs to keep and honours the caller's grad mode.

The two steps are separate methods so that gradients with respect to weights can be had from the
*same* backward call as the forces::

    evaluation = backbone.energy_of(batch)
    grads = torch.autograd.grad(evaluation.energy.sum(), (*evaluation.leaves, *weights))
    forces, stress = backbone.assemble(batch, grads[: len(evaluation.leaves)])
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from blip_ft.backbones.protocol import Backbone, Batch, Prediction


@dataclass
class Evaluation:
    """Energies of a batch and the leaves that forces are gradients with respect to.

    Attributes:
        node_energy: (n,) eV, or ``None`` where the energy is no sum over atoms.
        energy: (B,) eV.
        leaves: tensors that require grad; the adapter's ``assemble`` knows their meaning.
        node_features: (n, f) invariant features of the atoms, or ``None``.
    """

    node_energy: Tensor | None
    energy: Tensor
    leaves: tuple[Tensor, ...]
    node_features: Tensor | None = None


class ConservativeBackbone(Backbone):
    """A backbone whose forces and stress are exact derivatives of its energy."""

    @abstractmethod
    def energy_of(self, batch: Batch, *, leaves: bool = True) -> Evaluation:
        """Energies of a batch; with ``leaves`` its geometry is made of leaves that require grad."""

    @abstractmethod
    def assemble(self, batch: Batch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Forces (n, 3) in eV/Å and stress (B, 6) in eV/Å^3 from the gradients of the summed energy
        with respect to ``Evaluation.leaves``; stress is NaN for structures that are not periodic in
        all directions.
        """

    def forward(
        self, batch: Batch, *, forces: bool = True, stress: bool = True, create_graph: bool = False
    ) -> Prediction:
        """Evaluate a batch; see :meth:`blip_ft.backbones.protocol.Backbone.forward`.

        Forces need autograd, so it is switched on inside even if the caller has switched it off;
        everything returned is then detached. The module's train or eval mode plays no part.

        Raises:
            RuntimeError: forces or stress were asked for under ``torch.inference_mode``.
        """
        enabled = torch.is_grad_enabled()
        wanted = forces or stress
        if wanted and torch.is_inference_mode_enabled():
            raise RuntimeError("forces need autograd: use torch.no_grad (Trainer(inference_mode=False))")
        force, virial = None, None
        with torch.set_grad_enabled(enabled or wanted):
            result = self.energy_of(batch, leaves=wanted)
            if wanted:
                grads = gradients(
                    result.energy,
                    result.leaves,
                    create_graph=create_graph and enabled,
                    retain_graph=enabled,
                )
                force, virial = self.assemble(batch, grads)
        prediction = Prediction(
            energy=result.energy,
            forces=force if forces else None,
            stress=virial if stress else None,
            node_energy=result.node_energy,
            node_features=result.node_features,
        )
        return prediction if enabled else _detached(prediction)


def gradients(
    energy: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of ``energy.sum()`` with respect to ``leaves``; zeros where it does not depend on them.

    An isolated atom has an energy but no edges, so with frozen weights nothing requires grad.
    """
    if not energy.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        energy.sum(),
        tuple(leaves),
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


_GEOMETRY = ContextVar("geometry", default=True)


@contextmanager
def weights_only() -> Iterator[None]:
    """Within it gradients of forces are wanted with respect to weights alone.

    torch leaves out what leads to no wanted input, but cannot look into functions with derivatives of their own:
    they ask :func:`geometry_is_wanted`. Graphs may be made inside or outside; only calls of the engine that make no
    graph themselves are meant.
    """
    token = _GEOMETRY.set(False)
    try:
        yield
    finally:
        _GEOMETRY.reset(token)


def geometry_is_wanted() -> bool:
    """Whether a last derivative with respect to positions may be of use; see :func:`weights_only`."""
    return _GEOMETRY.get()


def sum_rows(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Sum the rows of ``values`` (m, ...) into ``size`` owners, (size, ...)."""
    return values.new_zeros((size, *values.shape[1:])).index_add(0, owner, values)


def _detached(prediction: Prediction) -> Prediction:
    """The same numbers without a graph."""
    values = {name: value.detach() for name, value in vars(prediction).items() if value is not None}
    return Prediction(**values)
