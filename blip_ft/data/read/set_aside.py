"""Frames that are no examples to learn from or to be judged on, and are set aside in every role.

*Isolated atoms* are references: one atom, marked ``IsolatedAtom`` as MACE has it or with no neighbour, its
own images included, within :data:`ALONE`. A plane-wave code needs a periodic box, so periodicity says
nothing; a one-atom cell of a crystal has near images and stays. The distance is a constant and not the
cutoff of the model: which frames are held out must not depend on the model.

*Calculations that did not converge*, as their own file says (:mod:`blip_ft.data.read.convergence`), are wrong
labels beyond doubt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from ase import Atoms

from blip_ft.data.findings import place
from blip_ft.data.neighbours import pairs_within
from blip_ft.data.read.unused import NOT_CONVERGED
from blip_ft.errors import DataError

#: an atom with nothing nearer than this is alone, Å: beyond the nearest neighbours of any crystal (Cs 5.2)
ALONE = 6.0
#: energies of one isolated atom that differ by more are two, eV
_SAME = 1e-4


@dataclass
class SetAside:
    """What was set aside of one source or of several.

    Attributes:
        places: ``"file, frame N: reason"`` of each frame.
        energies: of isolated atoms, eV by atomic number; the first that was met.
        others: an error for each isolated atom whose energy differs from the first of its element.
        by: column that names the reference set of a frame, where there are several (``data.reference_sets``).
        of_sets: energies by set, then by atomic number; ``energies`` are those of the first set that was met.
    """

    places: list[str] = field(default_factory=list)
    energies: dict[int, float] = field(default_factory=dict)
    others: list[DataError] = field(default_factory=list)
    by: str | None = None
    of_sets: dict[str, dict[int, float]] = field(default_factory=dict)

    def examples(self, frames: datasets.Dataset) -> datasets.Dataset:
        """The frames of a source that are examples; the others are entered here.

        A source of nothing but isolated atoms is left as it is: that is what it is meant for.

        Raises:
            DataError: no frame of the source has converged.
        """
        frames = self.converged(frames)
        single = [i for i, numbers in enumerate(frames["numbers"]) if len(numbers) == 1]
        alone = [i for i in single if is_isolated(frames[i])]
        if not alone or len(alone) == len(frames):
            return frames
        for i in alone:
            self._enter(frames[i])
        taken = set(alone)
        return frames.select([i for i in range(len(frames)) if i not in taken])

    def converged(self, frames: datasets.Dataset) -> datasets.Dataset:
        """The frames of a source whose own file does not say that they did not converge.

        Raises:
            DataError: there are none.
        """
        failed = [i for i, text in enumerate(frames["mapping"]) if NOT_CONVERGED in text]
        if failed and len(failed) == len(frames):
            raise DataError(
                f"the file itself says of every frame ({len(failed)}) that the calculation did not converge",
                file=frames[0]["source"],
                frame=frames[0]["frame"],
                remedy="converge them (more electronic steps, other mixing) or give other frames",
            )
        self.places += [f"{place(frames[i])}: not converged, as the file itself says" for i in failed]
        return frames.select(sorted(set(range(len(frames))) - set(failed))) if failed else frames

    def _enter(self, row: dict[str, Any]) -> None:
        z, energy = row["numbers"][0], row["energy"]
        name = "" if self.by is None else row[self.by]
        energies = self.of_sets.setdefault(name, {})
        if energy is not None:
            self.energies.setdefault(z, energy)
        note = "an isolated atom, kept as reference"
        if energy is not None and abs(energies.setdefault(z, energy) - energy) > _SAME:
            note = f"an isolated atom; its energy is not that of the one before ({energies[z]:.6f} eV)"
            self.others.append(
                DataError(
                    f"an isolated atom of element {z} has {energy:.6f} eV here and {energies[z]:.6f} eV before",
                    file=row["source"],
                    frame=row["frame"],
                    field="energy",
                    remedy="keep one of them: the state and the settings of the other frames",
                )
            )
        self.places.append(f"{place(row)}: {note}")


def is_example(row: dict[str, Any]) -> bool:
    """Whether one row of the schema is neither an isolated atom nor of a calculation that did not converge."""
    return NOT_CONVERGED not in row["mapping"] and not is_isolated(row)


def is_isolated(row: dict[str, Any]) -> bool:
    """True for one neutral atom that nothing is near, or that is marked ``IsolatedAtom``; an ion is no reference."""
    if len(row["numbers"]) != 1 or row.get("charge"):
        return False
    if row["group"] == "IsolatedAtom" or not any(row["pbc"]):
        return True
    atoms = Atoms(numbers=row["numbers"], positions=np.zeros((1, 3)), cell=row["cell"], pbc=row["pbc"])
    return not len(pairs_within(atoms, ALONE)[0])
