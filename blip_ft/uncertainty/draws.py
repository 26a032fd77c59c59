"""Evaluate the fixed draws of a potential, several in one call where structures are small.

A call of a small structure costs what it takes to start its operations, on a GPU most of all. Then copies of
the batch, each with the weights of its own draw (the mechanism of training noise, ``structure``), are
evaluated together. Where the operations themselves are what costs, one draw after the other is faster: a
draw's weights are then the same for all structures, one matrix product instead of many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.families.model import drawing
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.system.side_by_side import side_by_side, width
from blip_ft.uncertainty.moments import BatchMoments, to_double
from blip_ft.variational.noise import Noise

#: rows (edges, as a rule) of all copies up to which draws are evaluated together, by type of device
TOGETHER = {"cpu": 512, "cuda": 65536}
#: the same for one structure alone: on one CPU core 8 draws of quartz (9 atoms) take 2.0 (small MACE) to 5.6
#: (UMA) calls in place of 8 to 9, 8.5 with CHGNet as without; several structures share what a call costs already
TOGETHER_ALONE = {"cpu": 16384, "cuda": 65536}
#: structures of all copies: each has weights of its own
COPIES = 64


def evaluate_draws(
    potential: BayesianPotential,
    batch: Batch,
    n_draws: int,
    *,
    stress: bool,
    chosen: Sequence[int] | None = None,
) -> list[Prediction]:
    """Predictions of draws, float64, without a graph.

    Args:
        potential: its posterior is ready.
        batch: structures.
        n_draws: K, on which each draw depends.
        stress: also predict stress.
        chosen: numbers of the draws, below K; by default all.
    """
    wanted = range(n_draws) if chosen is None else chosen
    together, copies = _together(potential, batch, len(wanted)), batch.copies
    threads = width(potential.backbone.device) if _rows(batch) <= TOGETHER_ALONE["cpu"] else 1
    size = 1 if copies is None else max(1, min(together, -(-len(wanted) // threads)))

    def work(chosen: Sequence[int]) -> list[Prediction]:
        if len(chosen) < 2 or copies is None:
            return [to_double(potential(batch, Noise("draw", draw=k), stress=stress)) for k in chosen]
        # copy k of the whole batch follows copy k - 1
        of_each = [k for k in chosen for _ in range(batch.n_structures)]
        out = potential(copies(len(chosen)), Noise("structure", draw=of_each), stress=stress)
        return _split(to_double(out), len(chosen))

    pieces = [wanted[k : k + size] for k in range(0, len(wanted), size)]
    with torch.no_grad(), drawing(potential, n_draws, potential.drawing[1]):
        return [draw for some in side_by_side(work, pieces, threads=threads) for draw in some]


def sampling_error(n_draws: int, *, paired: bool = False) -> float:
    """Relative std of a std that is estimated from K centred draws, 1/sqrt(2 (K - 1)), or K/2 pairs, 1/sqrt(K)."""
    return 1 / math.sqrt(n_draws if paired else 2 * (n_draws - 1))


def moments_of_draws(
    potential: BayesianPotential, batch: Batch, n_draws: int, *, stress: bool
) -> BatchMoments:
    """Mean and covariance over the draws alone, at full width; arguments as for :func:`evaluate_draws`.

    Spreads are those around the mean, or of half the differences of pairs, which are free of second order.
    """
    draws, (_, amplitude) = evaluate_draws(potential, batch, n_draws, stress=stress), potential.drawing

    def deviations(values: Tensor) -> Tensor:
        paired = potential.posterior.paired
        off = (values[::2] - values[1::2]) / 2 if paired else values - values.mean(dim=0)
        return off / amplitude

    def over(field: str) -> tuple[Tensor | None, Tensor | None]:
        """Mean and deviations (K, ...) of what the model predicts."""
        values = [v for v in (getattr(d, field) for d in draws) if v is not None]
        stacked = torch.stack(values) if values else None
        return (None, None) if stacked is None else (stacked.mean(dim=0), deviations(stacked))

    def std(off: Tensor | None) -> Tensor | None:
        return None if off is None else off.square().mean(dim=0).sqrt()

    energy, energy_off = over("energy")
    forces, forces_off = over("forces")
    stresses, stress_off = over("stress")
    nodes, nodes_off = over("node_energy")
    features, _ = over("node_features")
    assert energy is not None
    assert forces_off is not None
    return BatchMoments(
        mean=Prediction(energy, forces, stresses, nodes, features),
        energy_std=std(energy_off),
        forces_cov=torch.einsum("kni,knj->nij", forces_off, forces_off) / len(forces_off),
        stress_std=std(stress_off),
        node_energy_std=std(nodes_off),
        sampling_error=sampling_error(n_draws, paired=potential.posterior.paired),
    )


def _together(potential: BayesianPotential, batch: Batch, n_draws: int) -> int:
    """Draws per call."""
    if not potential.posterior.draws_are_weights:
        return 1
    most = TOGETHER_ALONE if batch.n_structures == 1 else TOGETHER
    fitting = most.get(potential.backbone.device.type, 0) // max(1, _rows(batch))
    return min(n_draws, fitting, COPIES // batch.n_structures)


def _rows(batch: Batch) -> int:
    """Rows of the most frequent kind."""
    return max(len(index) for index in batch.rows.values())


def _split(prediction: Prediction, n: int) -> list[Prediction]:
    """The predictions of n copies."""

    def parts(value: Tensor | None) -> list[Tensor | None]:
        return [None] * n if value is None else list(value.chunk(n))

    fields = ("energy", "forces", "stress", "node_energy", "node_features")
    columns = zip(*(parts(getattr(prediction, f)) for f in fields), strict=True)
    return [Prediction(**dict(zip(fields, column, strict=True))) for column in columns]
