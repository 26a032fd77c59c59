"""Linear layers whose weight is a random variable around the pretrained one.

Each class wraps the vendor's module as ``base`` and computes with

    w = w0 + delta + perturbation,

``w0`` the frozen pretrained weight inside ``base``, ``delta`` the trained mean's difference from
it, and a perturbation that a :class:`~blip_ft.variational.noise.NoiseState` supplies. The mean
part goes through the vendor's own arithmetic, so that delta = 0 without noise is the original
bit for bit, and noise is added as a separate term, so that a zero perturbation changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from blip_ft.variational.noise import NoiseState, Rows, grouped_matmul
from blip_ft.variational.sites import Block, Site


class VariationalLayer(nn.Module, ABC):
    """Common part of all converted layers.

    Args:
        base: the vendor's module; its weight is frozen and stays the prior's centre.
        site: description of the weight.
        delta: the mean's difference from the pretrained weight; shared between tied layers.
        noise: shared noise state of the model.
        rows: kind of the input's rows (``atom``, ``edge``, ...).
    """

    def __init__(
        self, base: nn.Module, site: Site, delta: nn.Parameter, noise: NoiseState, rows: str
    ) -> None:
        super().__init__()
        self.base = base
        self.delta = delta
        self.site, self.rows = site, rows
        self.noise = noise
        self.parameter(base).requires_grad_(False)

    # ---- for convert ---------------------------------------------------------------------
    @staticmethod
    def parameter(base: Any) -> nn.Parameter:
        """The vendor's parameter by which layers that share a weight are known."""
        weight: nn.Parameter = base.weight
        return weight

    @classmethod
    def shape(cls, base: Any) -> tuple[int, ...]:
        """Shape of the weight that is varied, and of its delta."""
        return tuple(cls.parameter(base).shape)

    @staticmethod
    @abstractmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """The matrices inside ``base.weight``; empty if it has no weight of its own."""

    # ---- forward -------------------------------------------------------------------------
    @property
    def pretrained(self) -> Tensor:
        """The pretrained weight w0."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight(self) -> Tensor:
        """Weight of the mean part; vendors that look at ``.weight`` see it too."""
        mean = self.pretrained + self.delta
        if self.noise.mode == "draw" and self.site.name in self.noise.weights:
            return mean + self.noise.weights[self.site.name]
        return mean

    @property
    def bias(self) -> Tensor | None:
        """The vendor's bias, noise-free."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        """(rows, ..., in) -> (rows, ..., out)."""
        out = self.mean(x, self.weight)
        name = self.site.name
        if self.noise.mode == "structure" and name in self.noise.weights:
            rows = self._layout(x)
            out = out + self.sampled(x, self.noise.weights[name], rows)
        elif self.noise.mode == "local" and name in self.noise.variances:
            assert self.noise.row_normal is not None
            variance = self.row_variance(x, self.noise.variances[name])
            width = math.prod(variance.shape[1:])
            eps = self.noise.row_normal(name, self._layout(x), width, variance).reshape(variance.shape)
            # where: exactly nothing at zero variance, and a finite gradient of the root there
            positive = variance > 0
            out = out + torch.where(positive, variance, 1.0).sqrt() * positive * eps
        return self.activate(out)

    def merge(self, perturbation: Tensor | None = None) -> None:
        """Write the mean, and a draw's perturbation (*shape), into the vendor's weight."""
        with torch.no_grad():
            self.pretrained.add_(self.delta if perturbation is None else self.delta + perturbation)

    def _layout(self, x: Tensor) -> Rows:
        rows = self.noise.rows[self.rows]
        if x.shape[0] != len(rows.index):
            raise RuntimeError(
                f"{self.site.name} sees {x.shape[0]} rows, but the batch has {len(rows.index)} of kind "
                f"'{self.rows}': the adapter's row_kind is wrong"
            )
        return rows

    @abstractmethod
    def mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """The vendor's own map, before any activation."""

    @abstractmethod
    def sampled(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        """The linear part of the map with one weight per structure, ``weight`` (B, *shape)."""

    @abstractmethod
    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """(rows, out) variance of the map for independent weights of variance (*shape)."""

    def activate(self, x: Tensor) -> Tensor:
        """What the vendor does after the linear map."""
        return x


class VariationalLinear(VariationalLayer):
    """``torch.nn.Linear``: weight (out, in)."""

    @staticmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """One matrix."""
        return (Block(0, tuple(base.weight.shape), output_axis=0),)

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return linear(x, weight, self.bias)

    def sampled(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        return grouped_matmul(x, weight.transpose(1, 2), rows)

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:  # noqa: D102
        return x.square() @ variance.T


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
        return rows.unpad(self._join(out, padded.new_zeros(n, width, 0)))

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """Scalar paths only: noise per component of l > 0 would not rotate with the structure."""
        out: dict[int, Tensor] = {}
        flat = variance.reshape(-1)
        for block, _, s_in, s_out, scale in self._paths():
            if block.scalar:
                w = flat[block.start : block.start + block.numel].reshape(block.shape) * scale**2
                v = x[:, s_in].square() @ w
                out[s_out.start] = out[s_out.start] + v if s_out.start in out else v
        return self._join(out, x.new_zeros(x.shape[0], 0))

    def _join(self, parts: dict[int, Tensor], empty: Tensor) -> Tensor:
        """Concatenate output slices given by their start; slices without a path are zero."""
        base: Any = self.base
        pieces = [
            parts[s.start] if s.start in parts else empty.new_zeros(*empty.shape[:-1], s.stop - s.start)
            for s in base.irreps_out.slices()
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

    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:  # noqa: D102
        return x.square() @ (variance / self._norm() ** 2)

    def activate(self, x: Tensor) -> Tensor:  # noqa: D102
        base: Any = self.base
        if base.act is None:
            return x
        out: Tensor = base.act(x) * base.var_out**0.5
        return out


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
    if where.startswith("e3nn.") and name == "_Layer":
        return VariationalRadialLayer
    return f"no variational form for {name}"
