"""The pretrained model's predictions as a piece: what a resumed run would have to ask it again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from blip_ft.data.batch.ledger import Known
from blip_ft.data.frame import fingerprint
from blip_ft.errors import DataError
from blip_ft.training.pieces import Pieces
from blip_ft.training.prepare import Prepared

NAME = "pretrained"


def keep_ledger(pieces: Pieces, prepared: Prepared) -> None:
    """Keep what the model has said, and what the data were."""
    if prepared.ledger is not None:
        about = {"data": _fingerprints(prepared), "versions": _versions(prepared)}
        pieces.keep_tensors(NAME, as_tensors(prepared.ledger.known), about)


def recall_ledger(pieces: Pieces) -> tuple[dict[bytes, Known], dict[str, Any] | None]:
    """What an earlier start of this run has kept, with fingerprints of its data and versions; nothing, and ``None``."""
    found = pieces.tensors(NAME)
    return ({}, None) if found is None else (from_tensors(found[0]), found[1])


def check_same(prepared: Prepared, before: dict[str, Any] | None, console: Console) -> None:
    """Raise unless the data are those that the run was begun with; tell if packages are not.

    Raises:
        DataError: a set has other frames.
    """
    if before is None:
        return
    now, then = _fingerprints(prepared), before["data"]
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            raise DataError(
                f"the frames of '{name}' have changed since this run was begun",
                field="data",
                remedy="put the files back as they were, or begin again: blip-finetune fit ... overwrite=true",
            )

    changed = [
        f"{name} {before['versions'].get(name)} -> {version}"
        for name, version in _versions(prepared).items()
        if before["versions"].get(name) != version
    ]
    if changed:
        console.print(
            f"other versions than at the start of this run ({', '.join(changed)}): the last digits may differ",
            style="yellow",
            markup=False,
        )


def _versions(prepared: Prepared) -> dict[str, str]:
    return {**prepared.potential.backbone.versions(), "torch": str(torch.__version__)}


def _fingerprints(prepared: Prepared) -> dict[str, str]:
    return {name: fingerprint(dataset.frames) for name, dataset in prepared.sets.items()}


def as_tensors(known: dict[bytes, Known]) -> dict[str, Tensor]:
    """Predictions as a few tensors: (F, 16) keys, (F,) energies, forces of all atoms, ..."""
    if not known:
        return {}
    values = list(known.values())
    out: dict[str, Any] = {
        "keys": np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1),
        "energy": np.array([k.energy for k in values]),
        "n_atoms": np.array([len(k.forces) for k in values]),
        "forces": np.concatenate([k.forces for k in values]),
        "has_stress": np.array([k.stress is not None for k in values]),
        "stress": np.array([np.zeros(6) if k.stress is None else k.stress for k in values]),
        "has_features": np.array([k.features is not None for k in values]),
    }
    rows = [(i, z, x) for i, k in enumerate(values) for z, x in (k.features or {}).items()]
    if rows:
        out["feature_place"] = np.array([(i, z) for i, z, _ in rows])
        out["features"] = np.stack([x for *_, x in rows])
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in out.items()}


def from_tensors(tensors: dict[str, Tensor]) -> dict[bytes, Known]:
    """The inverse of :func:`as_tensors`."""
    if not tensors:
        return {}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    features: list[dict[int, Any] | None] = [{} if has else None for has in arrays["has_features"]]
    for (i, z), x in zip(arrays.get("feature_place", ()), arrays.get("features", ()), strict=True):
        of = features[int(i)]
        assert of is not None
        of[int(z)] = x
    forces = np.split(arrays["forces"], np.cumsum(arrays["n_atoms"])[:-1])
    return {
        key.tobytes(): Known(float(e), f, s if has else None, x)
        for key, e, f, has, s, x in zip(
            arrays["keys"],
            arrays["energy"],
            forces,
            arrays["has_stress"],
            arrays["stress"],
            features,
            strict=True,
        )
    }
