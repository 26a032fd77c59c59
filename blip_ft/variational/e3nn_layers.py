"""Variational forms of e3nn's linear maps, whose weight is shared by the components of an irrep.

e3nn itself is not imported: what its modules say of their irreps and instructions is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.noise import RowLayout, grouped_matmul, grouped_outer, shared_matmul
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

    def _paths(self) -> list[tuple[Block, Path]]:
        return list(zip(self.site.blocks, _plan(self.base).paths, strict=True))

    def _split(self, irreps: Any, x: Tensor) -> list[Tensor]:
        """(rows, dim) -> for every irrep (rows, 2l + 1, channels)."""
        return _inner_parts(irreps, x) if self.inner else _outer_parts(irreps, x)

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.base(x, weight)
        return out

    def sampled(self, x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        base: Any = self.base
        parts, flat = self._split(base.irreps_in, x), weight.reshape(len(weight), -1)
        return _path_sum(base, parts, (flat,), lambda u, w: grouped_matmul(u, w, rows), inner=self.inner)

    def around(self, x: Tensor, mean: Tensor, noise: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        base: Any = self.base
        parts, weights = self._split(base.irreps_in, x), (mean.reshape(-1), noise.reshape(len(noise), -1))

        def product(u: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return shared_matmul(u, m, n, rows)

        out = _path_sum(base, parts, weights, product, inner=self.inner)
        return out if self.bias is None else out + _biases(base, out)

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        base: Any = self.base
        inputs, grads = self._split(base.irreps_in, x), self._split(base.irreps_out, grad)
        plan = _plan(base)
        parts = [grouped_outer(inputs[p.i_in], grads[p.i_out], rows).flatten(1) for p in plan.paths]
        return torch.cat(parts, dim=1) * plan.scales.to(x)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """Scalar paths only: noise per component of l > 0 would not rotate with the structure."""
        out: dict[int, Tensor] = {}
        base: Any = self.base
        flat, into = variance.reshape(-1), base.irreps_in.slices()
        for block, path in self._paths():
            if block.scalar:
                w = flat[block.start : block.start + block.numel].reshape(block.shape) * path.scale**2
                v = x[:, into[path.i_in]].square() @ w
                out[path.i_out] = out[path.i_out] + v if path.i_out in out else v
        return _join(base.irreps_out, out, x)

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
    whole = _path_sum(base, _inner_parts(base.irreps_in, x), (weight,), _product, inner=True)
    return whole + _biases(base, whole) if base.bias.numel() else whole


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """(rows, 2l + 1, i) times (i, o)."""
    rows, components, width = x.shape
    return (x.reshape(rows * components, width) @ weight).view(rows, components, -1)


def _path_sum(
    base: Any,
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    product: Callable[..., Tensor],
    *,
    inner: bool,
) -> Tensor:
    """Sum over the paths of a linear map.

    Args:
        base: the vendor's module.
        parts: (rows, 2l + 1, channels) of every irrep of the input.
        weights: (..., weights) each, flat, in the vendor's order.
        product: of (rows, 2l + 1, i) and the matrix (..., i, o) of a path, from each of the weights.
        inner: order of the output.
    """
    plan, out = _plan(base), dict[int, Tensor]()
    matrices = [(w * plan.scales.to(w)).split(plan.sizes, dim=-1) for w in weights]
    for path, *of_path in zip(plan.paths, *matrices, strict=True):
        v = product(parts[path.i_in], *(m.unflatten(-1, path.shape) for m in of_path))
        v = (v if inner else v.transpose(1, 2)).flatten(1)
        out[path.i_out] = out[path.i_out] + v if path.i_out in out else v
    return _join(base.irreps_out, out, parts[0])


class Path(NamedTuple):
    """A path of a linear map: numbers of its irreps, (channels in, channels out) and factor."""

    i_in: int
    i_out: int
    shape: tuple[int, int]
    scale: float


class _Plan:
    """What a linear map does, looked up once: e3nn works out slices and dimensions at every question."""

    def __init__(self, base: Any) -> None:
        self.paths = [
            Path(i.i_in, i.i_out, tuple(i.path_shape), float(i.path_weight))
            for i in base.instructions
            if i.i_in != -1 and 0 not in i.path_shape
        ]
        self.sizes = [math.prod(p.shape) for p in self.paths]
        self.scales = _Kept(
            torch.cat(
                [
                    torch.full((n,), p.scale, dtype=torch.float64)
                    for n, p in zip(self.sizes, self.paths, strict=True)
                ]
            )
            if self.paths
            else torch.zeros(0, dtype=torch.float64)
        )


class _Kept:
    """A constant in every type and on every device that it was asked for."""

    def __init__(self, value: Tensor) -> None:
        self._values = {(value.dtype, value.device): value}
        self._value = value

    def to(self, like: Tensor) -> Tensor:
        """As ``like`` is."""
        key = like.dtype, like.device
        if key not in self._values:
            self._values[key] = self._value.to(like)
        return self._values[key]


_PLANS: WeakKeyDictionary[nn.Module, _Plan] = WeakKeyDictionary()


def _plan(base: nn.Module) -> _Plan:
    if (plan := _PLANS.get(base)) is None:
        plan = _PLANS[base] = _Plan(base)
    return plan


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

    def sampled(self, x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:
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
                out[ins.i_out] = out[ins.i_out] + v if ins.i_out in out else v
        return _join(base.irreps_out, out, x)

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


def _sizes(irreps: Any) -> tuple[tuple[int, int], ...]:
    """(channels, 2l + 1) of every irrep; e3nn's are hashable, and slow to ask."""
    if irreps not in _SIZES:
        _SIZES[irreps] = tuple((mul, ir.dim) for mul, ir in irreps)
    return _SIZES[irreps]


_SIZES: dict[Any, tuple[tuple[int, int], ...]] = {}


def _inner_parts(irreps: Any, x: Tensor) -> list[Tensor]:
    """(rows, dim) in inner order -> for every irrep (rows, 2l + 1, channels)."""
    sizes = _sizes(irreps)
    parts = x.split([mul * dim for mul, dim in sizes], dim=1)
    return [part.reshape(len(x), dim, mul) for part, (mul, dim) in zip(parts, sizes, strict=True)]


def _outer_parts(irreps: Any, x: Tensor) -> list[Tensor]:
    """(rows, dim) in the vendor's order -> for every irrep (rows, 2l + 1, channels)."""
    sizes = _sizes(irreps)
    parts = x.split([mul * dim for mul, dim in sizes], dim=1)
    return [
        part.reshape(len(x), mul, dim).transpose(1, 2) for part, (mul, dim) in zip(parts, sizes, strict=True)
    ]


def _join(irreps: Any, parts: dict[int, Tensor], like: Tensor) -> Tensor:
    """Concatenate the output's irreps, given by their numbers; those without a path are zero."""
    pieces = [
        parts[n] if n in parts else like.new_zeros(len(like), mul * dim)
        for n, (mul, dim) in enumerate(_sizes(irreps))
        if mul
    ]
    return torch.cat(pieces, dim=1) if pieces else like.new_zeros(len(like), 0)


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

    def sampled(self, x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        return grouped_matmul(x, weight / self._norm(), rows)

    def around(self, x: Tensor, mean: Tensor, noise: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        norm = self._norm()
        return shared_matmul(x, mean / norm, noise / norm, rows)

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: RowLayout) -> Tensor:  # noqa: D102
        return grouped_outer(x, grad, rows) / self._norm()

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:  # noqa: D102
        return x.square() @ (variance / self._norm() ** 2)

    def activate(self, x: Tensor) -> Tensor:  # noqa: D102
        base: Any = self.base
        if base.act is None:
            return x
        out: Tensor = base.act(x) * base.var_out**0.5
        return out
