"""Evaluate the fixed draws of a potential, several in one call where structures are small.

A call of a small structure costs what it takes to start its operations, on a GPU most of all. Then copies of
the batch, each with the weights of its own draw (the mechanism of training noise, ``structure``), are
evaluated together. Where the operations themselves are what costs, one draw after the other is faster: a
draw's weights are then the same for all structures, one matrix product instead of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from blip_ft.backbone import Batch, Prediction
from blip_ft.potential import BayesianPotential
from blip_ft.uncertainty.moments import to_double

#: rows (edges, as a rule) of all copies up to which draws are evaluated together, by type of device: on one CPU
#: core 8 draws of NH3 (12 edges) take 2.6 to 3.2 calls instead of 10, of quartz (some 500 edges) 10 instead of 8
TOGETHER = {"cpu": 512, "cuda": 65536}
#: structures of all copies: each has weights of its own
COPIES = 64


def evaluate_draws(
    potential: BayesianPotential, batch: Batch, n_draws: int, *, stress: bool
) -> list[Prediction]:
    """Predictions of the draws 0 to ``n_draws`` - 1, float64, without a graph.

    Args:
        potential: its posterior is ready.
        batch: structures.
        n_draws: K.
        stress: also predict stress.
    """
    together = _together(potential, batch, n_draws)
    with torch.no_grad(), _numbered(potential, n_draws):
        if together < 2 or batch.copies is None:
            return [to_double(potential(batch, mode="draw", draw=k, stress=stress)) for k in range(n_draws)]
        out: list[Prediction] = []
        latents = potential.draw_latents(n_draws)
        for first in range(0, n_draws, together):
            chosen = latents[first : first + together]
            copies = batch.copies(len(chosen))
            # copy k of the whole batch follows copy k - 1
            latent = chosen.repeat_interleave(batch.n_structures, dim=0)
            prediction = to_double(potential(copies, mode="structure", latent=latent, stress=stress))
            out += _split(prediction, len(chosen))
        return out


def _together(potential: BayesianPotential, batch: Batch, n_draws: int) -> int:
    """Draws per call."""
    if not potential.posterior.draws_are_weights:
        return 1
    rows = max(len(index) for index in batch.rows.values())
    fitting = TOGETHER.get(potential.backbone.device.type, 0) // max(1, rows)
    return min(n_draws, fitting, COPIES // batch.n_structures)


def _split(prediction: Prediction, n: int) -> list[Prediction]:
    """The predictions of n copies."""

    def parts(value: Tensor | None) -> list[Tensor | None]:
        return [None] * n if value is None else list(value.chunk(n))

    fields = ("energy", "forces", "stress", "node_energy", "node_features")
    columns = zip(*(parts(getattr(prediction, f)) for f in fields), strict=True)
    return [Prediction(**dict(zip(fields, column, strict=True))) for column in columns]


@contextmanager
def _numbered(potential: BayesianPotential, n_draws: int) -> Iterator[None]:
    """Draws depend on their number: it is part of the potential's state."""
    before, potential.n_draws = potential.n_draws, n_draws
    try:
        yield
    finally:
        potential.n_draws = before
