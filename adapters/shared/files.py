"""Opening vendors' model files without running code from strangers.

Vendors store models as pickles, and a pickle can run any code when it is opened. A file is
therefore first read by torch's restricted unpickler, which builds nothing but tensors, numpy
arrays and plain containers. Only a file that this reader refuses needs trust: the caller says so
(``trust=True``), or its SHA-256 is in ``releases.json``, the list of published releases.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip_ft.errors import CheckpointError

#: what a damaged archive, or one that is no archive, makes torch raise
_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError)


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def releases() -> dict[str, str]:
    """Published releases whose pickles may be opened: ``{sha256: name}``."""
    text = importlib.resources.files("blip_ft.adapters").joinpath("releases.json").read_text("utf-8")
    known: dict[str, str] = json.loads(text)
    return known


def open_file(path: Path, *, trust: bool = False, safe: Sequence[Any] = ()) -> tuple[Any, str]:
    """Read a vendor's torch file onto the CPU.

    Args:
        path: file written by ``torch.save``.
        trust: open it even if that means running code that it contains.
        safe: classes of plain data that the restricted reader may build too.

    Returns:
        The file's content and its SHA-256.

    Raises:
        CheckpointError: the file is missing, damaged, or would run code and is not trusted.
    """
    if not path.is_file():
        raise CheckpointError("there is no such file", remedy="check the path", file=path)
    try:
        digest = sha256(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read ({error.strerror})", remedy="check its permissions", file=path
        ) from error
    try:
        with torch.serialization.safe_globals([*_plain_numpy(), *safe]):
            return torch.load(path, map_location="cpu", weights_only=True), digest
    except pickle.UnpicklingError as error:
        if not (trust or digest in releases()):
            raise CheckpointError(
                "is a pickle that could run code when opened (or is no model file at all)",
                remedy="if you trust where it came from, allow it explicitly (trust=True, --trust); "
                f"its SHA-256 is {digest}",
                file=path,
            ) from error
    except _DAMAGE as error:
        raise _damaged(path) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False), digest
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"is damaged or not a model file ({path.stat().st_size} bytes)",
        remedy="fetch it again and compare its size with the original",
        file=path,
    )


def _plain_numpy() -> list[Any]:
    """Constructors of numeric arrays, under the names that numpy 1 and numpy 2 pickle them by."""
    array = np.zeros(1)
    function = array.__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    named: list[Any] = []
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named += [(function, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU"}
    return [*named, np.ndarray, np.dtype, *kinds]
