"""Comment lines of extended XYZ: keys and values read as ASE reads them, with nothing eaten.

ASE 3.29 divides a line at white space and equals signs. An empty text (``config_type="" energy=-35.9``,
``config_type= energy=-35.9``) takes the key behind it, an apostrophe inside a word (``by=O'Neil``) or a
backslash before white space takes the rest of the line. Here

- an empty value is an empty text, and a label, cell or ``pbc`` that is empty is not there;
- quotes and brackets open at the beginning of a key or a value only, and brackets may be nested;
- a backslash escapes quotes, brackets and backslashes, nothing else;
- a quote without an end is an error where keys follow it, and so is one that ends where another should open.

What a value becomes is ASE's business (:func:`ase.io.extxyz.key_val_str_to_dict`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from ase.io.extxyz import SPECIAL_3_3_KEYS, key_val_str_to_dict, per_config_properties
from numpy.typing import NDArray

from blip_ft.data.read.raw import SYMMETRIC

_CLOSING = {'"': '"', "'": "'", "{": "}", "[": "]"}
_ESCAPED = frozenset("\"'{}[]\\")
#: without a value these are not there; other keys hold an empty text
_EMPTY_IS_NONE = frozenset(per_config_properties) | SPECIAL_3_3_KEYS | {"pbc", "Properties"}
_KEY_AHEAD = re.compile(r"[A-Za-z_][\w.-]*\s*=")


#: key of a mapping that stands for the list in it: see :mod:`blip_ft.data.write.extxyz`
UNEVEN = "uneven list"


class CommentError(ValueError):
    """A comment line that can only be guessed at; ``remedy`` says what to do."""

    remedy = 'close the quotation mark or bracket, or write \\" for one that belongs to the text'


def read_comment(line: str) -> dict[str, Any]:
    """Keys and values of a comment line, in the types that ASE gives them.

    Six numbers of ``stress`` or ``virial`` in Voigt order (xx yy zz yz xz xy) become the 3 x 3 that ASE
    insists on. Of a ``stress`` that is not symmetric ASE would take one triangle: one that is so by rounding is
    averaged, another one stays as nine numbers, which no reader of labels takes for a stress.

    Raises:
        CommentError: a quotation mark or a bracket opens, keys follow, and it does not close.
        ValueError: a cell or stress that is not 9 numbers; JSON that is none.
    """
    values: dict[str, Any] = {}
    for key, text in divided(line):
        if text is None:
            values[key] = True
        elif not text.strip():
            if key not in _EMPTY_IS_NONE:
                values[key] = text
        else:
            values |= key_val_str_to_dict(f"{quoted(key)}={quoted(_full(key, text))}")
            if key == "stress" and isinstance(values[key], np.ndarray):
                values[key] = _symmetric(values[key])
            if isinstance(values[key], dict) and values[key].keys() == {UNEVEN}:
                values[key] = values[key][UNEVEN]
    return values


def quoted(text: str) -> str:
    """``text`` between quotation marks, as ASE and :func:`divided` read it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def divided(line: str) -> Iterator[tuple[str, str | None]]:
    """Pairs of a comment line; the value is ``None`` for a key that stands alone.

    Raises:
        CommentError: see :func:`read_comment`.
    """
    line = line.strip()
    at = 0
    while at < len(line):
        key, at = _word(line, at, "=")
        after = _skip(line, at)
        if line[after : after + 1] != "=":
            if key:
                yield key, None
            at = after
            continue
        value, at = _value(line, after + 1)
        if key:
            yield key, value
        at = _skip(line, at)


def _value(line: str, at: int) -> tuple[str, int]:
    """The value that begins at ``at``, just behind an equals sign, and where it ends."""
    start = _skip(line, at)
    if start > at:  # `a = b` is a value behind white space, `a= b=c` an empty one before another key
        _, end = _word(line, start, "=")
        if line[_skip(line, end) :][:1] == "=":
            return "", start
    return _word(line, start, "")


def _word(line: str, at: int, stop: str) -> tuple[str, int]:
    """Characters up to white space or one of ``stop``, without the quotes they may begin with."""
    text = ""
    if line[at : at + 1] in _CLOSING:
        end = _end(line, at)
        if end is not None:
            begin, (text, at) = at, (_plain(line[at + 1 : end]), end + 1)
            if text.endswith("=") and at < len(line) and not (line[at].isspace() or line[at] in stop):
                # a quote that was forgotten: this one opens the value of another key
                raise CommentError(f"{line[begin]} closes within '{line[max(begin, end - 20) : at + 20]}'")
        elif _KEY_AHEAD.search(line, at + 1):
            raise CommentError(f"{line[at]} opens and does not close in '{line[max(0, at - 20) : at + 40]}'")
    begin = at
    while at < len(line) and not line[at].isspace() and line[at] not in stop:
        at += 2 if line[at] == "\\" and line[at + 1 : at + 2] in _ESCAPED else 1
    return text + _plain(line[begin:at]), at


def _end(line: str, at: int) -> int | None:
    """Place of what closes the quote or bracket at ``at``; ``None`` if nothing does."""
    opening, depth = line[at], 0
    closing = _CLOSING[opening]
    while at < len(line):
        if line[at] == "\\" and line[at + 1 : at + 2] in _ESCAPED:
            at += 1
        elif line[at] == closing and depth > 0 and (depth == 1 or opening == closing):
            return at
        elif line[at] == closing and opening != closing:
            depth -= 1
        elif line[at] == opening:
            depth += 1
        at += 1
    return None


def _plain(text: str) -> str:
    """``text`` without the backslashes that escape something."""
    return re.sub(r"\\([\"'{}\[\]\\])", r"\1", text)


def _skip(line: str, at: int) -> int:
    while at < len(line) and line[at].isspace():
        at += 1
    return at


def _symmetric(stress: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) with off-diagonal pairs averaged; (9,) if these are no pairs."""
    off = np.abs(stress - stress.T).max()
    if off > SYMMETRIC * np.abs(stress).max() + 1e-8:
        return stress.reshape(9)
    return 0.5 * (stress + stress.T) if off > 0 else stress


def _full(key: str, text: str) -> str:
    """Six numbers of a stress as nine; everything else as it is."""
    numbers = text.replace(",", " ").split()
    if key not in ("stress", "virial") or len(numbers) != 6:
        return text
    xx, yy, zz, yz, xz, xy = numbers
    return f"{xx} {xy} {xz} {xy} {yy} {yz} {xz} {yz} {zz}"
