"""Variational forms of e3nn's linear maps, whose weight is shared by the components of an irrep.

e3nn itself is not imported: what its modules say of their irreps and instructions is enough.
"""

from __future__ import annotations

from typing import Any

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

    def _paths(self) -> list[tuple[Block, Any, slice, slice, float]]:
        """(block, instruction, input slice, output slice, path weight) of every path."""
        base: Any = self.base
        into, outof = base.irreps_in.slices(), base.irreps_out.slices()
        live = [i for i in base.instructions if i.i_in != -1 and 0 not in i.path_shape]
        return [
            (block, ins, into[ins.i_in], outof[ins.i_out], float(ins.path_weight))
            for block, ins in zip(self.site.blocks, live, strict=True)
        ]

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.base(x, weight)
        return out

    def sampled(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        base: Any = self.base
        padded = rows.pad(x)  # (B, width, dim_in)
        n, width = padded.shape[:2]
        out: dict[int, Tensor] = {}
        flat = weight.reshape(n, -1)
        for block, ins, s_in, s_out, scale in self._paths():
            dim = base.irreps_in[ins.i_in].ir.dim
            mul_in, mul_out = block.shape
            w = flat[:, block.start : block.start + block.numel].reshape(n, mul_in, mul_out) * scale
            u = padded[..., s_in].reshape(n, width, mul_in, dim).transpose(2, 3)
            v = torch.bmm(u.reshape(n, width * dim, mul_in), w).reshape(n, width, dim, mul_out)
            v = v.transpose(2, 3).reshape(n, width, mul_out * dim)
            out[s_out.start] = out[s_out.start] + v if s_out.start in out else v
        return rows.unpad(_join(base.irreps_out, out, padded.new_zeros(n, width, 0)))

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        base: Any = self.base
        inputs, grads = rows.pad(x), rows.pad(grad)
        n, width = inputs.shape[:2]
        parts = []
        for block, ins, s_in, s_out, scale in self._paths():
            dim = base.irreps_in[ins.i_in].ir.dim
            u = inputs[..., s_in].reshape(n, width, block.shape[0], dim).permute(0, 2, 1, 3)
            v = grads[..., s_out].reshape(n, width, block.shape[1], dim).transpose(2, 3)
            product = torch.bmm(
                u.reshape(n, block.shape[0], width * dim), v.reshape(n, width * dim, block.shape[1])
            )
            parts.append(scale * product.reshape(n, -1))
        return torch.cat(parts, dim=1)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """Scalar paths only: noise per component of l > 0 would not rotate with the structure."""
        out: dict[int, Tensor] = {}
        flat = variance.reshape(-1)
        for block, _, s_in, s_out, scale in self._paths():
            if block.scalar:
                w = flat[block.start : block.start + block.numel].reshape(block.shape) * scale**2
                v = x[:, s_in].square() @ w
                out[s_out.start] = out[s_out.start] + v if s_out.start in out else v
        base: Any = self.base
        return _join(base.irreps_out, out, x.new_zeros(x.shape[0], 0))

    def channels(self) -> tuple[Tensor, Tensor]:
        """One channel per multiplicity of every irrep."""
        base: Any = self.base

        def number(irreps: Any) -> Tensor:
            sizes = torch.tensor([ir.dim for mul, ir in irreps for _ in range(mul)], dtype=torch.int64)
            return torch.repeat_interleave(torch.arange(len(sizes)), sizes)

        return number(base.irreps_in), number(base.irreps_out)

    def invariants(self, x: Tensor) -> Tensor:
        """Even scalars as they are; the mean square of the components of every other channel."""
        base: Any = self.base
        return _invariants(base.irreps_in, x)


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
        first, second = _invariants(base.irreps_in1, x[:, :width]), _invariants(base.irreps_in2, x[:, width:])
        return torch.cat((first, second), dim=1)


def _invariants(irreps: Any, x: Tensor) -> Tensor:
    """Even scalars as they are; the mean square of the components of every other channel."""
    parts = [x.new_zeros(x.shape[0], 0)]
    for (mul, ir), part in zip(irreps, irreps.slices(), strict=True):
        values = x[:, part]
        if str(ir) != "0e":
            values = values.reshape(-1, mul, ir.dim).square().mean(dim=2)
        parts.append(values)
    return torch.cat(parts, dim=1)


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
