"""The fixtures that the adapter contract needs."""

from blip_ft.testing.structures import (
    boxed_atom,
    carbide,
    ethanol,
    native_stock,
    periodic_atom,
    quartz,
    slab,
    stock,
    structures,
)

__all__ = [
    "boxed_atom",
    "carbide",
    "ethanol",
    "native_stock",
    "periodic_atom",
    "quartz",
    "slab",
    "stock",
    "structures",
]
