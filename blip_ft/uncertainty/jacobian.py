"""Gradients of energies and forces with respect to the noisy weights, per structure, in batches.

In ``structure`` mode every structure has its own perturbation of the weights. Taking these
perturbations, at zero (or at a draw), as the leaves to differentiate gives the gradients of all
structures of a batch in one backward call, since no structure feels another's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from blip_ft.backbones.conservative import weights_only
from blip_ft.backbones.protocol import Batch
from blip_ft.backbones.rows import rows_of
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.variational.noise import normal


def output_gradients(
    potential: BayesianPotential,
    batch: Batch,
    directions: Sequence[Tensor],
    *,
    latent: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients of the energy and of projections of the forces, scaled by rms(w0).

    Args:
        potential: the model; its mean is where gradients are taken.
        batch: structures.
        directions: (n, 3) each; for every one, the gradient of sum(direction * forces) of each
            structure.
        latent: (B, latent_numel) differentiate at these draws instead of at the mean.

    Yields:
        First (energy (B,), gradient (B, P)) of the energy per structure in eV, then for every
        direction (projected force (B,), gradient (B, P)) in eV/Å; P counts the noisy weights, and
        every weight is in units of its matrix's rms, as in the prior.
    """
    posterior, state = potential.posterior, potential.converted.noise
    n, dtype, device = batch.n_structures, potential.backbone.dtype, potential.backbone.device
    start = None if latent is None else posterior.sample(latent.to(device, dtype))
    leaves: dict[str, Tensor] = {}
    for site in posterior.sites:
        at = (
            torch.zeros(n, *site.shape, dtype=dtype, device=device)
            if start is None
            else start[site.name].detach()
        )
        leaves[site.name] = at.requires_grad_(True)
    with state.perturbed("structure", leaves, rows_of(batch)), torch.enable_grad():
        out = potential.backbone(batch, forces=True, stress=False, create_graph=True)
        assert out.forces is not None
        wanted = list(leaves.values())
        rms = torch.cat([potential.prior.rms(s.name).reshape(-1) for s in posterior.sites])
        values = [out.energy]
        for direction in directions:
            product = (out.forces * direction.to(out.forces)).sum(dim=1)
            values.append(product.new_zeros(n).index_add(0, batch.structure, product))
        for i, value in enumerate(values):
            with weights_only():
                grads = torch.autograd.grad(
                    value.sum(),
                    wanted,
                    retain_graph=i + 1 < len(values),
                    allow_unused=True,
                    materialize_grads=True,
                )
            yield value.detach(), torch.cat([g.reshape(n, -1) for g in grads], dim=1).mul_(rms)


def random_signs(batch: Batch, count: int, seed: object) -> list[Tensor]:
    """``count`` random sign vectors (n, 3) / sqrt(count), keyed by structure.

    For g_i the gradients of the force components, E[sum_k (sum_i v_ki g_i)(sum_i v_ki g_i)^T]
    = sum_i g_i g_i^T: the projections stand for all components without bias.
    """
    sizes = batch.n_atoms.tolist()
    out = []
    for k in range(count):
        parts = [
            normal(("projection", seed, key, k), 3 * n).sign().reshape(n, 3)
            for key, n in zip(batch.keys, sizes, strict=True)
        ]
        out.append(torch.cat(parts) / count**0.5)
    return out


def random_orthonormal(batch: Batch, count: int, seed: object) -> list[Tensor]:
    """``count`` random orthonormal vectors (n, 3) times sqrt(3n / count), keyed by structure.

    Without bias, as :func:`random_signs`; none of them repeats what another has seen, so that the sum scatters less,
    and not at all where there are as many vectors as components. Structures with fewer components have each of these,
    and zero vectors for the rest.
    """
    parts: list[list[Tensor]] = [[] for _ in range(count)]
    for key, n in zip(batch.keys, batch.n_atoms.tolist(), strict=True):
        found = min(count, 3 * n)
        vectors = torch.zeros(count, 3 * n, dtype=torch.float64)
        if found == 3 * n:
            vectors[:found] = torch.eye(found, dtype=torch.float64)
        else:
            drawn = normal(("orthonormal", seed, key), 3 * n * found).reshape(3 * n, found)
            vectors[:found] = torch.linalg.qr(drawn).Q.T * (3 * n / found) ** 0.5
        for k in range(count):
            parts[k].append(vectors[k].reshape(n, 3))
    return [torch.cat(part) for part in parts]


def all_components(batch: Batch) -> list[Tensor]:
    """Unit vectors that pick force component j of every structure at once, j = 0 ... 3 n_max - 1.

    Structures with fewer components get a zero vector for the rest.
    """
    sizes = batch.n_atoms
    first = torch.cumsum(sizes, 0) - sizes
    out = []
    for j in range(3 * int(sizes.max())):
        atom, axis = divmod(j, 3)
        direction = torch.zeros(int(sizes.sum()), 3, dtype=torch.float64)
        direction[(first + atom)[sizes > atom], axis] = 1.0
        out.append(direction)
    return out
