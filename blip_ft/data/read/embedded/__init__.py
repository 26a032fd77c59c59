"""Labelled sets that ship with the package; origin and licence of each in ``README.md`` here."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

#: name of each embedded set -> its file
SETS = {"sio2_polymorphs": "sio2_polymorphs.parquet"}


def path(name: str) -> Path:
    """File of an embedded set.

    Raises:
        KeyError: there is no set of this name.
    """
    return Path(str(files(__name__) / SETS[name]))
