"""Where noise can sit: one weight tensor, seen as a list of matrices.

A :class:`Site` describes the weight of one converted layer (or of several that share it). Its
tensor is cut into blocks: a plain linear layer has one block, an e3nn ``Linear`` one per path.
Priors and posteriors only see sites, so they need not know which layer type a weight came from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One matrix inside a flattened weight.

    Attributes:
        start: offset in the flattened weight.
        shape: (rows, columns) of the matrix.
        output_axis: which of the two axes counts output channels.
        scalar: whether it maps scalars to scalars (l = 0, even), where row noise is allowed.
    """

    start: int
    shape: tuple[int, int]
    output_axis: int
    scalar: bool = True

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return self.shape[self.output_axis]


@dataclass(frozen=True)
class Site:
    """One weight tensor that a posterior covers.

    Attributes:
        name: path of the layer that holds it (the first one, if tied).
        shape: shape of the weight tensor.
        blocks: matrices that tile the flattened tensor, in order.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if sum(b.numel for b in self.blocks) != self.numel:
            raise ValueError(
                f"{self.name}: blocks hold {sum(b.numel for b in self.blocks)} of {self.numel} weights"
            )

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Number of output channels, summed over blocks."""
        return sum(b.channels for b in self.blocks)


def block_rms(weight: Tensor, site: Site) -> Tensor:
    """Root mean square of the pretrained weight, per block, expanded to ``site.shape``.

    A block that is all zero (a path that pretraining never used) takes the rms of the whole
    tensor, and a tensor that is all zero the Xavier scale 1/sqrt(fan-in), so that a zero weight
    is still allowed to move.
    """
    flat = weight.detach().reshape(-1)
    whole = flat.double().square().mean().sqrt().item()
    out = torch.empty_like(flat)
    for block in site.blocks:
        part = flat[block.start : block.start + block.numel]
        rms = part.double().square().mean().sqrt().item() if block.numel else 0.0
        fan_in = max(1, block.shape[1 - block.output_axis])
        out[block.start : block.start + block.numel] = rms or whole or fan_in**-0.5
    return out.reshape(site.shape)


def expand_channels(values: Tensor, site: Site) -> Tensor:
    """Spread one value per output channel (``site.channels``,) over the weight, ``site.shape``."""
    parts, start = [], 0
    for block in site.blocks:
        channel = values[start : start + block.channels]
        start += block.channels
        matrix = channel[:, None] if block.output_axis == 0 else channel[None, :]
        parts.append(matrix.expand(block.shape).reshape(-1))
    return torch.cat(parts).reshape(site.shape)
