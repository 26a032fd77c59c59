"""Which rows of a batch belong to which structure, as the variational layers ask for it."""

from __future__ import annotations

from blip_ft.backbones.protocol import Batch
from blip_ft.variational.noise import RowLayout


def rows_of(batch: Batch) -> dict[str, RowLayout]:
    """Layout of every kind of row."""
    return {kind: RowLayout.from_index(index, batch.n_structures) for kind, index in batch.rows.items()}
