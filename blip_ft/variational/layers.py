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

from blip_ft.variational.noise import NoiseState, Rows, Tap, grouped_matmul, grouped_outer
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
        for parameter in self.parameters_of(base):
            parameter.requires_grad_(False)

    # ---- the mean ------------------------------------------------------------------------
    def set_lora(self, lora: nn.Module) -> None:
        """Make the mean's difference one of low rank (``variational.lora``); shared between tied layers."""
        del self.delta
        self.lora = lora

    def __getattr__(self, name: str) -> Any:
        """``delta`` is computed where it is of low rank."""
        if name == "delta" and "lora" in self._modules:
            from blip_ft.variational.lora import change

            return change(self._modules["lora"]).reshape(self.site.shape)
        return super().__getattr__(name)

    def mean_parameters(self) -> list[nn.Parameter]:
        """What the mean's difference is made of: itself, or the factors of a low-rank one."""
        if "lora" in self._modules:
            return list(self.lora.parameters())
        assert isinstance(self.delta, nn.Parameter)
        return [self.delta]

    def reset_mean(self) -> None:
        """Put the mean back to the pretrained weight."""
        if "lora" in self._modules:
            from blip_ft.variational.lora import reset

            reset(self.lora, self.site.name)
        else:
            with torch.no_grad():
                self.delta.zero_()

    # ---- for convert ---------------------------------------------------------------------
    @staticmethod
    def parameter(base: Any) -> nn.Parameter:
        """The vendor's parameter by which layers that share a weight are known."""
        weight: nn.Parameter = base.weight
        return weight

    @classmethod
    def parameters_of(cls, base: Any) -> tuple[nn.Parameter, ...]:
        """All of the vendor's parameters that the weight is made of, also those of submodules."""
        return (cls.parameter(base),)

    @classmethod
    def shape(cls, base: Any) -> tuple[int, ...]:
        """Shape of the weight that is varied, and of its delta; flat if it has several parameters."""
        parameters = cls.parameters_of(base)
        if len(parameters) == 1:
            return tuple(parameters[0].shape)
        return (sum(p.numel() for p in parameters),)

    @staticmethod
    @abstractmethod
    def blocks(base: Any) -> tuple[Block, ...]:
        """The matrices inside ``base.weight``; empty if it has no weight of its own."""

    # ---- forward -------------------------------------------------------------------------
    @property
    def pretrained(self) -> Tensor:
        """The pretrained weight w0."""
        parameters = self.parameters_of(self.base)
        if len(parameters) == 1:
            return parameters[0]
        return torch.cat([p.flatten() for p in parameters])

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A weight in the shapes of the vendor's parameters."""
        parameters = self.parameters_of(self.base)
        if len(parameters) == 1:
            return (weight,)
        parts = weight.split([p.numel() for p in parameters])
        return tuple(part.view_as(p) for part, p in zip(parts, parameters, strict=True))

    @property
    def weight(self) -> Tensor:
        """Weight of the mean part; vendors that look at ``.weight`` see it too.

        A draw is part of it, unless its size depends on the input row.
        """
        mean = self.pretrained + self.delta
        state = self.noise
        if state.mode == "draw" and state.row_amplitude is None and self.site.name in state.weights:
            return mean + state.weights[self.site.name]
        return mean

    @property
    def bias(self) -> Tensor | None:
        """The vendor's bias, noise-free."""
        bias = getattr(self.base, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def pack(self, *inputs: Tensor) -> Tensor:
        """What the vendor passes to the module as one tensor, a row of it for each of the input's."""
        (x,) = inputs
        return x

    def forward(self, *inputs: Tensor) -> Tensor:
        """(rows, ..., in) -> (rows, ..., out)."""
        x = self.pack(*inputs)
        out = self.mean(x, self.weight)
        noise = self._perturbation(x)
        if noise is not None:
            out = out + noise
        if self.noise.taps is not None:
            if not out.requires_grad:  # nothing before this layer depends on a leaf
                out = out.detach().requires_grad_(True)
            self.noise.taps.append(Tap(self, x.detach(), out))
        return self.activate(out)

    def _perturbation(self, x: Tensor) -> Tensor | None:
        """(rows, ..., out) noise beside the mean part; ``None`` if there is none, or the weight has it."""
        state, name = self.noise, self.site.name
        if state.mode == "local" and name in state.variances:
            assert state.row_normal is not None
            variance = self.row_variance(x, state.variances[name])
            width = math.prod(variance.shape[1:])
            eps = state.row_normal(name, self._layout(x), width, variance).reshape(variance.shape)
            # where: exactly nothing at zero variance, and a finite gradient of the root there
            positive = variance > 0
            noise = torch.where(positive, variance, 1.0).sqrt() * positive * eps
        elif name not in state.weights:
            return None
        elif state.mode == "structure":
            noise = self.sampled(x, state.weights[name], self._layout(x))
        elif state.mode == "flipout":
            noise = self._flipped(x, state.weights[name])
        elif state.mode == "draw" and state.row_amplitude is not None:
            noise = self.sampled(x, state.weights[name][None], Rows.single(x))
        else:
            return None
        return noise if state.row_amplitude is None else _like(state.row_amplitude(self, x), noise) * noise

    def _flipped(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sampled map with the signs of each structure's channels."""
        channels = self.channels()
        assert channels is not None, "convert refuses layers without channels in flipout mode"
        assert self.noise.signs is not None
        into, outof = (c.to(x.device) for c in channels)
        index = self._layout(x).index
        signs = self.noise.signs(self.site.name, int(into.max()) + 1, int(outof.max()) + 1, x)
        first, second = (_like(s[index][:, c], x) for s, c in zip(signs, (into, outof), strict=True))
        return second * self.sampled(first * x, weight, Rows.single(x))

    def merge(self, perturbation: Tensor | None = None) -> None:
        """Write the mean, and a draw's perturbation (*shape), into the vendor's weight."""
        change = self.delta if perturbation is None else self.delta + perturbation
        with torch.no_grad():
            for parameter, part in zip(self.parameters_of(self.base), self.split(change), strict=True):
                parameter.add_(part)

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

    def by_structure(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        """:meth:`sampled` for maps without bias: :meth:`mean` of each structure with its weight."""
        if not len(x):
            return self.mean(x, weight[0])
        parts = zip(x.split(rows.counts), weight, strict=True)
        return torch.cat([self.mean(part, w) for part, w in parts if len(part)])

    # ---- what only some noise needs ------------------------------------------------------
    def channels(self) -> tuple[Tensor, Tensor] | None:
        """Channel number of every input component (in,) and output component (out,).

        Components of one irrep share a channel. ``None`` where flipped signs have no meaning: by
        default for weights of more than one block or with components of l > 0.
        """
        if len(self.site.blocks) != 1 or not self.site.blocks[0].scalar:
            return None
        block = self.site.blocks[0]
        return torch.arange(block.shape[1 - block.output_axis]), torch.arange(block.channels)

    @property
    def n_invariants(self) -> int | None:
        """How many numbers :meth:`invariants` gives.

        ``None`` where the layer does not know which they are: by default for weights of more than
        one block or with components of l > 0.
        """
        channels = self.channels()
        return None if channels is None else int(channels[0].max()) + 1

    def invariants(self, x: Tensor) -> Tensor:
        """(rows, ..., in) input -> (rows, k) smooth numbers that no rotation changes."""
        return x if x.dim() == 2 else x.square().flatten(1, -2).mean(dim=1)

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: Rows) -> Tensor:
        """Gradient with respect to each structure's own copy of the weight, (B, *shape).

        Args:
            x: (rows, in) input of the layer.
            grad: (rows, out) gradient with respect to the output of its linear map.
            rows: layout of ``x``.

        As the map is linear in its weight, it does not matter at which weight. This general form
        costs a forward pass of :meth:`sampled`; layers that have a direct one override it.
        """
        weight = x.new_zeros(len(rows.counts), *self.site.shape).requires_grad_(True)
        with torch.enable_grad():
            out = self.sampled(x, weight, rows)
        return torch.autograd.grad(out, weight, grad)[0]

    def activate(self, x: Tensor) -> Tensor:
        """What the vendor does after the linear map."""
        return x


def _like(x: Tensor, other: Tensor) -> Tensor:
    """(rows, k) -> (rows, 1, ..., k) with as many dimensions as ``other``."""
    return x.reshape(x.shape[0], *[1] * (other.dim() - 2), x.shape[1])


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

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: Rows) -> Tensor:  # noqa: D102
        return grouped_outer(grad, x, rows)

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
