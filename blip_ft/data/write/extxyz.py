"""Extended XYZ that ASE and this package read back equal, whatever ``info`` and ``arrays`` hold.

ASE 3.29 writes eight decimals per atom, an empty text, an empty array or a line break such that the key
behind it is gone when it reads the file, a text "5" such that it comes back as a number, and a list of one
number as a number. Here every number has all its digits, and what plain text cannot hold is written as
JSON, which ASE's reader knows (``key="_JSON ..."``).

What has no place of its own gets another one, so that nothing is lost:

=============================================  ======================================================
value                                          where
=============================================  ======================================================
an array that cannot be columns (texts that    the comment line, under its name
are empty or have white space, more than two
dimensions, no column)
an array called as a part of the format or     columns ``atom_NAME``
as a property of the whole structure
info called as a part of the format, or as a   ``info_NAME``
property of another shape (``virial`` of three
numbers)
what JSON has not (bytes, complex numbers)     left out, with a Python warning
=============================================  ======================================================

Lists and tuples come back as arrays where all their members are numbers, an array (n, 1) as (n,). Lists of
lists of different lengths stop ASE's reader; they are written as a mapping from :data:`UNEVEN` to the list, which
our reader undoes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.constraints import FixAtoms, FixCartesian
from ase.io.extxyz import (
    PROPERTY_NAME_MAP,
    REV_PROPERTY_NAME_MAP,
    SPECIAL_3_3_KEYS,
    key_val_str_to_dict,
    per_config_properties,
)
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray

from blip_ft.data.read.comment_line import UNEVEN, quoted

#: names that the format itself uses, in the comment line and for columns
_RESERVED_KEYS = frozenset({"Lattice", "Properties", "pbc"})
_RESERVED_COLUMNS = frozenset(
    {"numbers", "positions", "symbols", "species", "pos", "Z", "move_mask", *per_config_properties}
) | (frozenset(REV_PROPERTY_NAME_MAP) - frozenset(PROPERTY_NAME_MAP))
#: results that are known per atom; all others are of the whole structure
_PER_ATOM = frozenset(all_properties) - frozenset(per_config_properties)

Column = list[list[str]]


def write_frame(file: IO[str], atoms: Atoms) -> None:
    """Append one structure with its info, arrays, constraints and results to a text file.

    Results of the calculator come first: info and arrays of their names are not written.

    Args:
        file: open for text.
        atoms: the structure; results that ASE's reader does not take for results come back as info or
            arrays.
    """
    results = {k: v for k, v in (atoms.calc.results if atoms.calc else {}).items() if v is not None}
    per_atom = {k: v for k, v in results.items() if _is_per_atom(k, v, len(atoms))}
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")} | per_atom
    info = {k: v for k, v in atoms.info.items() if k not in results}
    info |= {k: v for k, v in results.items() if k not in per_atom}
    columns: dict[str, tuple[str, Column]] = {
        "species": ("S", [list(atoms.symbols)]),
        "pos": ("R", _texts(atoms.positions)),
    }
    mask = _move_mask(atoms)
    if mask is not None:
        columns["move_mask"] = ("L", _texts(mask))
    aside: dict[str, Any] = {}
    for name, value in arrays.items():
        made = _column(np.asarray(value), len(atoms))
        reserved = name in _RESERVED_COLUMNS or (name in _PER_ATOM and made is not None and made[0] == "S")
        key = f"atom_{name}" if reserved else str(name)
        if made is None or not key or set(key) & set(":\n\r") or _clashes(key, made[1], columns):
            while key in info or key in aside:
                key = f"atom_{key}"
            aside[key] = value
        else:
            columns[PROPERTY_NAME_MAP.get(key, key)] = made
    names = ":".join(f"{name}:{kind}:{len(column)}" for name, (kind, column) in columns.items())
    parts = [f'Lattice="{_plain(atoms.cell.array.ravel())}"'] if atoms.cell.any() else []
    parts.append(f"Properties={names if names.isascii() and _bare(names) else quoted(names)}")
    parts += _items(info | aside)
    parts.append(f'pbc="{_plain(atoms.pbc)}"')
    # even widths: a file that was cut inside its last number can be told from a whole one
    rows = zip(*(_padded(texts) for _, column in columns.values() for texts in column), strict=True)
    file.write(f"{len(atoms)}\n{' '.join(parts)}\n")
    file.writelines(f"{' '.join(row)}\n" for row in rows)


# ---- columns -----------------------------------------------------------------------------------


def _column(array: NDArray[Any], n: int) -> tuple[str, Column] | None:
    """Kind and texts (columns, atoms) of an array, or ``None`` if it cannot be columns."""
    if array.ndim not in (1, 2) or len(array) != n or not array.size:
        return None
    kind = {"f": "R", "i": "I", "u": "I", "b": "L", "U": "S", "O": "S"}.get(array.dtype.kind)
    if kind is None or (kind == "I" and max(int(array.max()), -int(array.min())) >= 2**31):
        return None  # ASE reads columns of integers with 32 bits
    if kind == "S" and not all(isinstance(v, str) and _bare(v) for v in array.ravel()):
        return None
    return kind, _texts(array)


def _texts(array: NDArray[Any]) -> Column:
    table = array[:, None] if array.ndim == 1 else array
    return [[_text(v) for v in column] for column in _doubles(table).T.tolist()]


def _doubles(array: NDArray[Any]) -> NDArray[Any]:
    """Floating-point numbers with 64 bits, so that ``tolist`` gives Python's."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _padded(texts: list[str]) -> list[str]:
    width = max(map(len, texts), default=0)
    return [text.rjust(width) for text in texts]


def _bare(text: str) -> bool:
    """One word, without a character that means something in a comment line or ends a line."""
    return text.split() == [text] and not set(text) & set("\"'{}[]\\=\x00") and _encodes(text)


def _encodes(text: str) -> bool:
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in text)


def _clashes(key: str, column: Column, columns: Mapping[str, tuple[str, Column]]) -> bool:
    """Whether ASE's names of single columns (``forces0``, ...) would occur twice."""
    taken = {f for name, (_, made) in columns.items() for f in _fields(name, len(made))}
    return not _encodes(key) or bool(taken & set(_fields(PROPERTY_NAME_MAP.get(key, key), len(column))))


def _fields(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}{i}" for i in range(count)]


def _is_per_atom(name: str, value: Any, n: int) -> bool:
    """ASE's own results by their names, others by their shapes; few atoms may be components of a vector."""
    if name in all_properties:
        return name in _PER_ATOM
    shape = np.shape(value)
    return len(shape) in (1, 2) and shape[0] == n and (n not in (3, 6, 9) or len(shape) == 2)


def _move_mask(atoms: Atoms) -> NDArray[np.bool_] | None:
    """What may move, (n,) or (n, 3), as ASE writes it; ``None`` if everything may."""
    fixed = [c for c in atoms.constraints if isinstance(c, FixAtoms | FixCartesian)]
    mask = np.ones((len(atoms), 3), dtype=bool)
    for constraint in fixed:
        by_axis = constraint.mask if isinstance(constraint, FixCartesian) else True
        mask[constraint.index] &= ~np.broadcast_to(by_axis, (3,))
    if mask.all():
        return None
    return mask if any(isinstance(c, FixCartesian) for c in fixed) else mask[:, 0]


# ---- the comment line --------------------------------------------------------------------------


def _items(info: Mapping[Any, Any]) -> list[str]:
    """``key=value`` for everything in ``info``."""
    taken: set[str] = set(_RESERVED_KEYS)
    parts = []
    for name, value in info.items():
        key = " ".join(str(name).split("\n")).replace("\r", " ") or "_"
        if not _encodes(key):
            key = key.encode("ascii", "backslashreplace").decode()
        text, key = _value(key, value)
        if text is None:
            warnings.warn(
                f"info['{key}'] is not written: extended XYZ has no {type(value).__name__}", stacklevel=3
            )
            continue
        while key in taken:
            key = f"info_{key}"
        taken.add(key)
        parts.append(f"{key if key.isidentifier() and key.isascii() else quoted(key)}={text}")
    return parts


def _value(key: str, value: Any) -> tuple[str | None, str]:
    """What stands behind the equals sign, and the key under which ASE reads it back."""
    if key in SPECIAL_3_3_KEYS:
        full = _tensor(value)
        if full is not None:
            return f'"{_plain(full.ravel())}"', key
        key = f"info_{key}"
    if key in per_config_properties and not _is_numeric(value):
        key = f"info_{key}"
    plain = _as_text(value)
    if plain is not None and _same(_back(key, plain), value):
        return (plain if _bare(plain) else quoted(plain)), key
    try:
        text = f"_JSON {json.dumps(value, default=_for_json)}"
        if _is_uneven(value):
            text = f"_JSON {json.dumps({UNEVEN: value}, default=_for_json)}"
    except (TypeError, ValueError):
        return None, key
    if key.lower() == "uid":  # ASE leaves its values alone
        key = f"info_{key}"
    return quoted(text), key


def _as_text(value: Any) -> str | None:
    """Texts, numbers, truth values and vectors of them as ASE writes them; ``None`` for anything else."""
    if isinstance(value, str):
        return None if set(value) & set("\n\r\x00") or not _encodes(value) else value
    array = np.asarray(value) if isinstance(value, np.ndarray | np.generic | bool | int | float) else None
    if array is None or array.dtype.kind not in "biuf" or array.ndim > 1 or not array.size:
        return None
    return _plain(array.reshape(-1))


def _plain(values: Iterable[Any]) -> str:
    return " ".join(_text(v) for v in _doubles(np.asarray(values)).tolist())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "T" if value else "F"
    return value if isinstance(value, str) else repr(value)


def _back(key: str, text: str) -> Any:
    """What ASE reads of a text."""
    try:
        return key_val_str_to_dict(f"{quoted(key)}={quoted(text)}")[key]
    except (ValueError, KeyError):
        return None


def _same(read: Any, value: Any) -> bool:
    if isinstance(value, str) or isinstance(read, str):
        return isinstance(read, str) and isinstance(value, str) and read == value
    a, b = np.asarray(read), np.asarray(value)
    kinds = [{"u": "i"}.get(x.dtype.kind, x.dtype.kind) for x in (a, b)]
    if a.shape != b.shape or kinds[0] != kinds[1] or kinds[0] not in "bif":
        return False
    return np.array_equal(a, b, equal_nan=kinds[0] == "f")


def _is_uneven(value: Any) -> bool:
    """Lists of lists of different lengths, of which ASE's reader would make an array in vain."""
    try:
        np.array(json.loads(json.dumps(value, default=_for_json)))
    except ValueError:
        return True
    return False


def _for_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufUO":
        return value.tolist()
    raise TypeError(type(value).__name__)


def _tensor(value: Any) -> NDArray[np.float64] | None:
    """A stress or virial as a symmetric (3, 3), or ``None`` if it is none."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if array.shape == (6,):
        return np.asarray(voigt_6_to_full_3x3_stress(array))
    if array.shape not in ((9,), (3, 3)) or not np.array_equal(array.reshape(3, 3), array.reshape(3, 3).T):
        return None
    return array.reshape(3, 3)


def _is_numeric(value: Any) -> bool:
    try:
        np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)
