"""What all variational layers share: a linear map whose weight is random around the pretrained one.

Each layer wraps the vendor's module as ``base`` and computes with

    w = w0 + delta + perturbation,

``w0`` the frozen pretrained weight inside ``base``, ``delta`` the trained mean's difference from
it, and a perturbation that a :class:`~blip_ft.variational.noise.NoiseState` supplies. Without noise
the mean goes through the vendor's own arithmetic, so that delta = 0 is the original bit for bit. Where
every structure has a weight of its own, mean and perturbation make one product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from blip_ft.variational.mean import Change
from blip_ft.variational.noise import NoiseState, RowLayout, Tap
from blip_ft.variational.sites import Block, Site


class VariationalLayer(nn.Module, ABC):
    """Common part of all converted layers.

    Args:
        base: the vendor's module; its weight is frozen and stays the prior's centre.
        site: description of the weight.
        change: the mean's difference from the pretrained weight; shared between tied layers.
        noise: shared noise state of the model.
        rows: kind of the input's rows (``atom``, ``edge``, ...).
    """

    def __init__(self, base: nn.Module, site: Site, change: Change, noise: NoiseState, rows: str) -> None:
        super().__init__()
        self.base = base
        self.change = change
        self.site, self.rows = site, rows
        self.noise = noise
        self.register_load_state_dict_pre_hook(_names_of_today)
        for parameter in self.parameters_of(base):
            parameter.requires_grad_(False)

    # ---- the mean ------------------------------------------------------------------------
    @property
    def delta(self) -> Tensor:
        """(*shape) the mean's difference from the pretrained weight."""
        return self.change.value()

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
        state, name = self.noise, self.site.name
        if state.mode == "structure" and name in state.weights and state.row_amplitude is None:
            out = self.around(x, self.weight, state.weights[name], self._layout(x))
        else:
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
            noise = self.sampled(x, state.weights[name][None], RowLayout.single(x))
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
        return second * self.sampled(first * x, weight, RowLayout.single(x))

    def merge(self, perturbation: Tensor | None = None) -> None:
        """Write the mean, and a draw's perturbation (*shape), into the vendor's weight."""
        change = self.delta if perturbation is None else self.delta + perturbation
        with torch.no_grad():
            for parameter, part in zip(self.parameters_of(self.base), self.split(change), strict=True):
                parameter.add_(part)

    def _layout(self, x: Tensor) -> RowLayout:
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
    def sampled(self, x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:
        """The linear part of the map with one weight per structure, ``weight`` (B, *shape)."""

    def around(self, x: Tensor, mean: Tensor, noise: Tensor, rows: RowLayout) -> Tensor:
        """:meth:`mean` of each structure with its whole weight, ``mean`` (*shape) + ``noise`` (B, *shape): one
        product for both.
        """
        out = self.sampled(x, mean + noise, rows)
        return out if self.bias is None else out + self.bias

    @abstractmethod
    def row_variance(self, x: Tensor, variance: Tensor) -> Tensor:
        """(rows, out) variance of the map for independent weights of variance (*shape)."""

    def by_structure(self, x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:
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

    def weight_gradient(self, x: Tensor, grad: Tensor, rows: RowLayout) -> Tensor:
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


def _names_of_today(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Model files up to format 2 have the mean's change beside the vendor's module."""
    del module
    for key in [k for k in state if k.startswith((f"{prefix}delta", f"{prefix}lora."))]:
        state[f"{prefix}change.{key.removeprefix(prefix)}"] = state.pop(key)
