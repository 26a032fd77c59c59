"""Total charge and spin of a structure: what a geometry does not say and some models want to know.

==========  ==========================  ================================================================
key         meaning                     names under which it is found
==========  ==========================  ================================================================
``charge``  total charge, e             ``charge``, ``total_charge``
``spin``    spin multiplicity 2S + 1    ``spin``, ``total_spin``, ``spin_multiplicity``, ``multiplicity``
==========  ==========================  ================================================================

They stand in ``atoms.info``, in the columns of the schema (:mod:`blip_ft.data.read.schema`), and are part of
what makes two frames the same. A frame that says nothing is the same as a neutral singlet there.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms

from blip_ft.errors import DataError

#: names under which each is looked for, in columns, info and key-value pairs
NAMES: dict[str, tuple[str, ...]] = {
    "charge": ("charge", "total_charge"),
    "spin": ("spin", "total_spin", "spin_multiplicity", "multiplicity"),
}
KEYS = tuple(NAMES)
_NESTED = ("key_value_pairs", "data")

#: what a frame is that says nothing, when frames are compared
NEUTRAL = (0.0, 1.0)


def own(info: Mapping[str, Any]) -> dict[str, Any]:
    """Charge and spin in ``atoms.info`` as they stand there; what is not there is absent."""
    found: dict[str, Any] = {}
    # rows of ASE's databases keep theirs one level deeper
    for part in (info, *(info[name] for name in _NESTED if isinstance(info.get(name), Mapping))):
        for key, names in NAMES.items():
            value = next((part[name] for name in names if part.get(name) is not None), None)
            if value is not None:
                found.setdefault(key, value)
    return found


def given(info: Mapping[str, Any], *, file: str | None = None, frame: int | None = None) -> dict[str, float]:
    """Charge and spin in ``atoms.info`` as finite numbers; what is not there is absent.

    Args:
        info: of the structure.
        file: for the error.
        frame: for the error.

    Raises:
        DataError: a value that is no number.
    """
    found = {}
    for key, value in own(info).items():
        try:
            found[key] = as_number(value)
        except ValueError as error:
            raise DataError(
                f"the {key} is {error}", file=file, frame=frame, field=key, remedy=REMEDY
            ) from error
    return found


REMEDY = (
    "charge counts e, spin is the multiplicity 2S + 1; mend it, remove it for the model's default, or rename it if it "
    "means something else"
)


def changes(before: Atoms | None, after: Atoms, geometry: list[str]) -> list[str]:
    """For ``Calculator.check_state``: what changed, with ``info`` if it is charge or spin.

    Args:
        before: the structure of the last calculation.
        after: the one that is asked about.
        geometry: changes that ASE has found.
    """
    if not geometry and before is not None and own(before.info) != own(after.info):
        return ["info"]
    return geometry


def as_number(value: Any) -> float:
    """One finite number.

    Raises:
        ValueError: it is none; the text goes behind "is".
    """
    if isinstance(value, np.ndarray | list | tuple) and np.size(value) == 1:
        value = np.asarray(value).reshape(-1)[0]
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"'{value[:40]}', no number") from None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
    if not real or not math.isfinite(value):
        raise ValueError(f"'{str(value)[:40]}', no number")
    return float(value)


def plain(value: float) -> float | int:
    """A whole number as ``int``, as vendors and files have it."""
    return int(value) if float(value).is_integer() else float(value)


def state(charge: float | None, spin: float | None) -> tuple[float, float]:
    """What is compared when two frames may be the same: a frame that says nothing is a neutral singlet."""
    return (charge or NEUTRAL[0], spin or NEUTRAL[1])


def state_of(info: Mapping[str, Any]) -> tuple[Any, Any]:
    """:func:`state` of ``atoms.info``; a value that is no number stands for itself."""
    values: list[Any] = []
    for key, neutral in zip(KEYS, NEUTRAL, strict=True):
        value = own(info).get(key)
        try:
            values.append(neutral if value is None else as_number(value) or neutral)
        except ValueError:
            values.append(str(value))
    return (values[0], values[1])


def state_bytes(charge: float | None, spin: float | None) -> bytes:
    """For hashes of frames; empty for a neutral singlet, so that its hash is that of the geometry."""
    found = state(charge, spin)
    return b"" if found == NEUTRAL else np.asarray(found, dtype="<f8").tobytes()
