"""Frames as PyTorch sees them: graphs, labels and keys, and their batches.

A label that is missing is NaN, so that a loss masks it with ``isnan`` and shapes never depend on
what is labelled.

==================  ==============  =============  =========
label               shape           batched shape  unit
==================  ==============  =============  =========
``energy``          ()              (B,)           eV
``forces``          (n, 3)          (n, 3)         eV/Å
``stress``          (6,)            (B, 6)         eV/Å^3
``weight``          ()              (B,)           factor of the structure's log likelihood
``atom_weight``     (n,)            (n,)           factor of each atom's force terms
==================  ==============  =============  =========

Stress has a meaning only where the structure is periodic in all three directions; on other
frames it is NaN whatever the source says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
import torch.utils.data
from ase import Atoms
from torch import Tensor

from blip_ft.backbones.protocol import Backbone, Batch
from blip_ft.data.frame import row_key, to_atoms
from blip_ft.errors import DataError
from blip_ft.system.side_by_side import cut

_ONE = torch.ones((), dtype=torch.float64)


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


@dataclass
class GraphCache:
    """Memory for items that are kept, shared by the sets of a run.

    Attributes:
        limit: bytes; what comes after is made anew each time.
        used: bytes so far, about.
    """

    limit: float = math.inf
    used: float = 0.0

    def keeps(self, item: Item) -> bool:
        """Whether there is room for one more item; counts it if so."""
        size = 0 if math.isinf(self.limit) else bytes_of(item.graph)
        if self.used + size > self.limit:
            return False
        self.used += size
        return True


class FrameDataset(torch.utils.data.Dataset[Item]):
    """Frames of the written schema with their graphs.

    Every item is made once and kept while there is room, since a fine-tuning set is small and graphs
    are the expensive part. With workers, each worker keeps those it made.

    Args:
        frames: rows of the schema (:data:`blip_ft.data.read.schema.FEATURES`).
        backbone: makes the graphs.
        cache: room for items that are kept; by default without limit.
    """

    def __init__(self, frames: datasets.Dataset, backbone: Backbone, cache: GraphCache | None = None) -> None:
        self.frames, self.backbone = frames, backbone
        self.cache = GraphCache() if cache is None else cache
        self._items: list[Item | None] = [None] * len(frames)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        item = self._items[index]
        if item is None:
            item = make_item(self.frames[index], self.backbone)
            if self.cache.keeps(item):
                self._items[index] = item
        return item

    def key(self, index: int) -> int:
        """Identity of a structure, without its graph."""
        item = self._items[index]
        if item is not None:
            return item.key
        return row_key(self.frames[index])

    def select(self, index: Sequence[int]) -> FrameDataset:
        """Some of the frames, with the graphs that exist."""
        out = FrameDataset(self.frames.select(index), self.backbone, self.cache)
        out._items = [self._items[i] for i in index]
        return out

    def relabelled(self, frames: datasets.Dataset) -> FrameDataset:
        """The same structures with the labels of other rows, with the graphs that exist."""
        out = FrameDataset(frames, self.backbone, self.cache)
        out._items = [
            None if item is None else replace(item, labels=_labels(row))
            for item, row in zip(self._items, frames, strict=True)
        ]
        return out

    @property
    def total_weight(self) -> float:
        """Sum of the frames' weights: the N of the ELBO; their number where none has a weight."""
        if "weight" not in self.frames.column_names:
            return float(len(self))
        return math.fsum(1.0 if w is None else w for w in self.frames["weight"])

    def sizes(self, by: str) -> list[int]:
        """Atoms or edges of each structure, for batches of bounded size; ``edges`` needs the graphs."""
        if by == "atoms":
            return [len(numbers) for numbers in self.frames["numbers"]]
        sizes = []
        for index in range(len(self)):
            item = self[index]
            rows = self.backbone.collate([item.atoms], [item.graph]).rows
            sizes.append(max(1, int((rows["edge"] if "edge" in rows else rows["atom"]).numel())))
        return sizes


def bytes_of(value: Any, depth: int = 6) -> int:
    """Bytes of all tensors and arrays in nested containers and objects, about."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.nbytes)
    if depth == 0:
        return 0
    if isinstance(value, Mapping):
        return sum(bytes_of(v, depth - 1) for v in value.values())
    if isinstance(value, list | tuple | set):
        return sum(bytes_of(v, depth - 1) for v in value)
    return bytes_of(vars(value), depth - 1) if hasattr(value, "__dict__") else 0


def make_item(row: Mapping[str, Any], backbone: Backbone) -> Item:
    """Structure, graph, labels and key of one row of the schema.

    Raises:
        DataError: the model cannot describe the structure; names the row's file and frame.
    """
    atoms = to_atoms(row, labels=False)
    try:
        graph = backbone.graph(atoms)
    except DataError as error:
        if error.file is not None or row.get("source") is None:
            raise
        raise DataError(
            error.problem, remedy=error.remedy, file=row["source"], frame=row["frame"], field=error.field
        ) from error
    return Item(atoms=atoms, graph=graph, labels=_labels(row), key=row_key(row))


def collate(backbone: Backbone, items: Sequence[Item], *, parts: int = 1, copies: bool = False) -> Batch:
    """A batch with labels and keys; leaves the items unchanged.

    Args:
        backbone: makes the batch.
        items: structures.
        parts: also put them into up to so many batches of about as many atoms (``Batch.parts``).
        copies: also say how to make copies (``Batch.copies``).
    """
    batch = backbone.collate([item.atoms for item in items], [item.graph for item in items])
    batch.keys = [item.key for item in items]
    if torch.utils.data.get_worker_info() is None:  # between processes they would be sent beside the batch
        batch.items = tuple(items)
    batch.labels = {
        "energy": torch.stack([item.labels["energy"] for item in items]),
        "forces": torch.cat([item.labels["forces"] for item in items]),
        "stress": torch.stack([item.labels["stress"] for item in items]),
        "weight": torch.stack([item.labels.get("weight", _ONE) for item in items]),
        "atom_weight": torch.cat(
            [
                item.labels.get("atom_weight", torch.ones(len(item.atoms), dtype=torch.float64))
                for item in items
            ]
        ),
    }
    if copies:
        batch.copies = backbone.copies([item.atoms for item in items], [item.graph for item in items])
    pieces = cut([len(item.atoms) for item in items], parts)
    if len(pieces) > 1:
        batch.parts = tuple(collate(backbone, items[p.start : p.stop], copies=copies) for p in pieces)
    return batch


def _labels(row: Mapping[str, Any]) -> dict[str, Tensor]:
    missing = float("nan")
    n = len(row["numbers"])
    stress = row["stress"] if all(row["pbc"]) else None
    forces = _tensor(row["forces"], (n, 3))
    weights = torch.ones(n, dtype=torch.float64)
    if row.get("atom_weight") is not None:
        weights = _tensor(row["atom_weight"], (n,))
        forces[weights == 0] = missing  # a label that counts nothing is none, in metrics too
    return {
        "energy": torch.tensor(missing if row["energy"] is None else row["energy"], dtype=torch.float64),
        "forces": forces,
        "stress": _tensor(stress, (6,)),
        "weight": torch.tensor(1.0 if row.get("weight") is None else row["weight"], dtype=torch.float64),
        "atom_weight": weights,
    }


def _tensor(value: Any, shape: tuple[int, ...]) -> Tensor:
    if value is None:
        return torch.full(shape, float("nan"), dtype=torch.float64)
    return torch.as_tensor(np.asarray(value, dtype=np.float64)).reshape(shape)
