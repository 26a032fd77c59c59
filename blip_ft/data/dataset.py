"""Frames as PyTorch sees them: graphs, labels and keys, and their batches.

A label that is missing is NaN, so that a loss masks it with ``isnan`` and shapes never depend on
what is labelled.

==================  ==============  =============  =========
label               shape           batched shape  unit
==================  ==============  =============  =========
``energy``          ()              (B,)           eV
``forces``          (n, 3)          (n, 3)         eV/Å
``stress``          (6,)            (B, 6)         eV/Å^3
==================  ==============  =============  =========

Stress has a meaning only where the structure is periodic in all three directions; on other
frames it is NaN whatever the source says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import torch.utils.data
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

from blip_ft.backbone import Backbone, Batch
from blip_ft.data.sources import grid


@dataclass
class Item:
    """One structure, ready to be batched.

    Attributes:
        atoms: the structure, without a calculator.
        graph: what :meth:`Backbone.graph` made of it.
        labels: float64 tensors, shapes and units in the module's table.
        key: identity of the structure, see :func:`content_key`.
    """

    atoms: Atoms
    graph: Any
    labels: dict[str, Tensor]
    key: int


class FrameDataset(torch.utils.data.Dataset[Item]):
    """Frames of the written schema with their graphs.

    Every item is made once and kept, since a fine-tuning set is small and graphs are the
    expensive part. With workers, each worker keeps those it made.

    Args:
        frames: rows of the schema (:data:`blip_ft.data.schema.FEATURES`).
        backbone: makes the graphs.
    """

    def __init__(self, frames: datasets.Dataset, backbone: Backbone) -> None:
        self.frames, self.backbone = frames, backbone
        self._items: list[Item | None] = [None] * len(frames)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        item = self._items[index]
        if item is None:
            item = self._items[index] = make_item(self.frames[index], self.backbone)
        return item


def make_item(row: Mapping[str, Any], backbone: Backbone) -> Item:
    """Structure, graph, labels and key of one row of the schema."""
    atoms = to_atoms(row, labels=False)
    return Item(
        atoms=atoms,
        graph=backbone.graph(atoms),
        labels=_labels(row),
        key=content_key(row["numbers"], row["positions"], row["cell"]),
    )


def collate(backbone: Backbone, items: Sequence[Item]) -> Batch:
    """A batch with labels and keys; leaves the items unchanged."""
    batch = backbone.collate([item.atoms for item in items], [item.graph for item in items])
    batch.keys = [item.key for item in items]
    batch.labels = {
        "energy": torch.stack([item.labels["energy"] for item in items]),
        "forces": torch.cat([item.labels["forces"] for item in items]),
        "stress": torch.stack([item.labels["stress"] for item in items]),
    }
    return batch


def to_atoms(row: Mapping[str, Any], *, labels: bool = True) -> Atoms:
    """The structure of one row of the schema.

    Args:
        row: one row.
        labels: put the labels that exist into a ``SinglePointCalculator``.
    """
    atoms = Atoms(numbers=row["numbers"], positions=row["positions"], cell=row["cell"], pbc=row["pbc"])
    if labels:
        results = {k: row[k] for k in ("energy", "forces", "stress") if row[k] is not None}
        if results:
            arrays = {k: v if k == "energy" else np.asarray(v, dtype=float) for k, v in results.items()}
            atoms.calc = SinglePointCalculator(atoms, **arrays)
    return atoms


def content_key(numbers: Any, positions: Any, cell: Any) -> int:
    """Identity of a structure: a 63-bit hash of numbers, positions and cell to 1e-6 Å.

    It does not depend on the file, its format, or the place in it, so that noise keyed by it
    does not either. It does depend on the order of the atoms and on translations.
    """
    digest = hashlib.blake2b(np.asarray(numbers, dtype="<i8").tobytes(), digest_size=8)
    digest.update(grid(positions, 1e-6).tobytes())
    digest.update(grid(cell, 1e-6).tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def _labels(row: Mapping[str, Any]) -> dict[str, Tensor]:
    missing = float("nan")
    n = len(row["numbers"])
    stress = row["stress"] if all(row["pbc"]) else None
    return {
        "energy": torch.tensor(missing if row["energy"] is None else row["energy"], dtype=torch.float64),
        "forces": _tensor(row["forces"], (n, 3)),
        "stress": _tensor(stress, (6,)),
    }


def _tensor(value: Any, shape: tuple[int, ...]) -> Tensor:
    if value is None:
        return torch.full(shape, float("nan"), dtype=torch.float64)
    return torch.as_tensor(np.asarray(value, dtype=np.float64)).reshape(shape)
