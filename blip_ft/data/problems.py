"""What readers say of a file that another library cannot read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets

from blip_ft.data.hub import quiet
from blip_ft.errors import DataError, first_line


def guard(read: Callable[[], Any], name: str, kind: str) -> Any:
    """``read()`` without noise; whatever a vendor's reader raises becomes a DataError."""
    try:
        with quiet():
            return read()
    except Exception as error:
        raise unreadable(name, error, kind) from error


def unreadable(name: str, error: Exception, kind: str = "", frame: int | None = None) -> DataError:
    """The error for a file that ``error`` stopped the reading of."""
    cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    what = f"cannot be read as {kind}" if kind else "cannot be read"
    return DataError(
        f"{what}: {first_line(cause or error)}",
        file=name,
        frame=frame,
        remedy="check that the file is whole and of the format its name says",
    )
