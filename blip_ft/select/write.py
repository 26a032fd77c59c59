"""Write the chosen candidates, as they stand in the source, with why each was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ase import Atoms

from blip_ft.data.write.extxyz import write_frame
from blip_ft.files import whole_file
from blip_ft.select.choose import Choice
from blip_ft.select.pool import Pool

#: columns of the output beside the candidate's own
COLUMNS = (
    "select_method",
    "select_order",
    "select_score",
    "select_gain",
    "select_group",
    "select_source",
    "select_frame",
)


def write_choices(pool: Pool, choices: Sequence[Choice], target: Path, *, overwrite: bool = False) -> None:
    """Write them in their order; labels and whatever else they have are kept.

    Args:
        pool: candidates.
        choices: of them.
        target: extended XYZ.
        overwrite: replace a file of this name.

    Raises:
        BlipError: it cannot be written, or the source has changed.
    """
    found = dict(pool.frames([c.candidate for c in choices]))
    with whole_file(target, overwrite=overwrite) as file:
        for choice in choices:
            write_frame(file, marked(found[choice.candidate], choice))


def marked(atoms: Atoms, choice: Choice) -> Atoms:
    """A copy with :data:`COLUMNS` in ``info``; a method without a score or gain has no such column."""
    out: Atoms = atoms.copy()
    out.calc = atoms.calc
    values = (
        choice.method,
        choice.order,
        choice.score,
        choice.gain,
        choice.group,
        choice.source,
        choice.frame,
    )
    for name, value in zip(COLUMNS, values, strict=True):
        out.info.pop(name, None)
        if value is not None:
            out.info[name] = value
    return out
