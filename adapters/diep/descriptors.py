"""Descriptors of bonds and triplets, from edge vectors alone.

Atoms of a bond or a triplet are laid flat on a square grid, where a density (Gaussians on the atoms) times a potential
(softened 1/r of their charges) is one number for each point (``diep.layers.DIEPIntegrator``, mode ``grid``;
S. A. Tawfik et al., Digital Discovery 2024). The vendor projects positions on the axes of a frame and rounds to single
precision. Here the flat coordinates come from lengths and areas, in the type of the edge vectors; the numbers are the
vendor's.

Two of the vendor's sums are made cheaper, without a change beyond rounding: a Gaussian of the plane is a product of two
of the line, and the canonical frame draws a triplet and its mirror image (the same two edges in the other order) alike,
so that one of them is computed.

A straight triplet has no side on which it is high. The vendor takes a direction that depends on the axes and on
rounding, and its forces push atoms that way, by up to 5e-4 eV/Å in perfect crystals. Here they push nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: the vendor's tolerance of equal lengths and softening of heights, Å
EPS = 1e-6


def canonical_order(opposite: Tensor, numbers: Tensor) -> Tensor:
    """(t, 3) atoms of triplets in the order in which the vendor's canonical frame has them.

    The last faces the longest side; of the others the first faces the longer one. Ties go to higher atomic numbers, and
    those of equal elements to who comes first. Which is which changes by jumps: it is found once for each graph, in
    double precision.

    Args:
        opposite: (t, 3) length of the side that faces each atom, Å; the central atom is the second.
        numbers: (t, 3) atomic numbers.
    """
    ends = numbers[:, [1, 0, 0]], numbers[:, [2, 2, 1]]  # of the facing sides
    rank = (opposite / EPS).round().long() * 128 + torch.maximum(*ends)
    rank = rank * 128 + torch.minimum(*ends)
    last = torch.tensor([2, 0, 1])[rank[:, [2, 0, 1]].argmax(1)]  # the vendor's order of sides, if they tie
    first, second = torch.tensor([[1, 2], [0, 2], [0, 1]])[last].unbind(1)
    row = torch.arange(len(last))
    lead = opposite[row, first] - opposite[row, second]
    swap = torch.where(lead.abs() <= EPS, numbers[row, second] > numbers[row, first], lead < -EPS)
    return torch.stack((torch.where(swap, second, first), torch.where(swap, first, second), last), dim=1)


def of_bonds(integrator: Any, length: Tensor, charges: Tensor) -> Tensor:
    """(e, p) descriptors from lengths (e,) and the charges of both ends (e, 2)."""
    x = torch.stack((-length / 2, length / 2), dim=1)
    return _on_grid(integrator, x, torch.zeros_like(x), charges).flatten(1)


def of_triplets(integrator: Any, one: Tensor, two: Tensor, charges: Tensor, order: Tensor) -> Tensor:
    """(t, p) descriptors of triplets.

    Args:
        integrator: the vendor's ``DIEPIntegrator``, for its settings.
        one: (t, 3) edge from the central atom to the first, Å.
        two: (t, 3) edge from the central atom to the second, Å.
        charges: (t, 3) of the first, the central and the second atom.
        order: (t, 3) from :func:`canonical_order`.
    """
    area = torch.linalg.cross(one, two).square().sum(1)  # squared, of the parallelogram
    if integrator.triplet_frame == "bond":
        length = (one.square().sum(1) + EPS**2).sqrt()
        across = (one * two).sum(1) / length
        height = (area + (EPS * length) ** 2).sqrt() / length - EPS
        zero = torch.zeros_like(length)
        x, y = torch.stack((length, zero, across), dim=1), torch.stack((zero, zero, height), dim=1)
    else:
        charges = charges.gather(1, order)
        sides = torch.stack((two, one - two, one), dim=1).square().sum(2).gather(1, order)
        length = sides[:, 2].sqrt()
        across = (sides[:, 1] - sides[:, 0]) / (2 * length)
        high = area / sides[:, 2]  # squared
        height = torch.where(high < EPS**2, 0.0, high / (high + EPS**2).sqrt())
        zero = torch.zeros_like(length)
        x, y = torch.stack((-length / 2, length / 2, across), dim=1), torch.stack((zero, zero, height), dim=1)
    flat = _on_grid(integrator, x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), charges)
    if integrator.triplet_frame == "bond":
        flat = (flat + flat.flip(1)) / 2  # which side of the bond is up means nothing
    return flat.flatten(1)


def _on_grid(integrator: Any, x: Tensor, y: Tensor, charges: Tensor) -> Tensor:
    """(n, m, m) density times potential on the grid, rows along y, from coordinates of k atoms, (n, k)."""
    half, spacing = integrator.grid_half_length, integrator.base_spacing
    axis = torch.linspace(-half, half, round(2 * half / spacing) + 1, dtype=x.dtype, device=x.device)
    along, up = (x.unsqueeze(2) - axis).square(), (y.unsqueeze(2) - axis).square()
    sigma = integrator.sigma
    step = axis[1] - axis[0] if len(axis) > 1 else torch.ones_like(axis[0])
    density = (-up / sigma).exp().transpose(1, 2) @ (-along / sigma).exp()
    soft = up.unsqueeze(3) + along.unsqueeze(2) + integrator.softening_epsilon**2
    potential = (charges[:, :, None, None] * soft.rsqrt()).sum(1)
    result: Tensor = density * potential * (step.square() / (torch.pi * sigma))
    return result
