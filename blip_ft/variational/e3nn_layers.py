"""Variational forms of e3nn's linear maps, whose weight is shared by the components of an irrep.

e3nn itself is not imported: what its modules say of their irreps and instructions is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.noise import Rows, grouped_matmul, grouped_outer
from blip_ft.variational.sites import Block


class VariationalIrrepsLinear(VariationalLayer):
    """``e3nn.o3.Linear``: one matrix (mul_in, mul_out) per path, shared by the 2l+1 components."""

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix per path."""
        out, start = [], 0
        for ins in base.instructions:
            if ins.i_in == -1 or 0 in ins.path_shape:
                continue
            scalar = str(base.irreps_in[ins.i_in].ir) == "0e"
            out.append(Block(start, tuple(ins.path_shape), output_axis=1, scalar=scalar))
            start += out[-1].numel
        return tuple(out)

    #: whether features are (component, channel) within each irrep, and not e3nn's (channel, component)
    inner: ClassVar[bool] = False

    def _paths(self) -> list[tuple[Block, Any, float]]:
        """(block, instruction, path weight) of every path."""
        base: Any = self.base
        live = [i for i in base.instructions if i.i_in != -1 and 0 not in i.path_shape]
        return [(block, i, float(i.path_weight)) for block, i in zip(self.site.blocks, live, strict=True)]

    def _split(self, irreps: Any, x: Tensor) -> list[Tensor]:
        """(rows, dim) -> for every irrep (rows, 2l + 1, channels)."""
        if not self.inner:
            return _outer_parts(irreps, x)
        parts = x.split([mul * ir.dim for mul, ir in irreps], dim=1)
        return [part.reshape(len(x), ir.dim, mul) for part, (mul, ir) in zip(parts, irreps, strict=True)]

    def _sum(self, x: Tensor, product: Callable[[Tensor, Block, float], Tensor]) -> Tensor:
        """The map whose path from (rows, 2l + 1, mul_in) to (rows, 2l + 1, mul_out) is ``product``."""
        base: Any = self.base
        parts = self._split(base.irreps_in, x)
        out: dict[int, Tensor] = {}
        for block, ins, scale in self._paths():
            v = product(parts[ins.i_in], block, scale)
            v = (v if self.inner else v.transpose(1, 2)).flatten(1)
            start = base.irreps_out.slices()[ins.i_out].start
            out[start] = out[start] + v if start in out else v
        return _join(base.irreps_out, out, x.new_zeros(len(x), 0))

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.base(x, weight)
        return out

    def sampled(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        flat = weight.reshape(len(weight), -1)

        def product(u: Tensor, block: Block, scale: float) -> Tensor:
            w = flat[:, block.start : block.start + block.numel].reshape(-1, *block.shape) * scale
            return grouped_matmul(u, w, rows)

        return self._sum(x, product)

    def combined(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        out = self.sampled(x, weight, rows)
        return out if self.bias is None else out + _biases(self.base, out)

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        base: Any = self.base
        inputs, grads = self._split(base.irreps_in, x), self._split(base.irreps_out, grad)
        parts = [
            scale * grouped_outer(inputs[ins.i_in], grads[ins.i_out], rows).flatten(1)
            for _, ins, scale in self._paths()
        ]
        return torch.cat(parts, dim=1)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """Scalar paths only: noise per component of l > 0 would not rotate with the structure."""
        out: dict[int, Tensor] = {}
        base: Any = self.base
        flat, into, outof = variance.reshape(-1), base.irreps_in.slices(), base.irreps_out.slices()
        for block, ins, scale in self._paths():
            if block.scalar:
                w = flat[block.start : block.start + block.numel].reshape(block.shape) * scale**2
                v = x[:, into[ins.i_in]].square() @ w
                start = outof[ins.i_out].start
                out[start] = out[start] + v if start in out else v
        return _join(base.irreps_out, out, x.new_zeros(x.shape[0], 0))

    def channels(self) -> tuple[Tensor, Tensor]:
        """One channel per multiplicity of every irrep."""
        base: Any = self.base

        def number(irreps: Any) -> Tensor:
            parts, first = [], 0
            for mul, ir in irreps:
                channel = torch.arange(first, first + mul)
                parts.append(channel.repeat(ir.dim) if self.inner else channel.repeat_interleave(ir.dim))
                first += mul
            return torch.cat(parts)

        return number(base.irreps_in), number(base.irreps_out)

    def invariants(self, x: Tensor) -> Tensor:
        """Even scalars as they are; the mean square of the components of every other channel."""
        base: Any = self.base
        return _invariants(base.irreps_in, self._split(base.irreps_in, x))


class VariationalInnerLinear(VariationalIrrepsLinear):
    """The same on features in inner order, (component, channel) within each irrep: products without transposes.

    The vendor's module is not called, as it knows its own order only; see :func:`inner_linear`.
    """

    inner: ClassVar[bool] = True

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return inner_linear(self.base, x, weight)


def inner_linear(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """``e3nn.o3.Linear`` in inner order.

    Args:
        base: the vendor's module.
        x: (rows, dim_in).
        weight: flat, in the vendor's order.
    """
    parts = x.split([mul * ir.dim for mul, ir in base.irreps_in], dim=1)
    out: dict[int, Tensor] = {}
    first = 0
    for ins in base.instructions:
        if ins.i_in == -1 or 0 in ins.path_shape:
            continue
        (mul, ir), (mul_out, _) = base.irreps_in[ins.i_in], base.irreps_out[ins.i_out]
        w = weight[first : first + mul * mul_out].view(mul, mul_out) * float(ins.path_weight)
        first += mul * mul_out
        v = (parts[ins.i_in].reshape(len(x) * ir.dim, mul) @ w).reshape(len(x), ir.dim * mul_out)
        start = base.irreps_out.slices()[ins.i_out].start
        out[start] = out[start] + v if start in out else v
    whole = _join(base.irreps_out, out, x.new_zeros(len(x), 0))
    return whole + _biases(base, whole) if base.bias.numel() else whole


def _biases(base: Any, like: Tensor) -> Tensor:
    """(dim_out,) the vendor's bias of every component of the output; scalars alone have one."""
    out, start = like.new_zeros(like.shape[1]), 0
    for ins in base.instructions:
        if ins.i_in == -1:
            place = base.irreps_out.slices()[ins.i_out]
            size = place.stop - place.start
            out[place] = base.bias[start : start + size] * float(ins.path_weight)
            start += size
    return out


class VariationalTensorProduct(VariationalLayer):
    """``e3nn.o3.FullyConnectedTensorProduct``: one array (mul_1, mul_2, mul_out) per path.

    It is linear in its weight, and the weight is shared by the components of all irreps.
    """

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix (mul_1 * mul_2, mul_out) per path."""
        out, start = [], 0
        for ins in base.instructions:
            first, second, last = ins.path_shape
            scalar = str(base.irreps_in1[ins.i_in1].ir) == str(base.irreps_in2[ins.i_in2].ir) == "0e"
            out.append(Block(start, (first * second, last), output_axis=1, scalar=scalar))
            start += out[-1].numel
        return tuple(out)

    def pack(self, *inputs: Tensor) -> Tensor:
        """Both factors side by side."""
        return torch.cat(inputs, dim=1)

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        base: Any = self.base
        width = base.irreps_in1.dim
        out: Tensor = base(x[:, :width].contiguous(), x[:, width:].contiguous(), weight)
        return out

    def sampled(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        """By the vendor's own kernel, structure by structure."""
        return self.by_structure(x, weight, rows)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """Scalar paths only, as for linear layers."""
        base: Any = self.base
        width = base.irreps_in1.dim
        left, right = x[:, :width].square(), x[:, width:].square()
        out: dict[int, Tensor] = {}
        for block, ins in zip(self.site.blocks, base.instructions, strict=True):
            if block.scalar:
                w = variance[block.start : block.start + block.numel].reshape(ins.path_shape)
                v = torch.einsum(
                    "bu,bv,uvw->bw",
                    left[:, base.irreps_in1.slices()[ins.i_in1]],
                    right[:, base.irreps_in2.slices()[ins.i_in2]],
                    w * float(ins.path_weight) ** 2,
                )
                start = base.irreps_out.slices()[ins.i_out].start
                out[start] = out[start] + v if start in out else v
        return _join(base.irreps_out, out, x.new_zeros(x.shape[0], 0))

    def channels(self) -> None:
        """None: a sign per channel of either factor is not one per input of the weight."""

    @property
    def n_invariants(self) -> int:
        """Channels of both factors."""
        base: Any = self.base
        return int(base.irreps_in1.num_irreps + base.irreps_in2.num_irreps)

    def invariants(self, x: Tensor) -> Tensor:
        """Those of both factors, as for linear layers."""
        base: Any = self.base
        width = base.irreps_in1.dim
        halves = (base.irreps_in1, x[:, :width]), (base.irreps_in2, x[:, width:])
        return torch.cat([_invariants(irreps, _outer_parts(irreps, half)) for irreps, half in halves], dim=1)


def _invariants(irreps: Any, parts: Sequence[Tensor]) -> Tensor:
    """Even scalars as they are; the mean square of the components of every other channel.

    Args:
        irreps: of the features.
        parts: (rows, 2l + 1, channels) of every irrep.
    """
    return torch.cat(
        [
            x.squeeze(1) if str(ir) == "0e" else x.square().mean(dim=1)
            for (_, ir), x in zip(irreps, parts, strict=True)
        ],
        dim=1,
    )


def _outer_parts(irreps: Any, x: Tensor) -> list[Tensor]:
    """(rows, dim) in the vendor's order -> for every irrep (rows, 2l + 1, channels)."""
    parts = x.split([mul * ir.dim for mul, ir in irreps], dim=1)
    return [
        part.reshape(len(x), mul, ir.dim).transpose(1, 2)
        for part, (mul, ir) in zip(parts, irreps, strict=True)
    ]


def _join(irreps: Any, parts: dict[int, Tensor], empty: Tensor) -> Tensor:
    """Concatenate output slices given by their start; slices without a path are zero."""
    pieces = [
        parts[s.start] if s.start in parts else empty.new_zeros(*empty.shape[:-1], s.stop - s.start)
        for s in irreps.slices()
        if s.stop > s.start
    ]
    return torch.cat(pieces, dim=-1) if pieces else empty


class VariationalRadialLayer(VariationalLayer):
    """One layer of ``e3nn.nn.FullyConnectedNet``: weight (in, out), normalised, then activated."""

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix."""
        return (Block(0, tuple(base.weight.shape), output_axis=1),)

    def _norm(self) -> float:
        base: Any = self.base
        norm = base.h_in * base.var_in
        return float((norm if base.act is not None else norm / base.var_out) ** 0.5)

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return x @ (weight / self._norm())

    def sampled(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        return grouped_matmul(x, weight / self._norm(), rows)

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        return grouped_outer(x, grad, rows) / self._norm()

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:  # noqa: D102
        return x.square() @ (variance / self._norm() ** 2)

    def activate(self, x: Tensor) -> Tensor:  # noqa: D102
        base: Any = self.base
        if base.act is None:
            return x
        out: Tensor = base.act(x) * base.var_out**0.5
        return out
