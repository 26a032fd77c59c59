"""Helpers of the adapter contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms
from torch import nn

from blip_ft.backbone import Backbone, Prediction


def evaluate_all(backbone: Backbone, frames: Sequence[Atoms]) -> Prediction:
    """Energy, forces and stress without a graph."""
    prediction = backbone(backbone.batch(frames))
    return Prediction(**{k: v.detach() for k, v in vars(prediction).items() if v is not None})


def evaluate(backbone: Backbone, atoms: Atoms) -> Prediction:
    """The same for one structure."""
    return evaluate_all(backbone, [atoms])


def energies(backbone: Backbone, frames: Sequence[Atoms]) -> torch.Tensor:
    """(B,) energies only."""
    with torch.no_grad():
        return backbone(backbone.batch(frames), forces=False, stress=False).energy


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def close(one: torch.Tensor, two: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one.detach(), two.detach(), rtol=0, atol=tolerance, equal_nan=True)


def same(one: Prediction, two: Prediction, tolerance: float) -> None:
    close(one.energy, two.energy, tolerance)
    close(one.forces, two.forces, tolerance)
    close(one.stress, two.stress, tolerance)
    close(one.node_energy, two.node_energy, tolerance)


def trainable(backbone: nn.Module) -> list[nn.Parameter]:
    """Parameters that require grad, in a fixed order."""
    return [p for p in backbone.parameters() if p.requires_grad]


def tensors(graph: object) -> list[torch.Tensor]:
    """All tensors in nested containers, in a fixed order."""
    if isinstance(graph, torch.Tensor):
        return [graph]
    if isinstance(graph, dict):
        return [t for value in graph.values() for t in tensors(value)]
    if isinstance(graph, list | tuple):
        return [t for value in graph for t in tensors(value)]
    return []


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` and e3nn's linear layers, without importing e3nn."""
    kind = type(module)
    origin = f"{kind.__module__}.{kind.__name__}"
    return isinstance(module, nn.Linear) or origin in ("e3nn.o3._linear.Linear", "e3nn.nn._fc._Layer")
