"""Noise that depends on what it belongs to, not on when it is drawn.

Every normal number is a pure function of (seed, epoch, structure, layer) and its position. The
noise of a structure is therefore the same whatever batch, rank or device it is evaluated in, and
independent between structures.

======================  ======================================================================
mode                    perturbation of a layer's weight
======================  ======================================================================
``off``                 none: the layer computes with the posterior mean
``local``               independent per row (atom, edge): local reparameterisation, Kingma,
                        Salimans & Welling, arXiv 1506.02557. Exact for the law of one row
                        only; scalar paths only, as noise per component breaks equivariance
``structure``           one weight sample per structure, shared by the 2l+1 components of every
                        irrep, hence exactly equivariant
``flipout``             one weight sample per step, whose signs are flipped by random signs of each
                        structure's input and output channels (Wen et al., arXiv 1803.04386): the
                        law of ``structure`` for each structure with one set of weights in memory,
                        but between the structures of a step uncorrelated only, not independent;
                        equivariant, as the components of a channel share their sign
``draw``                one weight sample for everything: an ordinary potential
======================  ======================================================================
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Mode = Literal["off", "local", "structure", "flipout", "draw"]
MODES: tuple[Mode, ...] = ("off", "local", "structure", "flipout", "draw")


def normal(key: Sequence[object], n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``n`` standard normal numbers that are a function of ``key`` alone, on the CPU.

    Counter-based (Philox, Salmon et al., SC 2011) with a 128-bit key, as torch's own CPU
    generator keeps only 32 bits of a seed. Drawn in float64 and rounded to ``dtype``, so that a
    model has the same draws in every precision.
    """
    digest = hashlib.blake2b(repr(tuple(key)).encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return torch.from_numpy(generator.standard_normal(n)).to(dtype)


@dataclass(frozen=True)
class RowLayout:
    """Which structure each row of a layer's input belongs to.

    Attributes:
        index: (rows,) ascending structure number of each row.
        counts: rows per structure, one entry per structure (may be 0).
    """

    index: Tensor
    counts: tuple[int, ...]

    @classmethod
    def from_index(cls, index: Tensor, n_structures: int) -> RowLayout:
        """Count the rows of each structure."""
        return cls(index, tuple(torch.bincount(index, minlength=n_structures).tolist()))

    @classmethod
    def single(cls, x: Tensor) -> RowLayout:
        """All rows of ``x`` in one structure."""
        return cls(torch.zeros(len(x), dtype=torch.int64, device=x.device), (len(x),))

    @property
    def even(self) -> bool:
        """Whether all structures have the same number of rows."""
        return len(set(self.counts)) <= 1

    def spread(self, x: Tensor) -> tuple[int, ...]:
        """Vectors of every structure in ``x`` (rows, ..., i)."""
        inner = math.prod(x.shape[1:-1])
        return self.counts if inner == 1 else tuple(inner * n for n in self.counts)

    def sum(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (B, ...) sum over the rows of each structure."""
        return x.new_zeros(len(self.counts), *x.shape[1:]).index_add(0, self.index, x)

    def pad(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (B, max count, ...), zero where a structure has fewer rows."""
        width = max(self.counts, default=0)
        if self.even:
            return x.reshape(len(self.counts), width, *x.shape[1:])
        out = x.new_zeros(len(self.counts) * width, *x.shape[1:])
        return out.index_copy(0, self._slots(width), x).reshape(len(self.counts), width, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`pad`."""
        width = max(self.counts, default=0)
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.even else flat.index_select(0, self._slots(width))

    def _slots(self, width: int) -> Tensor:
        starts = torch.tensor([0, *self.counts[:-1]], device=self.index.device).cumsum(0)
        within = torch.arange(len(self.index), device=self.index.device) - starts[self.index]
        return self.index * width + within


def grouped_matmul(x: Tensor, weight: Tensor, rows: RowLayout) -> Tensor:
    """RowLayout of each structure times that structure's matrix.

    Args:
        x: (rows, ..., i).
        weight: (B, i, o).
        rows: layout of ``x``.

    Returns:
        (rows, ..., o) with ``out[r] = x[r] @ weight[rows.index[r]]``.
    """
    if weight.shape[0] == 1:
        return x @ weight[0]
    shape = (*x.shape[:-1], weight.shape[2])
    if rows.even:
        return torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight).reshape(shape)
    if x.device.type == "cpu":
        out: Tensor = _Products.apply(x.reshape(-1, x.shape[-1]), weight, rows.spread(x))
        return out.reshape(shape)
    padded = rows.pad(x)
    product = torch.bmm(padded.reshape(len(weight), -1, x.shape[-1]), weight)
    return rows.unpad(product.reshape(*padded.shape[:-1], weight.shape[2]))


def grouped_outer(x: Tensor, y: Tensor, rows: RowLayout) -> Tensor:
    """Sum over each structure's rows of x_r y_r^T: (rows, ..., i), (rows, ..., o) -> (B, i, o)."""
    if len(rows.counts) == 1:
        return (x.flatten(0, -2).T @ y.flatten(0, -2))[None]
    if x.device.type == "cpu" and not rows.even:
        out: Tensor = _Outer.apply(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), rows.spread(x))
        return out
    return torch.bmm(rows.pad(x).flatten(1, -2).transpose(1, 2), rows.pad(y).flatten(1, -2))


def shared_matmul(x: Tensor, mean: Tensor, noise: Tensor, rows: RowLayout) -> Tensor:
    """``grouped_matmul(x, mean + noise, rows)`` whose gradient by the mean is one product, not a sum over structures.

    Args:
        x: (rows, ..., i).
        mean: (i, o), of all structures.
        noise: (B, i, o).
        rows: layout of ``x``.
    """
    if len(noise) == 1 or x.device.type != "cpu":
        return grouped_matmul(x, mean + noise, rows)
    with torch.no_grad():
        whole = mean + noise
    out: Tensor = _Shared.apply(x.reshape(-1, x.shape[-1]), mean, noise, whole, rows.spread(x))
    return out.reshape(*x.shape[:-1], mean.shape[1])


class _Shared(torch.autograd.Function):
    """RowLayout of structure b times mean + noise[b], which ``whole`` is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, noise: Tensor, whole: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        out = x.new_empty(x.shape[0], whole.shape[2])
        for rows, result, w in zip(x.split(counts), out.split(counts), whole, strict=True):
            torch.mm(rows, w, out=result)
        ctx.save_for_backward(x, mean, noise, whole)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, mean, noise, whole), needs = grads, ctx.saved_tensors, ctx.needs_input_grad
        turned = (mean.T, noise.transpose(1, 2), whole.transpose(1, 2))
        by_x = _Shared.apply(grad, *turned, ctx.counts) if needs[0] else None
        by_mean = x.T @ grad if needs[1] else None
        by_noise = _Outer.apply(x, grad, ctx.counts) if needs[2] else None
        return by_x, by_mean, by_noise, None, None


class _Products(torch.autograd.Function):
    """RowLayout of structure b times W[b], one product after the other: on a CPU cheaper than rows of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[2])
        for rows, result, w in zip(x.split(counts), out.split(counts), weight, strict=True):
            torch.mm(rows, w, out=result)
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        by_x = _Products.apply(grad, weight.transpose(1, 2), ctx.counts) if ctx.needs_input_grad[0] else None
        by_weight = _Outer.apply(x, grad, ctx.counts) if ctx.needs_input_grad[1] else None
        return by_x, by_weight, None


class _Outer(torch.autograd.Function):
    """x_b^T y_b of every structure."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, counts: tuple[int, ...]) -> Tensor:
        out = x.new_empty(len(counts), x.shape[1], y.shape[1])
        for a, b, result in zip(x.split(counts), y.split(counts), out, strict=True):
            torch.mm(a.T, b, out=result)
        ctx.save_for_backward(x, y)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, y) = grads, ctx.saved_tensors
        by_x = _Products.apply(y, grad.transpose(1, 2), ctx.counts) if ctx.needs_input_grad[0] else None
        by_y = _Products.apply(x, grad, ctx.counts) if ctx.needs_input_grad[1] else None
        return by_x, by_y, None


@dataclass(frozen=True)
class Tap:
    """What one call of a layer leaves for weight gradients (``uncertainty.linearized``).

    Attributes:
        layer: the converted layer.
        x: (rows, in) its input.
        out: (rows, out) output of its linear map, a node of the graph.
    """

    layer: Any
    x: Tensor
    out: Tensor


@dataclass(frozen=True)
class Noise:
    """Which perturbation of the weights a batch is evaluated with; the default is none.

    Attributes:
        mode: see the module's table.
        epoch: part of the key in ``structure``, ``local`` and ``flipout``.
        step: part of the key of the sample that all structures share in ``flipout``.
        sample: numbers independent samples under one such key.
        draw: number of the fixed draw in ``draw``; in ``structure`` those of each structure.
        latent: (B, latent_numel) numbers of each structure's sample, in place of keyed ones, in ``structure``.
    """

    mode: Mode = "off"
    epoch: int = 0
    step: int = 0
    sample: int = 0
    draw: int | Sequence[int] | None = None
    latent: Tensor | None = None

    @classmethod
    def of_draw(cls, number: int) -> Noise:
        """One of the fixed draws, the same for all structures."""
        return cls("draw", draw=number)

    @property
    def keyed(self) -> bool:
        """Whether it depends on the keys of the structures."""
        given = self.latent is not None or isinstance(self.draw, Sequence)
        return self.mode in ("structure", "local", "flipout") and not given


#: the mean weights
OFF = Noise()


@dataclass
class NoiseState(threading.local):
    """What all converted layers of a model read in their forward pass.

    One object is shared by the layers of a model; the model sets it before each evaluation. Every thread has values of
    its own, so that several can evaluate one model at the same time. A copy starts without any.

    Attributes:
        mode: see the module's table.
        weights: perturbation of each site: (B, *shape) in ``structure``, (1, *shape) in
            ``flipout``, (*shape) in ``draw``.
        variances: variance of each site's weights, (*shape), in ``local``.
        rows: layout of every kind of row in the batch.
        row_normal: ``(site name, rows, width, like) -> (rows, width)`` normals for ``local``.
        signs: ``(site name, inputs, outputs, like) -> (B, inputs), (B, outputs)`` for ``flipout``.
        row_amplitude: ``(layer, input rows) -> (rows, 1)`` factor of every row's perturbation, for
            families whose spread depends on the input; ``None`` for the others.
        taps: where layers leave their inputs and outputs, one entry per call; ``None``: nowhere.
        structure_kl: (B,) KL of each structure's own weights in the last evaluation, for families that have them; stays
            until the next one.
    """

    mode: Mode = "off"
    weights: dict[str, Tensor] = field(default_factory=dict)
    variances: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, RowLayout] = field(default_factory=dict)
    row_normal: Callable[[str, RowLayout, int, Tensor], Tensor] | None = None
    signs: Callable[[str, int, int, Tensor], tuple[Tensor, Tensor]] | None = None
    row_amplitude: Callable[[Any, Tensor], Tensor] | None = None
    taps: list[Tap] | None = None
    structure_kl: Tensor | None = None

    def __reduce__(self) -> tuple[type[NoiseState], tuple[()]]:
        """What belongs to a thread cannot be copied."""
        return NoiseState, ()

    @contextmanager
    def perturbed(
        self,
        mode: Mode = "off",
        weights: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, RowLayout] | None = None,
        *,
        taps: bool = False,
    ) -> Iterator[NoiseState]:
        """Set up for the length of a block, in this thread; what more a mode needs is set inside.

        Args:
            mode: see the module's table.
            weights: perturbation of each site.
            rows: layout of every kind of row in the batch.
            taps: layers leave their inputs and outputs.
        """
        self.clear()
        self.mode, self.weights, self.rows = mode, dict(weights or {}), dict(rows or {})
        self.taps = [] if taps else None
        try:
            yield self
        finally:
            self.clear()

    def clear(self) -> None:
        """Back to ``off``; frees the sampled weights."""
        self.mode = "off"
        self.weights, self.variances, self.rows, self.row_normal = {}, {}, {}, None
        self.signs, self.row_amplitude = None, None
        self.taps = None


def keyed_row_normal(
    seed: int, epoch: int, keys: Sequence[int], sample: int = 0
) -> Callable[[str, RowLayout, int, Tensor], Tensor]:
    """Row normals keyed by (seed, epoch, structure, layer); rows count from 0 in each structure.

    ``sample`` numbers independent samples of one step.
    """

    def draw(site: str, rows: RowLayout, width: int, like: Tensor) -> Tensor:
        parts = [
            normal(("row", seed, epoch, key, site, *numbered(sample)), count * width, like.dtype)
            for key, count in zip(keys, rows.counts, strict=True)
        ]
        return torch.cat(parts).reshape(-1, width).to(like.device)

    return draw


def keyed_signs(
    seed: int, epoch: int, keys: Sequence[int], sample: int = 0
) -> Callable[[str, int, int, Tensor], tuple[Tensor, Tensor]]:
    """Random signs of the input and output channels, keyed by (seed, epoch, structure, layer)."""

    def draw(site: str, inputs: int, outputs: int, like: Tensor) -> tuple[Tensor, Tensor]:
        flat = torch.stack(
            [
                normal(("sign", seed, epoch, key, site, *numbered(sample)), inputs + outputs, like.dtype)
                for key in keys
            ]
        )
        first, second = flat.sign().to(like.device).split([inputs, outputs], dim=1)
        return first, second

    return draw


def numbered(sample: int) -> tuple[int, ...]:
    """End of a key: nothing for the first sample of a step, whose noise then has a shorter key."""
    return (sample,) if sample else ()
