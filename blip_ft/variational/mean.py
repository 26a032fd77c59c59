"""The mean of a variational layer: its change from the pretrained weight, a module of its own.

Layers that share a weight share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Change(nn.Module, ABC):
    """How far the mean has moved; its parameters are what is trained."""

    @abstractmethod
    def value(self) -> Tensor:
        """(*shape) the change of the weight."""

    @abstractmethod
    def reset(self) -> None:
        """Back to no change."""


class FullChange(Change):
    """Every weight by itself.

    Args:
        delta: (*shape) the change.
    """

    def __init__(self, delta: nn.Parameter) -> None:
        super().__init__()
        self.delta = delta

    def value(self) -> Tensor:
        """The parameter itself."""
        return self.delta

    @torch.no_grad()
    def reset(self) -> None:
        """All zero."""
        self.delta.zero_()
