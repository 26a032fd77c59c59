"""What the pretrained model says about each frame, asked once.

The label report, the energy references and the pretrained model's row of the final report all need the same
predictions. Whoever asks first has them made, and all use the graphs of the same items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray

from blip_ft.backbones import electrons
from blip_ft.backbones.protocol import Backbone
from blip_ft.data.batch.dataset import Item
from blip_ft.errors import DataError
from blip_ft.system.out_of_memory import by_halves

Floats = NDArray[np.float64]

#: atoms per call of the model, which takes some MB for each while it differentiates
BATCH_ATOMS = 400
#: structures per call
BATCH = 32


@dataclass(frozen=True)
class Known:
    """What the model says about one structure, float64; eV and Å.

    Attributes:
        energy: eV, the model's own, without references.
        forces: (n, 3) eV/Å.
        stress: (6,) eV/Å^3, or ``None`` where there is none.
        features: {element: (f,) sum of the model's features of its atoms}, or ``None``.
    """

    energy: float
    forces: Floats
    stress: Floats | None
    features: dict[int, Floats] | None


class Ledger:
    """Predictions of a model that does not change, by the content of the structure.

    Args:
        backbone: the pretrained model. It may be converted between two questions, as long as its mean stays
            where it is: :meth:`close` before that moves.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.closed = False
        self._known: dict[bytes, Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def known(self) -> dict[bytes, Known]:
        """All predictions so far, by :func:`exact_key`."""
        return dict(self._known)

    def take(self, known: Mapping[bytes, Known]) -> None:
        """Predictions that the same model has made before."""
        self._known.update(known)

    def close(self) -> None:
        """Answer from memory alone from now on: the model is no longer the pretrained one."""
        self.closed = True

    def ask(self, items: Iterable[Item], progress: Callable[[int], Any] = lambda n: None) -> list[Known]:
        """Predictions for structures, in their order; what is not known yet is evaluated in batches.

        Args:
            items: with graphs; an iterator is never held as a whole.
            progress: called with the number of structures done after each batch.

        Raises:
            DataError: the model predicts no forces.
            RuntimeError: a structure is not known, and the ledger is closed.
        """
        out: list[Known] = []
        for chunk in _chunks(items):
            keys = [exact_key(item.atoms) for item in chunk]
            # a structure that comes twice is asked about once
            new = {key: item for key, item in zip(keys, chunk, strict=True) if key not in self._known}
            if new:
                self._known.update(zip(new, self._ask_model(list(new.values())), strict=True))
            out += [self._known[key] for key in keys]
            progress(len(chunk))
        return out

    def _ask_model(self, items: Sequence[Item]) -> list[Known]:
        """One call, or by halves where memory runs out."""

        def work(some: range) -> list[Known]:
            return self._predict(items[some.start : some.stop])

        sizes = [len(item.atoms) for item in items]
        made = by_halves(work, range(len(items)), sizes, what="predicting")
        return [known for part in made for known in part]

    def _predict(self, items: Sequence[Item]) -> list[Known]:
        if self.closed:
            raise RuntimeError("the model has been trained since: it cannot say what it said before")
        backbone, structures = self.backbone, [item.atoms for item in items]
        batch = backbone.collate(structures, [item.graph for item in items]).to(backbone.device)
        with torch.no_grad():  # the backbone switches autograd on for its own forces
            p = backbone(batch, forces=True, stress=True)
        if p.forces is None:
            raise DataError("the model predicts no forces", remedy="choose another model")
        ends = np.cumsum([len(a) for a in structures])[:-1]
        forces = np.split(_array(p.forces), ends)
        features = [None] * len(items) if p.node_features is None else np.split(_array(p.node_features), ends)
        stress = [None] * len(items) if p.stress is None else _array(p.stress)
        return [
            Known(float(e), f, None if s is None or not np.isfinite(s).all() else s, _sums(a, x))
            for a, e, f, s, x in zip(structures, p.energy, forces, stress, features, strict=True)
        ]


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Up to :data:`BATCH` structures of up to :data:`BATCH_ATOMS` atoms together, at least one."""
    chunk: list[Item] = []
    for item in items:
        n = sum(len(other.atoms) for other in chunk) + len(item.atoms)
        if chunk and (len(chunk) == BATCH or n > BATCH_ATOMS):
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk


def exact_key(atoms: Atoms) -> bytes:
    """A hash of all that a model sees, to the last digit (``content_key`` forgives 1e-6 Å and the periodicity)."""
    digest = hashlib.blake2b(atoms.numbers.astype("<i8").tobytes(), digest_size=16)
    for values in (atoms.positions, atoms.cell.array, atoms.pbc):
        digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    # as given: a model has its own default for a frame that says nothing
    digest.update(repr(sorted(electrons.given(atoms.info).items())).encode() if atoms.info else b"")
    return digest.digest()


def _array(tensor: torch.Tensor) -> Floats:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)


def _sums(atoms: Atoms, features: Floats | None) -> dict[int, Floats] | None:
    if features is None:
        return None
    return {int(z): features[atoms.numbers == z].sum(axis=0) for z in np.unique(atoms.numbers)}
