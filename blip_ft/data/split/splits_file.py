"""A division that was written down: ``splits.json`` in a run's folder, and runs that follow one.

Frames are known by their content, so that a division holds when files are renamed, converted,
shuffled or extended: by a hash of numbers, positions and cell to 1e-6 Å (and charge and spin), or, since text formats
round and a rounded number may cross the edge of a grid cell, by either of two hashes to 1e-3 Å on
grids that are half a step apart.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from blip_ft.backbones import electrons
from blip_ft.data.frame import KEY_COLUMNS, grid, row_key
from blip_ft.errors import DataError

FORMAT = 1
_COARSE = 1e-3  # Å


def to_json(roles: Mapping[str, datasets.Dataset], rule: str, dropped: Sequence[str]) -> dict[str, Any]:
    """What ``splits.json`` holds.

    Args:
        roles: frames of every role; test sets as ``test/seen`` and ``test/<unseen>``.
        rule: how they were divided, in words.
        dropped: frames in no role, with the reason.
    """
    return {
        "format": FORMAT,
        "rule": rule,
        "dropped": list(dropped),
        "roles": {
            role: [
                {"keys": key, "source": source, "frame": frame}
                for key, source, frame in zip(keys(part), part["source"], part["frame"], strict=True)
            ]
            for role, part in roles.items()
        },
    }


def keys(frames: datasets.Dataset) -> list[tuple[str, str, str]]:
    """Three hashes of every frame: fine, and coarse on two grids."""
    return [frame_keys(row) for row in frames.select_columns([*KEY_COLUMNS, *electrons.KEYS])]


def frame_keys(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The three hashes of one row of the schema."""
    numbers, state = row["numbers"], electrons.state_bytes(row.get("charge"), row.get("spin"))
    geometry = np.concatenate([np.asarray(row[k], dtype=float) for k in ("positions", "cell")])
    return (
        f"{row_key(row):016x}",
        _hash(numbers, grid(geometry, _COARSE), state),
        _hash(numbers, grid(geometry + _COARSE / 2, _COARSE), state),
    )


def roles_by_key(path: str | Path) -> dict[str, str]:
    """The role that a written division gives to every key of :func:`frame_keys`.

    Args:
        path: ``splits.json``.

    Raises:
        DataError: no such file, or not a division.
    """
    return {key: role for key, (role, _) in _owners(_read(str(path))).items()}


def _hash(numbers: Sequence[int], cells: Any, state: bytes) -> str:
    digest = hashlib.blake2b(np.asarray(numbers, dtype="<i8").tobytes(), digest_size=8)
    digest.update(cells.tobytes())
    digest.update(state)
    return digest.hexdigest()


def from_file(
    path: str | None, source: datasets.Dataset, wanted: Sequence[str], name: str
) -> tuple[dict[str, datasets.Dataset], list[str], list[str]]:
    """Divide ``source`` as the file says.

    Args:
        path: ``splits.json``.
        source: frames of ``data.train``.
        wanted: held-out roles that the recipe does not give otherwise.
        name: of the source, for messages.

    Returns:
        Frames of each role, sentences on what was done, and frames left out with the reason.

    Raises:
        DataError: no such file or not a division, or frames of ``train`` or of a wanted role that
            the source does not have.
    """
    roles = _read(path)
    owner = _owners(roles)
    members: dict[str, list[int]] = defaultdict(list)
    seen: dict[str, set[int]] = defaultdict(set)
    dropped = []
    for index, found_keys in enumerate(keys(source)):
        role, place = next((owner[k] for k in found_keys if k in owner), ("", -1))
        if role == "train" or role.partition("/")[0] in wanted:
            members[role].append(index)
            seen[role].add(place)
        else:
            row = source[index]
            reason = f"{role} is given otherwise" if role else "not in the written division"
            dropped.append(f"{row['source']}, frame {row['frame']}: {reason}")
    for role in ("train", *wanted):
        parts = [r for r in roles if r.partition("/")[0] == role]
        if not parts and role != "test":
            raise DataError(
                f"it has no role '{role}'", file=path, remedy="give that role a source of its own"
            )
        # copies of one structure share their keys: what counts is that each key was found
        lacking = sum(len({owner[k[0]] for k in roles[r]} - {(r, i) for i in seen[r]}) for r in parts)
        if lacking:
            raise DataError(
                f"{lacking} frames of {role} are not in {name}",
                file=path,
                field="data.split.file",
                remedy="give the source that was divided, or divide it anew",
            )
    divided = {role: source.select(indices) for role, indices in members.items()}
    return divided, [f"Divided as {path} says."], dropped


def _owners(roles: Mapping[str, list[tuple[str, ...]]]) -> dict[str, tuple[str, int]]:
    """Role and place of every key; fine keys come first, coarse ones only where they are unique."""
    owner = {k[0]: (role, i) for role, members in roles.items() for i, k in enumerate(members)}
    coarse: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for members in roles.values():
        for k in members:
            for key in k[1:]:
                coarse[key].add(owner[k[0]])
    return {key: next(iter(places)) for key, places in coarse.items() if len(places) == 1} | owner


def _read(path: str | None) -> dict[str, list[tuple[str, ...]]]:
    if path is None:
        raise DataError(
            "data.split.by=file needs a file",
            field="data.split.file",
            remedy="give the splits.json of a run's folder",
        )
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
        roles = {
            str(role): [tuple(map(str, frame["keys"])) for frame in part]
            for role, part in tree["roles"].items()
        }
    except OSError as error:
        raise DataError(
            f"cannot be opened: {error.strerror or error}", file=path, remedy="check the path"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"not a written division: {type(error).__name__} {error}",
            file=path,
            remedy="give the splits.json of a run's folder",
        ) from error
    if tree.get("format") != FORMAT:
        raise DataError(
            f"of format {tree.get('format')}, this version reads {FORMAT}",
            file=path,
            remedy="use the version of blip_ft that wrote it",
        )
    return roles
