"""The ``torch_sim`` package, imported here alone: it is optional, and takes seconds to import."""

from __future__ import annotations

from functools import cache
from typing import Any

from blip_ft.errors import MissingBackendError


def torch_sim() -> Any:
    """The package.

    Raises:
        MissingBackendError: it, or something that it needs, is missing.
    """
    try:
        import torch_sim
        import torch_sim.models.interface
    except ImportError as error:
        raise MissingBackendError(
            f"the package 'torch-sim-atomistic' cannot be imported: {error}",
            remedy="pip install 'blip-ft[torchsim]'",
        ) from error
    return torch_sim


@cache
def with_interface(cls: Any) -> Any:
    """A class that is also TorchSim's ``ModelInterface``."""
    interface = torch_sim().models.interface.ModelInterface
    if issubclass(cls, interface):
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(interface)(cls.__name__, (cls, interface), names)
