"""``.npz`` archives of many frames: Si-ZEO22, rMD17, MD17 and others like them.

Arrays with one entry per frame are cut into frames; ``symbols`` or ``numbers`` may be the same for
all. Archives are never unpickled: an array of Python objects is read only if it is a list of texts
(chemical symbols), by an unpickler that builds nothing else.
"""

from __future__ import annotations

import codecs
import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip_ft.data.read.layouts import STRUCTURE, recognise
from blip_ft.data.read.problems import unreadable
from blip_ft.data.read.schema import RawFrame
from blip_ft.data.read.tables import from_row
from blip_ft.errors import DataError

#: names of labels in archives -> names that the schema knows
_LABELS = {"energies": "energy", "E": "energy", "F": "forces", "stresses": "stress"}


def npz_frames(path: Path, name: str, fields: Mapping[str, str]) -> Iterator[RawFrame]:
    """Frames of one archive.

    Raises:
        DataError: damaged archive, no positions, or arrays whose first axes disagree.
    """
    arrays = _arrays(path, name)
    key = fields.get("positions") or next((n for n in STRUCTURE["positions"] if n in arrays), None)
    if key is None or key not in arrays:
        raise DataError(
            f"no array of positions; there are: {', '.join(sorted(arrays))}",
            file=name,
            field="positions",
            remedy="say which array it is: data.fields: {positions: NAME}",
        )
    positions = arrays[key]
    if positions.ndim == 2:
        positions = arrays[key] = positions[None]
        arrays = {k: v[None] if k != key else v for k, v in arrays.items()}
    if positions.ndim != 3 or positions.shape[2] != 3:
        raise DataError(
            f"shape {positions.shape}, expected (frames, atoms, 3)",
            file=name,
            field=key,
            remedy="mend the archive, or name another array in data.fields",
        )
    count, layout = len(positions), recognise(set(arrays))
    species = fields.get("numbers") or next((n for n in STRUCTURE["numbers"] if n in arrays), "")
    cells = {*STRUCTURE["cell"], fields.get("cell", "")}
    shared = {k for k, v in arrays.items() if _shared(k, v, species, cells)}
    for label, array in arrays.items():
        if label not in shared and len(array) != count and _is_known(label, fields):
            raise DataError(
                f"{len(array)} entries for {count} frames",
                file=name,
                field=label,
                remedy="the archive is mixed up: every label needs one entry per frame",
            )
    for frame in range(count):
        row = {k: v if k in shared else v[frame] for k, v in arrays.items() if k in shared or len(v) == count}
        row = {_renamed(k, row, fields): v for k, v in row.items()}
        yield from_row(row, name, "", frame, fields, layout)


def _shared(key: str, array: NDArray[Any], species: str, cells: set[str]) -> bool:
    """The same for all frames: numbers, one cell, one pbc, single values."""
    if key == species:
        return array.ndim == 1
    if key in cells:
        return array.shape in {(3, 3), (9,)}
    return array.ndim == 0 or (key in STRUCTURE["pbc"] and array.shape == (3,))


def _is_known(label: str, fields: Mapping[str, str]) -> bool:
    names = {n for group in STRUCTURE.values() for n in group} | set(_LABELS) | set(_LABELS.values())
    return label in names | set(fields.values())


def _renamed(key: str, row: Mapping[str, Any], fields: Mapping[str, str]) -> str:
    """``energies`` as ``energy`` ..., unless the recipe names that array or both are there."""
    other = _LABELS.get(key)
    return key if other is None or other in row or key in fields.values() else other


# ---- reading -----------------------------------------------------------------------------------


def _arrays(path: Path, name: str) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                Path(entry).stem: _array(archive.read(entry), entry)
                for entry in archive.namelist()
                if entry.endswith(".npy")
            }
    except Exception as error:  # damaged zip, bad header, refused pickle
        raise unreadable(name, error, "npz") from error


def _array(content: bytes, entry: str) -> NDArray[Any]:
    stream = io.BytesIO(content)
    try:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
    # numpy's header is read again: what follows it is the pickle
    stream.seek(0)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    read(stream)
    texts = _Texts(stream).load()
    if not isinstance(texts, np.ndarray) or not all(isinstance(t, str) for t in texts.ravel()):
        raise pickle.UnpicklingError(f"'{entry}' holds Python objects")
    return texts.astype(str)


class _Texts(pickle.Unpickler):
    """Builds numpy arrays of texts and nothing else."""

    _ALLOWED = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Only what an array of objects needs."""
        if (module, name) == ("_codecs", "encode"):  # bytes in old protocols
            return codecs.encode
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            return self._ALLOWED[name]
        raise pickle.UnpicklingError(f"refused to load {module}.{name}: the file may run code")
