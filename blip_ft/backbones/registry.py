"""Adapters by name, and what to say where one cannot be used."""

from __future__ import annotations

import importlib.metadata

from blip_ft.backbones.protocol import Backbone
from blip_ft.errors import BlipError, MissingBackendError, nearest

ENTRY_POINT_GROUP = "blip_ft.adapters"


def get_adapter(name: str) -> type[Backbone]:
    """The backbone class of an adapter.

    Raises:
        BlipError: no adapter of this name is installed.
        ImportError: its backend is not installed; the message names the extra and what it
            clashes with. Other import errors pass through.
    """
    points = {e.name: e for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if name not in points:
        raise BlipError(f"there is no adapter '{name}'", remedy=nearest(name, points), field="model.adapter")
    adapter: type[Backbone] = points[name].load()
    return adapter


#: which extras cannot share an environment (mace-torch pins e3nn 0.4.4, the others need >= 0.5)
FAMILIES = {
    "mace": "a",
    "fairchem": "b",
    "sevennet": "b",
    "orb": "b",
    "chgnet": "either",
    "diep": "either",
}


def missing_backend(adapter: str, package: str) -> MissingBackendError:
    """The error to raise when a backend's package is absent."""
    family = FAMILIES.get(adapter, "either")
    clash = ", ".join(n for n, f in FAMILIES.items() if {f, family} == {"a", "b"})
    note = f" It cannot share an environment with {clash} (different e3nn)." if clash else ""
    return MissingBackendError(
        f"adapter '{adapter}' needs the package '{package}', which is not installed",
        remedy=f"pip install 'blip-ft[{adapter}]'.{note}",
    )
