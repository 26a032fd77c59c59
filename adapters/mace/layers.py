"""The variational form of MACE's symmetric contraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip_ft.variational.layers import VariationalLayer
from blip_ft.variational.noise import RowLayout
from blip_ft.variational.sites import Block


def contract(base: Any, weights: Sequence[Tensor], x: Tensor, elements: Tensor) -> Tensor:
    """``Contraction.forward``, element by element.

    The vendor's sum runs over the paths of every atom; here they are summed once for each element, which leaves a small
    matrix product for each of its atoms.

    Args:
        base: the vendor's module.
        weights: (elements, paths, channels) of every correlation order, the highest first.
        x: (atoms, channels, components) features.
        elements: (atoms, elements) which one, as ones and zeros.

    Returns:
        (atoms, channels * components of the output).
    """
    index = elements.argmax(dim=1)
    counts = torch.bincount(index, minlength=elements.shape[1]).tolist()
    order = torch.argsort(index, stable=True)
    parts = x.index_select(0, order).split(counts)
    outs = [_of_element(base, [w[e] for w in weights], part) for e, part in enumerate(parts) if len(part)]
    if not outs:
        return x.new_zeros(0, x.shape[1] * _components(base))
    return torch.cat(outs).index_select(0, torch.argsort(order))


def _of_element(base: Any, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """The same for atoms of one element, whose weights are (paths, channels)."""
    order, last = base.correlation, x.shape[2]
    x = x.transpose(0, 1)  # (channels, atoms, components)
    n_channels, n_atoms, _ = x.shape
    highest, *lower = [
        (w.T @ base.U_tensors(order - below).flatten(0, -2).T).view(n_channels, -1, last)
        for below, w in enumerate(weights)
    ]
    out = torch.bmm(
        x, highest.transpose(1, 2)
    )  # over the components of all but one factor, and of the output
    for coefficients in lower:
        total = (out + coefficients.view(n_channels, 1, -1)).view(n_channels, n_atoms, -1, last)
        # a batch of products with vectors has outer products as derivatives, which BLAS does six times slower
        out = (total * x[:, :, None]).sum(dim=3)
    return out.transpose(0, 1).flatten(1)


def _components(base: Any) -> int:
    """2l+1 of the output."""
    u = base.U_tensors(base.correlation)
    return int(u.shape[0]) if u.dim() == base.correlation + 2 else 1


def forward(base: Any, x: Tensor, y: Tensor) -> Tensor:
    """What stands in for the ``forward`` of a contraction that is not converted."""
    return contract(base, (base.weights_max, *base.weights), x, y)


class VariationalContraction(VariationalLayer):
    """``mace.modules.symmetric_contraction.Contraction``: products of node features of each order.

    Weights (elements, paths, channels) of every correlation order, the highest first as the vendor
    evaluates them; together they are one flat weight. The output is linear in it, and it is shared by
    the components of the output's irrep, so one sample per structure or per draw is equivariant and
    exact. Paths that vanish by symmetry have no weight.
    """

    @staticmethod
    def parameter(base: Any) -> nn.Parameter:
        """The weight of the highest order."""
        weight: nn.Parameter = base.weights_max
        return weight

    @staticmethod
    def parameters_of(base: Any) -> tuple[nn.Parameter, ...]:
        """The weights of all orders that do not vanish, the highest first."""
        weights = (base.weights_max, *base.weights)
        return tuple(w for w in weights if type(w).__name__ != "EmptyParam")

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix (paths, channels) per order and element."""
        out, start = [], 0
        for weight in VariationalContraction.parameters_of(base):
            n_elements, n_paths, n_channels = weight.shape
            for _ in range(n_elements):
                out.append(Block(start, (n_paths, n_channels), output_axis=1, scalar=False))
                start += out[-1].numel
        return tuple(out)

    def pack(self, *inputs: Tensor) -> Tensor:
        """Node features (rows, channels, components) and elements (rows, elements), side by side."""
        x, y = inputs
        return torch.cat((x.flatten(1), y), dim=1)

    def _unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        base: Any = self.base
        width = base.num_features * base.coupling_irreps.dim
        x = packed[:, :width].reshape(len(packed), base.num_features, base.coupling_irreps.dim)
        return x.contiguous(), packed[:, width:].contiguous()

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """The vendor's sum over correlation orders with these weights."""
        base: Any = self.base
        features, elements = self._unpack(x)
        varied = iter(self.split(weight))
        stored = (base.weights_max, *base.weights)
        weights = [w if type(w).__name__ == "EmptyParam" else next(varied) for w in stored]
        return contract(base, weights, features, elements)

    def sampled(self, x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:
        """Structure by structure: intermediate products with all weights at once would not fit."""
        return self.by_structure(x, weight, rows)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """None: paths mix features of all l (``Block.scalar`` is false)."""
        del variance
        base: Any = self.base
        return x.new_zeros(len(x), base.num_features * _components(base))

    def channels(self) -> None:
        """None: every path has its own products of channels."""

    @property
    def n_invariants(self) -> int:
        """Channels times irreps, and the elements."""
        base: Any = self.base
        return int(base.num_features * len(base.coupling_irreps) + base.weights_max.shape[0])

    def invariants(self, x: Tensor) -> Tensor:
        """Of every channel the even scalars and the mean squares of other irreps; and the elements."""
        base: Any = self.base
        features, elements = self._unpack(x)
        parts = []
        for (_, ir), part in zip(base.coupling_irreps, base.coupling_irreps.slices(), strict=True):
            values = features[:, :, part]
            parts.append((values if str(ir) == "0e" else values.square()).mean(dim=2))
        return torch.cat([*parts, elements], dim=1)
