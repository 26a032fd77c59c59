"""Variational forms of fairchem's linear layers (eSCN-MD: UMA and eSEN).

==================  =====================  ===========================================================
vendor's module     weight                 rows
==================  =====================  ===========================================================
``nn.Linear``       (out, in)              (rows, ..., in): all entries of a row share the weight
``SO3_Linear``      (lmax + 1, out, in)    (rows, (lmax + 1)^2, in): one matrix per degree l, shared by
                                           its 2l + 1 orders
``MOLE``            Delta, (out, in)       as ``nn.Linear``; see :class:`VariationalMixture`
==================  =====================  ===========================================================

Noise on these weights leaves the network exactly equivariant: all of them act on channels and are
shared by the components that mix under rotation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from blip_ft.variational.layers import VariationalLayer, VariationalLinear
from blip_ft.variational.noise import RowLayout, shared_matmul
from blip_ft.variational.sites import Block


class VariationalChannels(VariationalLinear):
    """``nn.Linear`` on rows that hold several vectors, (rows, ..., in) -> (rows, ..., out)."""

    @property
    def in_features(self) -> int:
        """Channels of the input; the vendor's convolutions look at it."""
        return int(self.base.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Channels of the output."""
        return int(self.base.out_features)  # type: ignore[arg-type]

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """See :class:`~blip_ft.variational.base.VariationalLayer`."""
        return x.square() @ variance.T

    def channels(self) -> tuple[Tensor, Tensor] | None:
        """Every entry of a vector is a channel; components that mix under rotation share the signs."""
        return _channels(*self.site.blocks[0].shape)

    def invariants(self, x: Tensor) -> Tensor:
        """The entries of a scalar row; mean squares over the components of others."""
        one_scalar = self.site.blocks[0].scalar and x.dim() == 3 and x.shape[1] == 1
        return x[:, 0] if one_scalar else super().invariants(x)


class VariationalOrders(VariationalChannels):
    """The same where the vectors of a row are components that mix under rotation (orders +m and -m of
    an edge, points of a sphere): independent noise per row is not allowed.
    """

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix, not scalar."""
        return (Block(0, tuple(base.weight.shape), output_axis=0, scalar=False),)


class VariationalSO3Linear(VariationalLayer):
    """``SO3_Linear``: one matrix (out, in) per degree l, bias on l = 0."""

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix per degree; l = 0 is scalar."""
        degrees, *shape = base.weight.shape
        size = shape[0] * shape[1]
        return tuple(Block(l * size, (shape[0], shape[1]), 0, scalar=l == 0) for l in range(degrees))

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`~blip_ft.variational.base.VariationalLayer`."""
        out: Tensor = torch.func.functional_call(self.base, {"weight": weight}, (x,))
        return out

    def sampled(self, x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:
        """See :class:`~blip_ft.variational.base.VariationalLayer`."""
        padded = rows.pad(x)  # (B, width, (lmax + 1)^2, in)
        n, width, _, size = padded.shape
        parts = []
        for l in range(weight.shape[1]):
            part = padded[:, :, l * l : (l + 1) ** 2].reshape(n, width * (2 * l + 1), size)
            out = torch.bmm(part, weight[:, l].transpose(1, 2))
            parts.append(out.reshape(n, width, 2 * l + 1, -1))
        return rows.unpad(torch.cat(parts, dim=2))

    def around(self, x: Tensor, mean: Tensor, noise: Tensor, rows: RowLayout) -> Tensor:
        """The bias stands on l = 0 alone."""
        out = self.sampled(x, mean + noise, rows)
        return out if self.bias is None else torch.cat((out[:, :1] + self.bias, out[:, 1:]), dim=1)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """Scalars only: noise per component of l > 0 would not rotate with the structure."""
        scalars = x[:, :1].square() @ variance[0].T
        rest = scalars.new_zeros(x.shape[0], x.shape[1] - 1, scalars.shape[2])
        return torch.cat((scalars, rest), dim=1)

    def channels(self) -> tuple[Tensor, Tensor] | None:
        """As for other layers; all degrees share the signs."""
        return _channels(*self.site.blocks[0].shape)


class VariationalMixture(VariationalChannels):
    """``MOLE``, a mixture of linear experts: w = sum_e c_e W_e + Delta.

    The coefficients c_e depend on a structure's composition and task. The experts W_e stay frozen; the
    mean and the noise are those of Delta, one matrix for all compositions: q(Delta) = N(delta, sigma^2),
    prior N(0, s^2). The prior's scale is that of the pretrained mixed weight for coefficients averaged
    over the elements, since no composition is known when a model is converted.

    The adapter attaches two things to the vendor's ``global_mole_tensors``: ``reference()``, these
    coefficients (E,), and ``share``, numbers (E,) with sum_e c_e share_e = 1 for every composition, so
    that W_e + share_e Delta in all experts is the same mixture.
    """

    @staticmethod
    def parameter(base: Any) -> nn.Parameter:
        """The experts, (E, out, in)."""
        weights: nn.Parameter = base.weights
        return weights

    @classmethod
    def shape(cls, base: Any) -> tuple[int, ...]:
        """(out, in) of the mixed weight."""
        return tuple(base.weights.shape[1:])

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix."""
        return (Block(0, tuple(base.weights.shape[1:]), output_axis=0),)

    @property
    def pretrained(self) -> Tensor:
        """The pretrained mixed weight at the reference coefficients."""
        base: Any = self.base
        coefficients = base.global_mole_tensors.reference().to(base.weights)
        mixed: Tensor = torch.einsum("e,eoi->oi", coefficients, base.weights.detach())
        return mixed

    @property
    def weight(self) -> Tensor:
        """Delta of the mean part, the part of the mixed weight that is not the experts'."""
        state = self.noise
        if state.mode == "draw" and state.row_amplitude is None and self.site.name in state.weights:
            return self.delta + state.weights[self.site.name]
        return self.delta

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """See :class:`~blip_ft.variational.base.VariationalLayer`."""
        out: Tensor = self.base(x) + linear(x, weight)
        return out

    def around(self, x: Tensor, mean: Tensor, noise: Tensor, rows: RowLayout) -> Tensor:
        """The experts' part is the same for all structures of a composition: the vendor's, its bias included."""
        out: Tensor = self.base(x) + shared_matmul(x, mean.T, noise.transpose(1, 2), rows)
        return out

    def merge(self, perturbation: Tensor | None = None) -> None:
        """Write Delta into the experts, so that every mixture of them contains it once."""
        base: Any = self.base
        delta = self.delta if perturbation is None else self.delta + perturbation
        with torch.no_grad():
            share = base.global_mole_tensors.share.to(delta.device)
            change = share.reshape(-1, 1, 1) * delta.double()
            base.weights.copy_(base.weights.double() + change)


class VariationalMixtureOfOrders(VariationalMixture):
    """A mixture on components that mix under rotation; see :class:`VariationalOrders`."""

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix, not scalar."""
        return (Block(0, tuple(base.weights.shape[1:]), output_axis=0, scalar=False),)


def _channels(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    return torch.arange(inputs), torch.arange(outputs)


def layer_type(module: nn.Module, *, mixes: bool) -> type[VariationalLayer] | str | None:
    """The variational form of a vendor's module, the reason why there is none, or ``None`` where the
    general rules hold.

    Args:
        module: the module.
        mixes: whether the vectors of one of its input rows mix under rotation.
    """
    name = type(module).__name__
    if type(module) is nn.Linear:
        return VariationalOrders if mixes else VariationalChannels
    if not type(module).__module__.startswith("fairchem."):
        return None
    if name == "SO3_Linear":
        return VariationalSO3Linear
    if name == "MOLE":
        return VariationalMixtureOfOrders if mixes else VariationalMixture
    return None
