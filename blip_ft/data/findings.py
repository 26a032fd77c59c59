"""What a check found, for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from blip_ft.errors import BlipError

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
_PLACE = re.compile(r"(.*?), frame (\d+)(?=$| \(|: )(.*)", re.DOTALL)


@dataclass(frozen=True)
class Finding:
    """Something about the data that a user should know.

    Attributes:
        kind: ``label``, ``outlier``, ``duplicate``, ``leak``, ``geometry``, ``coverage``, ``unit``,
            ``sign`` or ``file``.
        severity: ``error`` stops a run, ``warning`` may spoil it, ``info`` explains it.
        frames: the frames it is about, each as ``"file, frame N"``, possibly with a note behind it.
        message: what was found.
        remedy: what to do about it.
    """

    kind: str
    severity: Severity
    frames: list[str] = field(default_factory=list)
    message: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        shown = "; ".join(self.frames[:5]) + ("; ..." if len(self.frames) > 5 else "")
        where = f" [{shown}]" if self.frames else ""
        return f"{self.severity}: {self.message}{where}" + (f" - {self.remedy}" if self.remedy else "")

    def to_json(self) -> dict[str, Any]:
        """For programs: ``frames`` are numbers, ``files`` and ``notes`` have one entry for each."""
        parts = [m.groups() for text in self.frames if (m := _PLACE.fullmatch(text))]
        return {
            "kind": self.kind,
            "severity": self.severity,
            "frames": [int(number) for _, number, _ in parts],
            "files": [file for file, _, _ in parts],
            "notes": [note.strip(" :()") for _, _, note in parts],
            "message": self.message,
            "remedy": self.remedy,
        }


def place(row: Mapping[str, Any], note: str = "") -> str:
    """``"file, frame N"`` of a row of the schema, with a note in brackets."""
    return f"{row['source']}, frame {row['frame']}" + (f" ({note})" if note else "")


def from_error(error: BlipError) -> Finding:
    """The finding of an input that could not be used at all."""
    where = [f"{error.file}, frame {error.frame}"] if error.frame is not None else []
    kind = {
        "energy": "label",
        "forces": "label",
        "stress": "label",
        "energy, forces": "label",
        "positions": "geometry",
        "cell": "geometry",
        "charge": "coverage",
        "spin": "coverage",
    }.get(error.field or "", "leak" if "frame stands in" in error.problem else "file")
    name = "" if error.file is None or where else f"{error.file}: "
    return Finding(kind, "error", where, f"{name}{error.problem}", error.remedy)
