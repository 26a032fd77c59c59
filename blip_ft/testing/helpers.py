"""Helpers of the adapter contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from torch import nn

from blip_ft.backbones.protocol import Backbone, Prediction


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
    """As numpy has it."""
    return tensor.detach().cpu().numpy()


def close(one: torch.Tensor | None, two: torch.Tensor | None, tolerance: float) -> None:
    """Equal to a tolerance; a property that a model does not predict is missing from both."""
    if one is None or two is None:
        assert one is two
        return
    torch.testing.assert_close(one.detach(), two.detach(), rtol=0, atol=tolerance, equal_nan=True)


def same(one: Prediction, two: Prediction, tolerance: float) -> None:
    """Equal in energy, forces and stress to a tolerance."""
    close(one.energy, two.energy, tolerance)
    close(one.forces, two.forces, tolerance)
    close(one.stress, two.stress, tolerance)
    close(one.node_energy, two.node_energy, tolerance)


def rotation_defect(
    evaluated: Callable[[Atoms], Prediction], atoms: Atoms, turned: Atoms, turn: np.ndarray
) -> np.ndarray:
    """By how much energy (eV), forces (eV/Å) and stress (eV/Å^3) do not turn with the structure.

    Args:
        evaluated: the model.
        atoms: a structure.
        turned: the same, rotated.
        turn: (3, 3) the rotation.

    Returns:
        (3,) largest differences; 0 for a stress that is missing.
    """
    before, after = evaluated(atoms), evaluated(turned)
    forces = array(after.forces) - array(before.forces) @ turn.T
    out = [abs(after.energy.item() - before.energy.item()), np.abs(forces).max(), 0.0]
    if before.stress is not None and atoms.pbc.all():
        one, two = (voigt_6_to_full_3x3_stress(array(p.stress[0])) for p in (before, after))
        out[2] = np.abs(two - turn @ one @ turn.T).max()
    return np.array(out)


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
    """``nn.Linear`` and the linear layers of e3nn and of vendors, without importing them."""
    kind = type(module)
    origin = f"{kind.__module__}.{kind.__name__}"
    return isinstance(module, nn.Linear) or origin in (
        "e3nn.o3._linear.Linear",
        "e3nn.nn._fc._Layer",
        "fairchem.core.models.uma.nn.so3_layers.SO3_Linear",
        "fairchem.core.models.uma.nn.mole.MOLE",
    )
