"""Extended XYZ frame by frame, in constant memory."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Self

from ase import Atoms
from ase.io.extxyz import read_xyz
from ase.io.formats import open_with_compression

from blip_ft.data.read.comment_line import read_comment
from blip_ft.data.read.problems import unreadable
from blip_ft.errors import DataError


def read_extxyz(path: Path, name: str) -> Iterator[Atoms]:
    """Extended XYZ frame by frame, in constant memory: :func:`frames_or_errors`, whose first error is raised.

    Raises:
        DataError: cut short, or no extended XYZ; names the frame.
    """
    for atoms in frames_or_errors(path, name):
        if isinstance(atoms, DataError):
            raise atoms from atoms.__cause__
        yield atoms


def frames_or_errors(path: Path, name: str) -> Iterator[Atoms | DataError]:
    """Extended XYZ frame by frame, in constant memory; for a frame that cannot be parsed the reason.

    ASE reads a whole file by seeking, which takes quadratic time in a compressed one, stops
    without a word at a blank line, does not say which frame is damaged, and loses keys behind an empty
    text. Hence the text is divided here, ASE parses one frame at a time, and comment lines are read by
    :mod:`blip_ft.data.read.comment_line`.

    Raises:
        DataError: cut short, or no number of lines where one should be: where the next frame begins is then unknown.
    """
    frame = 0
    with _Lines(path, name) as lines:
        for line in lines:
            if not line.strip():
                continue
            if not line.strip().isdecimal():
                raise DataError(
                    f"line {lines.number} should be a number of atoms and is '{line.strip()[:40]}'",
                    file=name,
                    frame=frame,
                    remedy="the frame before has more lines than it announces, or this is no XYZ file",
                )
            digits = line.strip()
            n = int(digits) if len(digits) < 19 else sys.maxsize  # more than any list can hold
            head = next(lines, "")
            rows = list(islice(lines, n))
            if len(rows) < n or not head:
                raise DataError(
                    f"the frame announces {digits[:40]} atoms and the file ends after {len(rows)}",
                    file=name,
                    frame=frame,
                    remedy="the file is cut short: copy it again, or remove the last frame",
                )
            following = next(lines, None)
            if following is None and _cut_inside_line(rows):
                raise DataError(
                    "the last line is shorter than the others and has no end: the file is cut short",
                    file=name,
                    frame=frame,
                    remedy="copy the file again, or remove the last frame",
                )
            while following is not None and following.startswith("VEC"):  # lattice of the older dialect
                rows.append(following)
                following = next(lines, None)
            lines.put_back(following)
            yield _parsed([line, head, *rows], name, frame)
            frame += 1


def _parsed(lines: list[str], name: str, frame: int) -> Atoms | DataError:
    """One frame."""
    try:
        text = io.StringIO("".join(lines))
        atoms: Atoms = next(read_xyz(text, index=0, properties_parser=read_comment))
    except Exception as error:  # noqa: BLE001 whatever ASE raises for a damaged frame
        problem = unreadable(name, error, "extxyz", frame)
        problem.__cause__ = error
        return problem
    return atoms


class _Lines(Iterator[str]):
    """Lines of a text file, packed or not, one of which can be put back.

    Attributes:
        number: of the line that was given last, from 1.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.number = 0
        self._name = name
        self._back: str | None = None
        try:
            self._file = io.TextIOWrapper(open_with_compression(str(path), "rb"), encoding="utf-8")
        except Exception as error:
            raise unreadable(name, error, "extxyz") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __next__(self) -> str:
        line, self._back = self._back, None
        if line is None:
            try:
                line = self._file.readline()
            except Exception as error:  # damaged compression, undecodable text
                raise unreadable(self._name, error, "extxyz") from error
        if not line:
            raise StopIteration
        self.number += 1
        return line

    def put_back(self, line: str | None) -> None:
        """Give ``line`` again next."""
        if line is not None:
            self._back = line
            self.number -= 1


def _cut_inside_line(rows: list[str]) -> bool:
    """True if a fixed-width table stops within its last number, which would read as another one."""
    widths = {len(row.rstrip("\r\n")) for row in rows[:-1]}
    last = rows[-1] if rows else ""
    return len(rows) > 2 and len(widths) == 1 and not last.endswith("\n") and len(last) < widths.pop()
