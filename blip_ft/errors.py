"""Errors that a user can act on.

Every error that bad input can cause is a :class:`BlipError`. Its message names what was read
(file, frame, field) and what to do about it; the command line prints it without a trace-back.
Anything else that is raised is a defect of the program and keeps its trace-back.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path


class BlipError(Exception):
    """Base of all errors that are the input's fault, not the program's.

    Args:
        problem: what is wrong, one sentence.
        remedy: what the user can do about it.
        file: file or source that was read.
        frame: zero-based number of the frame in that file.
        field: name of the label, key or column.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str = "",
        file: str | Path | None = None,
        frame: int | None = None,
        field: str | None = None,
    ) -> None:
        self.problem, self.remedy = problem, remedy
        self.file = None if file is None else str(file)
        self.frame, self.field = frame, field
        where = [
            text
            for text, value in (
                (f"{self.file}", file),
                (f"frame {frame}", frame),
                (f"field '{field}'", field),
            )
            if value is not None
        ]
        message = f"{', '.join(where)}: {problem}" if where else problem
        super().__init__(f"{message}\n  What to do: {remedy}" if remedy else message)


class DataError(BlipError):
    """A data source, a frame or a label cannot be used."""


class RecipeError(BlipError):
    """A recipe key or value is wrong."""


class CheckpointError(BlipError):
    """A model file is missing, damaged, of another version or not trusted."""


class ConversionError(BlipError):
    """A pattern matches nothing, or a module cannot be converted as asked."""


class SanityCheckError(BlipError):
    """A safety check failed: step 0 is not the pretrained model, or references do not fit."""


class MissingBackendError(BlipError, ImportError):
    """An adapter's package is not installed; the remedy names the extra to install."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Suggestion for a misspelt name: ``"did you mean 'x'?"`` or the list of valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid names: {', '.join(names)}"


def readable(value: float | None, form: str = ".3g") -> str:
    """A number for a sentence: what is missing, infinite or not a number is said in words."""
    if value is None:
        return "unknown"
    if math.isnan(value):
        return "not a number"
    return format(value, form) if math.isfinite(value) else "infinite"


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, for messages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
