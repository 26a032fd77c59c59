"""The variational form of MACE's symmetric contraction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blip_ft.variational.layers import VariationalLayer
from blip_ft.variational.noise import Rows
from blip_ft.variational.sites import Block


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
        """The vendor's sum over correlation orders (``Contraction.forward``) with these weights."""
        base: Any = self.base
        features, elements = self._unpack(x)
        varied = iter(self.split(weight))
        highest, *lower = [
            w if type(w).__name__ == "EmptyParam" else next(varied) for w in (base.weights_max, *base.weights)
        ]
        order = base.correlation
        out: Tensor = base.graph_opt_main(base.U_tensors(order), highest, features, elements)
        steps = zip(lower, base.contractions_weighting, base.contractions_features, strict=True)
        for below, (w, weighting, contract) in enumerate(steps, start=1):
            out = contract(weighting(base.U_tensors(order - below), w, elements) + out, features)
        return out.view(out.shape[0], -1)

    def sampled(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        """Structure by structure: intermediate products with all weights at once would not fit."""
        return self.by_structure(x, weight, rows)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """None: paths mix features of all l (``Block.scalar`` is false)."""
        del variance
        base: Any = self.base
        return x.new_zeros(len(x), base.num_features * self._components())

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

    def _components(self) -> int:
        """2l+1 of the output."""
        base: Any = self.base
        u = base.U_tensors(base.correlation)
        return int(u.shape[0]) if u.dim() == base.correlation + 2 else 1
