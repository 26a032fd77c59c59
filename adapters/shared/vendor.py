"""What adapters share in dealing with a vendor's package."""

from __future__ import annotations

import contextlib
import importlib
import io
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from blip_ft.backbones.registry import missing_backend
from blip_ft.errors import RecipeError, nearest


class _Quiet:
    """Silence of the process, which threads share: it begins with the first and ends with the last of them.

    Standard output and the list of warnings' filters are one for all threads. Each on its own would put back what it
    has found, and the last to leave what another has put there.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users, self.stack = 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Drop what a vendor's package prints, and its warnings."""
        with self.lock:
            if not self.users:
                self.stack.enter_context(warnings.catch_warnings())
                self.stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                warnings.simplefilter("ignore")
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.stack.close()


quiet = _Quiet()


def import_backend(adapter: str, package: str) -> None:
    """Import a vendor's package.

    Raises:
        ImportError: the package is absent; names the extra to install. Other import errors, such as
            a broken dependency of the package, pass through as they are.
    """
    try:
        with quiet():
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise missing_backend(adapter, package) from error
        raise


#: parts of the names of options by which vendors' programs are told to use fused kernels
_ACCELERATORS = {
    "cueq": "cuequivariance",
    "cuequivariance": "cuequivariance",
    "oeq": "openequivariance",
    "openequivariance": "openequivariance",
    "flash": "FlashTP",
}


def _refuse_accelerator(name: str, adapter: str) -> None:
    """Raise a :class:`RecipeError` for an option that asks for fused kernels, with the reason."""
    for part in name.lower().split("_"):
        if part in _ACCELERATORS:
            raise RecipeError(
                f"kernels of {_ACCELERATORS[part]} are not used: training and error bars differentiate "
                f"forces by the weights, and "
                "give each structure weights of its own, which fused kernels take once for all; their second "
                "derivatives have not been shown to be right for that",
                remedy=f"leave '{name}' out; models that were trained with such kernels open without "
                f"them, and exported "
                f"ones run with them in {adapter}'s own programs",
                field=f"model.options.{name}",
            )


def refuse_options(options: Mapping[str, Any], adapter: str, known: Sequence[str] = ()) -> None:
    """Raise a :class:`RecipeError` for loading options that an adapter does not know."""
    for name in options:
        _refuse_accelerator(name, adapter)
        raise RecipeError(
            f"the {adapter} adapter has no option '{name}'",
            remedy=nearest(name, known) if known else "it takes no options",
            field="model.options",
        )


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all parameters; they change when modules are converted."""
    return tuple(name for name, _ in model.named_parameters())


@contextlib.contextmanager
def eager_e3nn() -> Iterator[None]:
    """Build e3nn modules without TorchScript, whatever e3nn's default for this version of torch is.

    The arithmetic is the same; TorchScript would specialise kernels anew for the second-order
    gradients of each new batch shape.
    """
    import e3nn

    before = e3nn.get_optimization_defaults()
    e3nn.set_optimization_defaults(jit_script_fx=False)
    try:
        yield
    finally:
        e3nn.set_optimization_defaults(**before)


def copy_kernels_as_they_are(model: nn.Module) -> nn.Module:
    """Make deep copies of e3nn modules keep their kernels.

    e3nn pickles its generated kernels when a module is copied, and unpickling traces them anew: their
    coefficient tables are then folded, rounded, into new buffers, which changes the numbers in float64
    and the keys of the state dict. Without the list of kernels they are copied like any submodule.
    """
    for module in model.modules():
        if hasattr(module, "__codegen__"):
            vars(module)["__codegen__"] = []
    return model


class _DefaultType:
    """Turns of threads at torch's default type, which is one for the whole process."""

    def __init__(self) -> None:
        self.free = threading.Condition()
        self.dtype, self.before, self.users = torch.float32, torch.float32, 0
        self.mine = threading.local()

    @contextlib.contextmanager
    def __call__(self, dtype: torch.dtype) -> Iterator[None]:
        """Default type of new tensors, as some of the vendors' layers compute in it.

        Threads that want the same one have it together, others wait for them.
        """
        outer = getattr(self.mine, "dtype", None)
        if outer == dtype:
            yield
            return
        if outer is not None:  # within its own turn a thread waits for nobody
            torch.set_default_dtype(dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(outer)
            return
        with self.free:
            self.free.wait_for(lambda: not self.users or self.dtype == dtype)
            if not self.users:
                self.before, self.dtype = torch.get_default_dtype(), dtype
                torch.set_default_dtype(dtype)
            self.users += 1
        self.mine.dtype = dtype
        try:
            yield
        finally:
            self.mine.dtype = None
            with self.free:
                self.users -= 1
                if not self.users:
                    torch.set_default_dtype(self.before)
                    self.free.notify_all()


default_dtype = _DefaultType()
