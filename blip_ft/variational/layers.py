"""The variational layers, and which of them is the form of a vendor's module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.e3nn_layers import (
    VariationalIrrepsLinear,
    VariationalRadialLayer,
    VariationalTensorProduct,
)
from blip_ft.variational.noise import RowLayout, grouped_matmul, grouped_outer, shared_matmul
from blip_ft.variational.sites import Block

__all__ = [
    "VariationalIrrepsLinear",
    "VariationalLayer",
    "VariationalLinear",
    "VariationalRadialLayer",
    "VariationalTensorProduct",
    "layer_type",
]


class VariationalLinear(VariationalLayer):
    """``torch.nn.Linear``: weight (out, in)."""

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix."""
        return (Block(0, tuple(base.weight.shape), output_axis=0),)

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return linear(x, weight, self.bias)

    def sampled(self, x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        return grouped_matmul(x, weight.transpose(1, 2), rows)

    def around(self, x: Tensor, mean: Tensor, noise: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        out = shared_matmul(x, mean.T, noise.transpose(1, 2), rows)
        return out if self.bias is None else out + self.bias

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        return grouped_outer(grad, x, rows)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:  # noqa: D102
        return x.square() @ variance.T


def layer_type(module: nn.Module) -> type[VariationalLayer] | str:
    """The variational form of a vendor's module, or the reason why there is none.

    e3nn is recognised by name, so that this package never imports it: its versions 0.4.4 and
    0.5+ cannot share a process, and both have these classes.
    """
    if type(module) is nn.Linear:
        return VariationalLinear
    where, name = type(module).__module__, type(module).__name__
    if where.startswith("e3nn.") and name == "Linear":
        base: Any = module
        if not (base.internal_weights and base.shared_weights) or base.weight.dim() != 1:
            return "e3nn Linear without a weight of its own"
        return VariationalIrrepsLinear if base.weight_numel else "e3nn Linear without paths"
    if where.startswith("e3nn.") and name == "FullyConnectedTensorProduct":
        product: Any = module
        if not (product.internal_weights and product.shared_weights) or not product.weight_numel:
            return "e3nn tensor product without a weight of its own"
        return VariationalTensorProduct
    if where.startswith("e3nn.") and name == "_Layer":
        return VariationalRadialLayer
    return f"no variational form for {name}"
