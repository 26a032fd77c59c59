"""Write a source in another format; the counterpart of :func:`blip_ft.data.read.sources.load_source`.

=========================  ====================================================================
target                     what is written
=========================  ====================================================================
``.xyz``, ``.extxyz``      extended XYZ with ``REF_energy``, ``REF_forces``, ``REF_stress`` (9
(also ``.gz``)             numbers, positive = tensile), ``config_weight``, ``charge``, ``spin``,
                           ``group``, ``theory``, ``split``
``.traj``                  ASE trajectory
``.db``, ``.aselmdb``      ASE database; charge, spin, group, theory and split in ``data``
``.parquet``               the schema of this package
``.jsonl``, ``.json``      the same as json lines
``.npz``                   arrays with one entry per frame; all frames of the same atoms
a folder                   data set as on the Hugging Face hub: ``data/*.parquet`` by split, and a
                           data card ``README.md`` (:mod:`blip_ft.data.write.card`)
=========================  ====================================================================

Everything is in eV and Å, with the sign and order of ASE, and with all digits.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.db
import datasets
import numpy as np
from ase import Atoms
from ase.io.trajectory import Trajectory

from blip_ft.backbones import electrons
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.files import lmdb_backend
from blip_ft.data.read.hub import quiet
from blip_ft.data.write.card import Card, write_card
from blip_ft.data.write.extxyz import write_frame
from blip_ft.errors import DataError
from blip_ft.files import check_target, whole_path

#: bytes of a parquet file in a hub-style folder, about
SHARD = 400_000_000

Writer = Callable[[datasets.Dataset, Path, str], None]


def convert(
    frames: datasets.Dataset, target: str | Path, *, overwrite: bool = False, card: Card | None = None
) -> Path:
    """Write frames of the schema in the format that the target's name says.

    Args:
        frames: from :func:`blip_ft.data.read.sources.load_source`.
        target: file, or folder for a hub-style data set (a name without an ending).
        overwrite: replace what exists.
        card: what a hub-style folder says about the set.

    Returns:
        The path that was written; it appears when it is complete.

    Raises:
        DataError: an ending that is not known, or frames that the format cannot hold.
        BlipError: the target exists or cannot be written.
    """
    path = check_target(target, overwrite=overwrite)
    if not path.suffix:
        with whole_path(path, overwrite=overwrite) as folder:
            _hub_folder(frames, folder, card or Card(title=path.name))
        return path
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    writer = WRITERS.get(ending.lower())
    if writer is None:
        raise DataError(
            f"cannot write '{ending}'",
            file=str(path),
            remedy=f"use one of {', '.join(WRITERS)}, or a name without an ending for a hub-style folder",
        )
    with whole_path(path, overwrite=overwrite) as temporary:
        writer(frames, temporary, str(path))
    return path


# ---- ASE ---------------------------------------------------------------------------------------


def _extxyz(frames: datasets.Dataset, path: Path, name: str) -> None:
    del name
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        for row in frames:  # one by one: a list of all structures may not fit into memory
            write_frame(file, _with_ref_keys(row))


def _with_ref_keys(row: dict[str, Any]) -> Atoms:
    """Labels under the names of MACE, which no reader takes for results of another calculator."""
    atoms = to_atoms(row, labels=False)
    if row["energy"] is not None:
        atoms.info["REF_energy"] = row["energy"]
    if row["forces"] is not None:
        atoms.arrays["REF_forces"] = np.asarray(row["forces"])
    if row["stress"] is not None:
        xx, yy, zz, yz, xz, xy = row["stress"]
        atoms.info["REF_stress"] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    if row["atom_weight"] is not None:
        atoms.arrays["atom_weight"] = np.asarray(row["atom_weight"])
    atoms.info |= _about(row)
    return atoms


def _about(row: dict[str, Any]) -> dict[str, Any]:
    """Weight, charge, spin, group, theory and split, where they say something."""
    about: dict[str, Any] = {k: row[k] for k in ("group", "theory", "split") if row[k]}
    about |= {k: electrons.plain(row[k]) for k in electrons.KEYS if row[k] is not None}
    return about | ({"config_weight": row["weight"]} if row["weight"] != 1.0 else {})


def _traj(frames: datasets.Dataset, path: Path, name: str) -> None:
    del name
    with Trajectory(str(path), "w") as trajectory:
        for row in frames:
            atoms = to_atoms(row)
            atoms.info |= _about(row)
            if row["atom_weight"] is not None:
                atoms.info["atom_weight"] = np.asarray(row["atom_weight"])  # only ASE's own arrays are kept
            trajectory.write(atoms)


def _database(frames: datasets.Dataset, path: Path, name: str) -> None:
    del name
    with ase.db.connect(str(path), type="db", append=False) as database:
        _fill(database, frames)


def _lmdb(frames: datasets.Dataset, path: Path, name: str) -> None:
    database = lmdb_backend(name)(path, use_lock_file=False)
    with database:
        _fill(database, frames)
    path.with_name(f"{path.name}-lock").unlink(missing_ok=True)


def _fill(database: Any, frames: datasets.Dataset) -> None:
    for row in frames:
        about = _about(row)
        data: dict[str, Any] = {k: about.pop(k) for k in list(about) if k != "config_weight"}
        if row["atom_weight"] is not None:
            data["atom_weight"] = np.asarray(row["atom_weight"])
        database.write(to_atoms(row), key_value_pairs=about, data=data)


# ---- tables ------------------------------------------------------------------------------------


def _parquet(frames: datasets.Dataset, path: Path, name: str) -> None:
    del name
    with quiet():
        frames.to_parquet(str(path))


def _json(frames: datasets.Dataset, path: Path, name: str) -> None:
    del name
    with path.open("w", encoding="utf-8") as file:  # `datasets` keeps ten decimals
        for row in frames.with_format(None):
            file.write(f"{json.dumps(row)}\n")


def _npz(frames: datasets.Dataset, path: Path, name: str) -> None:
    numbers, pbc = frames[0]["numbers"], frames[0]["pbc"]
    labels = ("positions", "cells", "energies", "forces", "stress", *electrons.KEYS)
    arrays: dict[str, list[Any]] = {key: [] for key in labels}
    names = {"positions": "positions", "cells": "cell", "energies": "energy"}
    for i, row in enumerate(frames):
        if row["numbers"] != numbers or row["pbc"] != pbc:
            raise DataError(
                f"an .npz holds frames of the same atoms only; frame {i} differs from the first",
                file=name,
                frame=i,
                field="numbers, pbc",
                remedy="write extended XYZ or parquet",
            )
        for key, values in arrays.items():
            values.append(row[names.get(key, key)])
    kept: dict[str, Any] = {}
    for key, values in arrays.items():
        known = sum(v is not None for v in values)
        if known not in (0, len(values)):
            raise DataError(
                f"an .npz has each label for all frames or none; {known} of {len(values)} have it",
                file=name,
                field=key,
                remedy="write extended XYZ or parquet",
            )
        if known:
            kept[key] = np.asarray(values, dtype=np.float64)
    symbols = np.array(Atoms(numbers=numbers).get_chemical_symbols())
    with path.open("wb") as file:
        np.savez_compressed(file, symbols=symbols, pbc=np.asarray(pbc), **kept)


def _hub_folder(frames: datasets.Dataset, folder: Path, card: Card) -> None:
    (folder / "data").mkdir(parents=True)
    splits: dict[str, list[int]] = {}
    for index, split in enumerate(frames["split"]):
        splits.setdefault(split or "train", []).append(index)
    public = frames.remove_columns(["source", "frame"])  # paths of the owner's machine
    for split, indices in splits.items():
        part = public if len(splits) == 1 else public.select(indices)
        shards = max(1, math.ceil(part._estimate_nbytes() / SHARD))
        for k in range(shards):
            shard = part.shard(shards, k, contiguous=True)
            _parquet(shard, folder / "data" / f"{split}-{k:05d}-of-{shards:05d}.parquet", "")
    write_card(folder / "README.md", frames, {s: len(i) for s, i in splits.items()}, card)


WRITERS: dict[str, Writer] = {
    ".extxyz": _extxyz,
    ".xyz": _extxyz,
    ".extxyz.gz": _extxyz,
    ".xyz.gz": _extxyz,
    ".traj": _traj,
    ".db": _database,
    ".aselmdb": _lmdb,
    ".parquet": _parquet,
    ".jsonl": _json,
    ".json": _json,
    ".npz": _npz,
}
