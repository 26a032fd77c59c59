"""Turn a pretrained interatomic potential into a Bayesian one and fine-tune it on few frames.

The command line is ``blip-finetune``. From Python::

    from blip_ft import load

    atoms.calc = load("runs/demo").calculator()

Everything here is loaded when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip_ft.bayesian_module import BayesianModule
    from blip_ft.config import Recipe, load_recipe
    from blip_ft.errors import BlipError
    from blip_ft.library import Potential, bayesian, load, load_backbone, load_frames
    from blip_ft.training.fit import fit
    from blip_ft.version import __version__

#: public name -> (module, name in it)
_PUBLIC = {
    "BayesianModule": ("blip_ft.bayesian_module", "BayesianModule"),
    "BlipError": ("blip_ft.errors", "BlipError"),
    "Recipe": ("blip_ft.config", "Recipe"),
    "fit": ("blip_ft.training.fit", "fit"),
    **{
        name: ("blip_ft.library", name)
        for name in ("Potential", "bayesian", "load", "load_backbone", "load_frames")
    },
    "load_recipe": ("blip_ft.config", "load_recipe"),
    "__version__": ("blip_ft.version", "__version__"),
}

__all__ = [
    "BayesianModule",
    "BlipError",
    "Potential",
    "Recipe",
    "__version__",
    "bayesian",
    "fit",
    "load",
    "load_backbone",
    "load_frames",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'blip_ft' has no attribute '{name}'")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
