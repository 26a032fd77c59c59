"""Sets of energies with references of their own: frames of several levels of theory in one training.

One model has one zero of energy per element. Where frames of several sets take part (``data.reference_sets``),
the model has the references of one set, the default. The labels of another set s are brought onto its zero before
anything is trained on them,

    E - sum_z n_z d_s(z),        d_s = shift of s - shift of the default,

with the shift of each set chosen as :mod:`blip_ft.data.references` says, on the frames of this set alone. Forces and
stress do not depend on it. Predictions are on the zero of the default unless another set is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import datasets
import numpy as np
from numpy.typing import ArrayLike

from blip_ft.config import ReferenceSetsConfig
from blip_ft.data.frame import FrameRow
from blip_ft.data.read.hub import quiet
from blip_ft.errors import BlipError, DataError, nearest

#: columns of the schema that may tell sets apart
COLUMNS = ("theory", "group")


class Relabelled(Protocol):
    """A set of frames that keeps what was made of them when their labels change (``FrameDataset``)."""

    @property
    def frames(self) -> datasets.Dataset:
        """Rows of the schema."""

    def relabelled(self, frames: datasets.Dataset) -> Self:
        """The same structures with these labels."""


D = TypeVar("D", bound=Relabelled)


@dataclass(frozen=True)
class ReferenceSets:
    """What brings energies of every set onto the zero of one.

    Attributes:
        default: the set whose zero is the model's.
        shifts: {set: {atomic number: eV}}, what its energies lie above those of the default; {} for the default.
        by: column of the schema that names a frame's set.
    """

    default: str
    shifts: dict[str, dict[int, float]] = field(default_factory=dict)
    by: str = "theory"

    def offset(self, row: FrameRow, *, strict: bool = True) -> float:
        """What is to be taken off the energy of a frame, eV.

        Args:
            row: of the schema.
            strict: refuse a frame that names no set; otherwise it counts as one of the default.

        Raises:
            DataError: the frame is of a set that is not known, or names none.
        """
        name = row.get(self.by) or ""
        if name not in self.shifts:
            if not name and not strict:
                return 0.0
            raise self.unknown(row)
        return self.energy(name, row["numbers"])

    def energy(self, name: str, numbers: ArrayLike) -> float:
        """What a structure of the set ``name`` lies above the default's zero, eV."""
        shift = self.shifts[name]
        return float(sum(shift.get(int(z), 0.0) for z in np.asarray(numbers).ravel()))

    def align_row(self, row: FrameRow) -> dict[str, Any]:
        """A row with its energy on the zero of the default.

        Raises:
            DataError: as for :meth:`offset`.
        """
        if row["energy"] is None:
            return dict(row)
        return {**row, "energy": row["energy"] - self.offset(row)}

    def align_frames(self, frames: datasets.Dataset, *, strict: bool = True) -> datasets.Dataset:
        """Rows of the schema with their energies on the zero of the default.

        Raises:
            DataError: as for :meth:`offset`.
        """
        off = [
            0.0 if row["energy"] is None else self.offset(row, strict=strict)
            for row in frames.select_columns(["energy", "numbers", self.by, "source", "frame"])
        ]
        if not any(off):
            return frames
        energies = [
            None if energy is None else energy - shift
            for energy, shift in zip(frames["energy"], off, strict=True)
        ]
        order, features = frames.column_names, frames.features
        with quiet():
            aligned = frames.remove_columns("energy").add_column(
                "energy", energies, new_fingerprint=None, feature=features["energy"]
            )
        return aligned.select_columns(order)

    def align(self, dataset: D) -> D:
        """A set with its energies on the zero of the default, and the graphs that exist.

        Raises:
            DataError: as for :meth:`offset`.
        """
        frames = self.align_frames(dataset.frames)
        if frames is dataset.frames:
            return dataset
        return dataset.relabelled(frames)

    def relative_to(self, name: str) -> ReferenceSets:
        """The same with the set ``name`` as the default.

        Raises:
            BlipError: there is no such set.
        """
        if name not in self.shifts:
            raise BlipError(
                f"the model has no reference set '{name}'; it has {', '.join(self.shifts)}",
                field="reference set",
                remedy=nearest(name, self.shifts),
            )
        base = self.shifts[name]
        elements = sorted({z for shift in self.shifts.values() for z in shift})
        shifts = {
            other: {}
            if other == name
            else {z: e for z in elements if (e := shift.get(z, 0.0) - base.get(z, 0.0))}
            for other, shift in self.shifts.items()
        }
        return ReferenceSets(name, shifts, self.by)

    def describe(self) -> str:
        """For a line of a command."""
        others = [name for name in self.shifts if name != self.default]
        return f"energies are on the zero of '{self.default}' (other reference sets: {', '.join(others)})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        shifts = {name: {str(z): e for z, e in shift.items()} for name, shift in self.shifts.items()}
        return {"default": self.default, "by": self.by, "shifts": shifts}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ReferenceSets:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: something else.
        """
        shifts = {
            str(name): {int(z): float(e) for z, e in shift.items()}
            for name, shift in content["shifts"].items()
        }
        energies = [e for shift in shifts.values() for e in shift.values()]
        if (
            content["default"] not in shifts
            or content["by"] not in COLUMNS
            or not np.isfinite(energies).all()
        ):
            raise ValueError("reference_sets is damaged")
        return cls(content["default"], shifts, content["by"])

    def unknown(self, row: FrameRow) -> DataError:
        """The error for a frame whose set is not known."""
        name = row.get(self.by) or ""
        key, known = self.by, ", ".join(self.shifts)
        if not name:
            others = f"the training frames have energies of {known}" if known else "no training frame does"
            return DataError(
                f"the frame names no reference set ({key}); {others}",
                file=row["source"],
                frame=row["frame"],
                field=key,
                remedy=f"name its set in the file, under the key of the others; which key counts: "
                f"data.fields: {{{key}: KEY}}",
            )
        return DataError(
            f"the frame is of the set '{name}', of which no training frame has an energy; they have {known}",
            file=row["source"],
            frame=row["frame"],
            field=key,
            remedy=f"{nearest(name, self.shifts)}; or train on frames of it, or remove the frame",
        )


def check_sets(options: ReferenceSetsConfig, roles: Mapping[str, datasets.Dataset]) -> None:
    """Refuse frames and options of sets that no training frame has an energy of.

    Args:
        options: the recipe's ``data.reference_sets``.
        roles: frames by role, ``train`` among them.

    Raises:
        DataError: a frame that names no set, or one that is not trained on; a default or given energies of such a set.
    """
    members = sets_of(roles["train"], options.by)
    known = ReferenceSets(options.default, {name: {} for name in members if name}, options.by)
    if "" in members:
        raise known.unknown(roles["train"][members[""][0]])
    for name, key in [(options.default, "default"), *((n, "energies") for n in options.energies)]:
        if name not in members:
            raise DataError(
                f"no training frame with an energy is of the set '{name}'; there are {', '.join(members) or 'none'}",
                field=f"data.reference_sets.{key}",
                remedy=nearest(name, members) if members else "give frames with energies",
            )
    columns = ["energy", "numbers", options.by, "source", "frame"]
    for frames in roles.values():
        for row in frames.select_columns(columns):
            if row["energy"] is not None:
                known.offset(row)


def sets_of(frames: datasets.Dataset | Sequence[FrameRow], by: str) -> dict[str, list[int]]:
    """Places of the frames with an energy, by the set that they name ("" for none)."""
    out: dict[str, list[int]] = {}
    for index, row in enumerate(frames):
        if row["energy"] is not None:
            out.setdefault(row[by] or "", []).append(index)
    return out
