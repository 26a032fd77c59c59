"""The forward pass of a SevenNet model on pairs of neighbours, with its own modules' weights.

The vendor's modules stay what and where they are, so that its calculator, files and names know nothing of this.
Convolutions, linear maps and gates are evaluated here on features in inner order
(:mod:`~blip_ft.adapters.shared.convolution`); all else is the vendor's own call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from blip_ft.adapters.shared.convolution import Convolution, Pairs, inner_order, outer_order
from blip_ft.variational.e3nn_layers import VariationalInnerLinear, inner_linear

#: where the vendor keeps a layer's input for its output
_KEPT = "self_cont_tmp"


class Network:
    """How to evaluate each module of one architecture; holds no weights.

    Args:
        model: the vendor's model, not yet converted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.convolutions: dict[str, Convolution] = {}
        self.gates: dict[str, _Gate] = {}
        self.orders: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in model.named_children():
            any_module: Any = module
            match type(module).__name__:
                case "IrrepsConvolution":
                    self.convolutions[name] = Convolution(any_module.convolution)
                case "EquivariantGate":
                    self.gates[name] = _Gate(any_module.gate)
                case "SelfConnectionIntro":
                    product = any_module.fc_tensor_product
                    self.orders[name] = outer_order(product.irreps_in1), inner_order(product.irreps_out)

    def __call__(self, name: str, module: Any, data: dict[str, Any], pairs: Pairs) -> dict[str, Any]:
        """One module of the vendor's sequence.

        Args:
            name: of the module.
            module: converted or not.
            data: of the vendor's keys, features in inner order; changed.
            pairs: of the batch.
        """
        match type(module).__name__:
            case "IrrepsLinear":
                if module.num_modalities > 1:
                    data = module._patch_modal_to_data(data)  # scalars, behind all others
                data[module.key_output] = linear(module.linear, data[module.key_input])
            case "SelfConnectionLinearIntro":
                data[_KEPT] = linear(module.linear, data[module.key_x])
            case "SelfConnectionIntro":
                outer, inner = (order.to(data[module.key_x].device) for order in self.orders[name])
                product = module.fc_tensor_product(data[module.key_x][:, outer], data[module.key_operand])
                data[_KEPT] = product[:, inner]
            case "IrrepsConvolution":
                data[module.key_x] = self._convolve(self.convolutions[name], module, data, pairs)
            case "EquivariantGate":
                data[module.key_x] = self.gates[name](module.gate, data[module.key_x])
            case _:
                data = module(data)
        return data

    @staticmethod
    def _convolve(convolution: Convolution, module: Any, data: dict[str, Any], pairs: Pairs) -> Tensor:
        kept = data.setdefault("couplings", {})
        if convolution.key not in kept:
            kept[convolution.key] = convolution.couplings(data[module.key_filter])
        weight = module.weight_nn(data[module.key_weight_input])
        summed = convolution(weight, data[module.key_x], kept[convolution.key], pairs)
        out: Tensor = summed / module.denominator
        return out


def linear(module: Any, x: Tensor) -> Tensor:
    """``e3nn.o3.Linear`` in inner order, converted or not."""
    if isinstance(module, VariationalInnerLinear):
        out: Tensor = module(x)
        return out
    return inner_linear(module, x, module.weight)


class _Gate:
    """``e3nn.nn.Gate`` in inner order; it holds no weights."""

    def __init__(self, gate: Any) -> None:
        self.outer, self.inner = outer_order(gate.irreps_in), inner_order(gate.irreps_out)
        columns = torch.arange(gate.irreps_in.dim, dtype=torch.float64)[None]
        in_order = torch.equal(torch.cat(gate.sc(columns), dim=1), columns)
        acts = [act for act in (*gate.act_scalars.acts, *gate.act_gates.acts) if act is not None]
        alike = len({(act.f, act.cst) for act in acts}) == 1
        #: whether scalars and gates come first, and all have one activation
        self.simple = in_order and alike and gate.irreps_scalars.lmax == 0
        self.n_scalars, self.n_gates = gate.irreps_scalars.dim, gate.irreps_gates.dim
        self.gated = [(mul, ir.dim) for mul, ir in gate.irreps_gated]

    def __call__(self, gate: Any, x: Tensor) -> Tensor:
        """(rows, dim_in) -> (rows, dim_out)."""
        if not self.simple:
            out: Tensor = gate(x[:, self.outer.to(x.device)])[:, self.inner.to(x.device)]
            return out
        activation = next(act for act in gate.act_scalars.acts if act is not None)
        sizes = [mul * dim for mul, dim in self.gated]
        head, *tails = x.split([self.n_scalars + self.n_gates, *sizes], dim=1)
        scalars, *gates = activation(head).split([self.n_scalars, *(mul for mul, _ in self.gated)], dim=1)
        parts = [
            (tail.reshape(-1, dim, mul) * g[:, None]).reshape(-1, dim * mul)
            for (mul, dim), tail, g in zip(self.gated, tails, gates, strict=True)
        ]
        return torch.cat((scalars, *parts), dim=1) if parts else scalars
