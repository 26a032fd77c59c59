"""Error bars of the linearised model, without sampling.

An output y(w) that is linear in the weights over the width of the posterior N(theta, Sigma) has

    std(y) = |Sigma^(1/2) dy/dw|                                                           (1)

``energy``: dE/dw comes from the *same* backward call as the forces, so the std of the energy costs
little more than a call of the mean model. Each converted layer leaves its input and output; the
gradient with respect to a structure's own copy of its weight is a sum of outer products over the
structure's rows.

``linear``: for the forces F = -dE/dx, equation (1) needs r more backward calls. With weights
theta + A z, z standard normal and of r numbers,

    dF/dz u = -d/dx (u . dE/dz),                                                           (2)

one backward call per direction u through the graph of dE/dz, which gives the derivatives of the
stress too. Over all r unit vectors u, sum_u (dF/dz u)(dF/dz u)^T is the exact covariance. K random
orthonormal directions times sqrt(r/K) estimate it without bias (:func:`relative_error`), and the estimate is
moved towards a round one (``shrinkage``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from blip_ft.backbones.conservative import ConservativeBackbone
from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.backbones.rows import rows_of
from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.uncertainty.jacobian import output_gradients
from blip_ft.uncertainty.moments import BatchMoments, to_double
from blip_ft.uncertainty.shrinkage import shrunk
from blip_ft.variational.noise import OFF, RowLayout, Tap, normal

Linearized = Literal["energy", "linear"]
#: latent numbers above which all directions of the forces cannot be asked for
MAX_DIRECTIONS = 1024


def predict_linearized(
    potential: BayesianPotential,
    batch: Batch,
    *,
    method: Linearized = "energy",
    n_directions: int | None = None,
    stress: bool = True,
) -> BatchMoments:
    """The mean model's prediction with stds of the linearised model.

    Args:
        potential: its posterior is used at full width.
        batch: structures.
        method: ``energy``: std of the energy; ``linear``: also of forces and stress.
        n_directions: K random directions for forces and stress; by default all, exact.
        stress: also predict stress.

    Returns:
        Units of ``Prediction``; what the method does not give is ``None``.

    Raises:
        BlipError: a family whose draws are no weights; ``linear`` for a model whose forces are not gradients
            of its energy, or for a family with too many latent numbers for all directions.
    """
    if not potential.posterior.ready:
        with torch.no_grad():
            return BatchMoments(to_double(potential(batch, OFF, stress=stress)))
    if not potential.posterior.draws_are_weights:
        raise BlipError(
            f"the spread of '{potential.posterior.family}' depends on the input: it has no linear form",
            remedy="use draws (method='draws')",
            field="method",
        )
    prediction, gradients = energy_gradients(potential, batch, stress=stress)
    moments = BatchMoments(
        prediction, energy_std=potential.posterior.linear_variance(gradients).double().sqrt()
    )
    if method == "linear":
        _add_forces(moments, potential, batch, n_directions, stress=stress)
    return moments


def relative_error(n_directions: int, rank: int) -> float:
    """Std of an estimated force std over the exact one, from K of r random directions.

    For a force that only one latent direction moves, the worst case, the estimated variance over
    the exact one is r/K times a Beta(K/2, (r-K)/2) number; half its relative std is
    sqrt((r - K) / (2 K (r + 2))). Forces that n directions move alike have 1/sqrt(n) of that.
    """
    k = min(n_directions, rank)
    return math.sqrt((rank - k) / (2 * k * (rank + 2)))


# ---- energy ----------------------------------------------------------------------------------


def energy_gradients(
    potential: BayesianPotential, batch: Batch, *, stress: bool = True
) -> tuple[Prediction, dict[str, Tensor]]:
    """Prediction of the mean weights and dE/dw of every structure, from one backward call.

    Returns:
        Prediction in float64 on the user's reference; {site name: (B, *site.shape)} in eV.
    """
    backbone, state = potential.backbone, potential.converted.noise
    wanted = {s.name for s in potential.posterior.sites}
    with state.perturbed(rows=rows_of(batch), taps=True), torch.enable_grad():
        assert state.taps is not None
        if isinstance(backbone, ConservativeBackbone):
            result = backbone.energy_of(batch)
            taps = [t for t in state.taps if t.layer.site.name in wanted]
            grads = torch.autograd.grad(
                result.energy.sum(),
                (*result.leaves, *(t.out for t in taps)),
                allow_unused=True,
                materialize_grads=True,
            )
            n = len(result.leaves)
            forces, virial = backbone.assemble(batch, grads[:n])
            prediction = Prediction(
                result.energy,
                forces,
                virial if stress else None,
                result.node_energy,
                result.node_features,
            )
            grads = grads[n:]
        else:
            prediction = backbone(batch, forces=True, stress=stress)
            taps = [t for t in state.taps if t.layer.site.name in wanted]
            grads = torch.autograd.grad(
                prediction.energy.sum(), [t.out for t in taps], allow_unused=True, materialize_grads=True
            )
        gradients = _by_site(taps, grads, state.rows)
    if gradients.keys() != wanted:  # a layer that leaves no taps: each structure's weights as leaves
        gradients = _from_leaves(potential, batch)
    return potential.on_reference(to_double(prediction), batch), gradients


def _by_site(
    taps: list[Tap], grads: tuple[Tensor, ...] | list[Tensor], rows: dict[str, RowLayout]
) -> dict[str, Tensor]:
    """Sum over the calls of layers that share a weight."""
    out: dict[str, Tensor] = {}
    for tap, grad in zip(taps, grads, strict=True):
        name = tap.layer.site.name
        part = tap.layer.weight_gradient(tap.x, grad, rows[tap.layer.rows])
        part = part.reshape(len(part), *tap.layer.site.shape)
        out[name] = out[name] + part if name in out else part
    return out


def _from_leaves(potential: BayesianPotential, batch: Batch) -> dict[str, Tensor]:
    """The same gradients by a second evaluation."""
    _, gradient = next(iter(output_gradients(potential, batch, [])))
    sites = potential.posterior.sites
    parts = gradient.split([s.numel for s in sites], dim=1)
    return {
        s.name: p.reshape(-1, *s.shape) / potential.prior.rms(s.name)
        for s, p in zip(sites, parts, strict=True)
    }


# ---- forces ----------------------------------------------------------------------------------


def _add_forces(
    moments: BatchMoments,
    potential: BayesianPotential,
    batch: Batch,
    n_directions: int | None,
    *,
    stress: bool,
) -> None:
    """Covariance of forces and std of stress, by equation (2)."""
    backbone, posterior = potential.backbone, potential.posterior
    if not isinstance(backbone, ConservativeBackbone):
        raise BlipError(
            f"forces of this {backbone.name} model are not gradients of its energy",
            remedy="use draws (method='draws'), or method='energy' for the energy alone",
            field="method",
        )
    r = posterior.latent_numel
    if n_directions is None and r > MAX_DIRECTIONS:
        raise BlipError(
            f"'{posterior.family}' has {r:,} latent numbers: too many for the exact force covariance",
            remedy="give n_directions, for instance 32, or use draws",
            field="n_directions",
        )
    directions = _directions(r, n_directions, potential.seed)
    n = int(batch.n_atoms.sum())
    covariance = torch.zeros(n, 3, 3, dtype=torch.float64, device=backbone.device)
    variance = torch.zeros(batch.n_structures, 6, dtype=torch.float64, device=backbone.device)
    for _, forces, virial in latent_derivatives(potential, batch, directions):
        covariance += forces[:, :, None] * forces[:, None, :]
        variance += virial.square()
    moments.forces_cov = shrunk(covariance, len(directions)) if len(directions) < r else covariance
    moments.sampling_error = relative_error(len(directions), r)
    if stress:
        moments.stress_std = variance.sqrt()


def latent_derivatives(
    potential: BayesianPotential, batch: Batch, directions: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Derivatives of a conservative model's outputs along latent vectors, at the mean; equation (2).

    Between two items the model must not be evaluated: its noise state is in use.

    Args:
        potential: its draws are sets of weights.
        batch: structures.
        directions: (K, latent_numel) vectors u.

    Yields:
        For every u, in float64: d(energy)/dz u (B,) eV, of the forces (n, 3) eV/Å, of the stress (B, 6) eV/Å^3.
    """
    backbone, state, posterior = potential.backbone, potential.converted.noise, potential.posterior
    assert isinstance(backbone, ConservativeBackbone)
    directions = directions.to(backbone.device, backbone.dtype)
    latent = torch.zeros(
        batch.n_structures, posterior.latent_numel, dtype=backbone.dtype, device=backbone.device
    )
    latent.requires_grad_(True)
    with torch.enable_grad(), state.perturbed("structure", posterior.sample(latent), rows_of(batch)):
        result = backbone.energy_of(batch)
        (slope,) = torch.autograd.grad(result.energy.sum(), latent, create_graph=True)
        for i, u in enumerate(directions):
            along = slope @ u
            grads = torch.autograd.grad(
                along.sum(),
                result.leaves,
                retain_graph=i + 1 < len(directions),
                allow_unused=True,
                materialize_grads=True,
            )
            forces, virial = (x.detach().double() for x in backbone.assemble(batch, grads))
            yield along.detach().double(), forces, virial


def _directions(rank: int, count: int | None, seed: int) -> Tensor:
    """(K, r) unit vectors, or K random orthonormal ones times sqrt(r/K)."""
    if count is None or count >= rank:
        return torch.eye(rank, dtype=torch.float64)
    random = normal(("directions", seed, count), rank * count).reshape(rank, count)
    orthonormal: Tensor = torch.linalg.qr(random).Q
    return orthonormal.T * math.sqrt(rank / count)
