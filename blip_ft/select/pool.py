"""Candidates: who they are, which of them may be chosen, and reading them again, in memory that holds no frame.

A first pass over the source looks at every frame without evaluating the model: its content key, atoms and group, and
whether the model can describe it. What follows reads the source again, a batch at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from blip_ft.backbones import electrons
from blip_ft.config import Recipe, load_recipe
from blip_ft.data.frame import atoms_key
from blip_ft.data.read.plan import ReadPlan, plan
from blip_ft.data.read.raw import RawFrame, check_geometry
from blip_ft.data.read.schema import GROUPS
from blip_ft.data.read.sources import unchecked_frames
from blip_ft.data.read.structure import structure
from blip_ft.data.split.splits_file import frame_keys, roles_by_key
from blip_ft.errors import BlipError, DataError
from blip_ft.potential.bayesian import BayesianPotential


@dataclass(frozen=True)
class Known:
    """What a finished run says beside its model.

    Attributes:
        recipe: with which it was trained.
        roles: {key of a frame (``splits_file.frame_keys``): its role}.
    """

    recipe: Recipe
    roles: dict[str, str]

    @classmethod
    def of_run(cls, folder: str | Path) -> Known:
        """Read it from the folder of a run.

        Raises:
            BlipError: it is none, or has not finished.
        """
        folder = Path(folder)
        for name in ("recipe.yaml", "splits.json"):
            if not (folder / name).is_file():
                raise BlipError(
                    f"no folder of a finished run: it has no {name}, which says what the model was trained on",
                    file=folder,
                    remedy="give the run's folder, not its model/ alone; blip-finetune resume ends an unfinished one",
                )
        recipe = load_recipe(str(folder / "recipe.yaml"), finished=True)
        return cls(recipe, roles_by_key(folder / "splits.json"))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a candidate stands: file, number in that file, and number in the whole source."""

    source: str
    frame: int
    number: int

    def __str__(self) -> str:
        return f"{self.source}, frame {self.frame}"


@dataclass
class Pool:
    """Candidates that may be chosen, N of them.

    Attributes:
        source: as the user wrote it.
        places: N places.
        keys: (N,) content keys (``data.frame.content_key``), all different.
        sizes: (N,) atoms.
        groups: N names of groups.
        excluded: place and reason of frames that may not be chosen.
        left_out: place and reason of frames that the model cannot describe.
        seen: frames of the source.
        skip_bad: frames that the model cannot describe may be left out.
        lost: numbers of candidates that were left out when they were evaluated.
    """

    source: str
    places: list[Place]
    keys: NDArray[np.int64]
    sizes: NDArray[np.int64]
    groups: list[str]
    excluded: list[tuple[str, str]]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    seen: int = 0
    skip_bad: bool = False
    lost: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.places)

    def leave_out(self, i: int, problem: str, remedy: str) -> None:
        """A candidate has turned out to be of no use.

        Raises:
            DataError: it may not be left out.
        """
        place = self.places[i]
        if not self.skip_bad:
            remedy = f"{remedy}; --skip-bad leaves it out"
            raise DataError(problem, file=place.source, frame=place.frame, remedy=remedy)
        self.lost.add(i)
        self.left_out.append((str(place), problem))

    def part(self, wanted: Sequence[int]) -> Pool:
        """Some of the candidates, by their numbers in ascending order."""
        return Pool(
            self.source,
            [self.places[i] for i in wanted],
            self.keys[list(wanted)],
            self.sizes[list(wanted)],
            [self.groups[i] for i in wanted],
            self.excluded,
            self.left_out,
            self.seen,
            self.skip_bad,
        )

    def frames(self, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, Atoms]]:
        """Number and structure of every candidate, or of some, in the order of the source.

        Args:
            wanted: numbers of candidates.

        Raises:
            DataError: the source has changed since it was looked at.
        """
        chosen = range(len(self)) if wanted is None else wanted
        at = {self.places[i].number: i for i in chosen}
        for number, raw in enumerate(_raw(plan(self.source, labels=False, digest=False), broken=True)):
            if not at:
                return
            if (i := at.pop(number, None)) is None:
                continue
            atoms = None if raw.broken is not None else structure(raw)
            if atoms is None or atoms_key(atoms) != self.keys[i]:
                raise raw.error("the frame has changed since the source was first read", remedy="start again")
            yield i, atoms
        if at:
            raise DataError(
                "frames have gone since the source was first read", file=self.source, remedy="start again"
            )


def look(
    source: str,
    potential: BayesianPotential,
    known: Known,
    *,
    skip_bad: bool = False,
    progress: Callable[[int], object] = lambda n: None,
) -> Pool:
    """Look at every frame of a source.

    Frames that equal one of the run's, in any role, or another candidate, are excluded. Of equal candidates the one
    with the first group, file and number in the alphabet stays, whatever their order.

    Args:
        source: as for ``predict``; labels are not looked at.
        potential: the model.
        known: of its run.
        skip_bad: leave out frames that the model cannot describe.
        progress: called with 1 for every frame.

    Raises:
        DataError: the source is missing, empty or damaged, or holds a frame that the model cannot describe.
    """
    trained = None if potential.ood is None else frozenset(potential.ood.numbers.tolist())
    found: dict[int, tuple[str, str, int, int, int]] = {}
    excluded: list[tuple[int, str, str]] = []
    left_out: list[tuple[str, str]] = []
    named = known.recipe.data.fields.get("group")
    names = GROUPS if named is None else (named,)
    number = -1
    for number, raw in enumerate(_raw(plan(source, labels=False, digest=False), broken=skip_bad)):
        progress(1)
        place = f"{raw.source}, frame {raw.frame}"
        try:
            atoms = _checked(raw, potential, trained)
        except DataError as error:
            if not skip_bad:
                raise
            left_out.append((place, error.problem))
            continue
        if (role := _role(atoms, known.roles)) is not None:
            excluded.append((number, place, f"equals a frame of the run ({role})"))
            continue
        key = atoms_key(atoms)
        mine = (_group(raw, names), sys.intern(raw.source), raw.frame, number, len(atoms))
        if (other := found.get(key)) is not None:
            mine, other = sorted((mine, other))
            excluded.append((other[3], _place(other), f"equals the candidate {_place(mine)}"))
        found[key] = mine
    rows = sorted(found.items(), key=lambda item: item[1][3])
    return Pool(
        source=source,
        places=[Place(row[1], row[2], row[3]) for _, row in rows],
        keys=np.array([key for key, _ in rows], dtype=np.int64),
        sizes=np.array([row[4] for _, row in rows], dtype=np.int64),
        groups=[row[0] for _, row in rows],
        excluded=[(place, reason) for _, place, reason in sorted(excluded)],
        left_out=left_out,
        seen=number + 1,
        skip_bad=skip_bad,
    )


def _raw(readings: Sequence[ReadPlan], *, broken: bool) -> Iterator[RawFrame]:
    for reading in readings:
        yield from unchecked_frames(reading, broken=broken)


def _checked(raw: RawFrame, potential: BayesianPotential, trained: frozenset[int] | None) -> Atoms:
    """The structure of a frame that the model can describe.

    Raises:
        DataError: it cannot, or was trained on no atom of an element.
    """
    check_geometry(raw)
    atoms = structure(raw)
    potential.backbone.check(atoms, file=raw.source, frame=raw.frame)
    electrons.given(atoms.info, file=raw.source, frame=raw.frame)
    unseen = [] if trained is None else sorted(set(atoms.numbers.tolist()) - trained)
    if unseen:
        from ase.data import chemical_symbols

        raise raw.error(
            f"no training frame has the element {', '.join(chemical_symbols[z] for z in unseen)}: this model's "
            "error bars say nothing of it",
            field="numbers",
            remedy="label some frames of it by hand, fit again, and select then; --skip-bad leaves such frames out",
        )
    return atoms


def _role(atoms: Atoms, roles: dict[str, str]) -> str | None:
    """Role in the run of a frame that is the same; ``None`` for a new one."""
    state = electrons.given(atoms.info)
    row = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array} | state
    return next((roles[k] for k in frame_keys(row) if k in roles), None)


def _group(raw: RawFrame, names: Sequence[str]) -> str:
    """As the data name it, else the file."""
    for name in names:
        value = raw.values.get(name)
        if value is not None and np.ndim(value) == 0 and str(value):
            return sys.intern(str(value))
    return sys.intern(raw.source)


def _place(row: tuple[str, str, int, int, int]) -> str:
    return f"{row[1]}, frame {row[2]}"
