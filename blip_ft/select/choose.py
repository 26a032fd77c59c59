"""Choose a batch of candidates by one of the methods, and say why each was chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.select.budget import Budget
from blip_ft.select.features import (
    PROJECTIONS,
    STRUCTURES,
    Calls,
    Precision,
    RowFile,
    Whitening,
    energy_rows,
    force_stds,
    label_rows,
    ood_scores,
    places,
    prior_std,
)
from blip_ft.select.greedy import Information, farthest, largest, most_informative
from blip_ft.select.pool import Known, Pool

Method = Literal["covariance", "energy", "random", "farthest", "ood", "top"]
METHODS: tuple[Method, ...] = get_args(Method)
#: what ``score`` is, by method; ``gain`` where there is one
SCORES: dict[str, tuple[str, str]] = {
    "covariance": ("rms std of the forces, eV/Å", "information of its labels beside those before it, nats"),
    "energy": ("std of the energy, eV/atom", "information of its energy beside those before it, nats"),
    "farthest": ("", "distance from the training frames and those before it"),
    "ood": ("largest out-of-distribution score", ""),
    "top": ("rms std of the forces, eV/Å", ""),
    "random": ("", ""),
}
AUDIT = "audit"

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        method: one of :data:`METHODS`.
        frames: to choose; ``None`` for as many as ``atoms`` allows.
        atoms: in all of them together, at most; the gain per atom counts then.
        per_group: frames of a group, at most.
        audit: share of the frames (or atoms) that is drawn at random, before the others.
        seed: of what is drawn at random.
        projections: of the forces of a candidate (``covariance``).
        structures: in a call of the model, at most.
        batch_atoms: in a call of more than one structure, at most.
        precision: of the numbers on disk.
    """

    method: Method = "covariance"
    frames: int | None = None
    atoms: int | None = None
    per_group: int | None = None
    audit: float = 0.0
    seed: int = 0
    projections: int = PROJECTIONS
    structures: int = STRUCTURES
    batch_atoms: int | None = None
    precision: Precision = "float32"


@dataclass(frozen=True)
class Choice:
    """A chosen candidate.

    Attributes:
        order: from 1.
        candidate: its number in the pool.
        source: its file.
        frame: its number there.
        group: as the data name it, else the file.
        atoms: how many.
        method: ``audit`` for one that was drawn at random.
        score: see :data:`SCORES`; ``None`` where the method has none.
        gain: likewise, when it was chosen.
        alone: the gain if nothing else were chosen.
    """

    order: int
    candidate: int
    source: str
    frame: int
    group: str
    atoms: int
    method: str
    score: float | None = None
    gain: float | None = None
    alone: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For ``--json``; without the number in the pool."""
        return {k: v for k, v in asdict(self).items() if k != "candidate"}


def quiet(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """A progress that nobody sees."""
    del what, total
    return nullcontext(lambda n: None)


def choose(
    potential: BayesianPotential,
    known: Known,
    pool: Pool,
    wish: Wish,
    *,
    scratch: Path,
    progress: Progress = quiet,
) -> list[Choice]:
    """Choose frames.

    Neither the order of the candidates nor how many are evaluated at a time matters: ties go by content key.

    Args:
        potential: the model.
        known: of its run.
        pool: candidates.
        wish: what is asked for.
        scratch: folder for the rows of all candidates, which are removed at the end.
        progress: shows how far the work is.

    Returns:
        Audits first, then the others as they were chosen.

    Raises:
        BlipError: more is asked for than there is, the model's family does not suit the method, or there is no space.
    """
    check(pool, wish)
    drawn = _uniform(pool.keys, wish.seed)
    budget = Budget(pool.sizes, pool.groups, frames=wish.frames, atoms=wish.atoms, per_group=wish.per_group)
    audits = _audits(pool, wish, budget, drawn)
    found: list[Choice] = []

    def note(i: int, method: str, **numbers: float | None) -> None:
        place = pool.places[i]
        found.append(
            Choice(
                len(found) + 1,
                i,
                place.source,
                place.frame,
                pool.groups[i],
                int(pool.sizes[i]),
                method,
                **numbers,
            )
        )

    for i, score, gain, alone in _by_method(
        potential, known, pool, wish, budget, audits, drawn, scratch, progress
    ):
        note(i, AUDIT if i in audits else wish.method, score=score, gain=gain, alone=alone)
    return found


def check(pool: Pool, wish: Wish) -> None:
    """Refuse what cannot be done, before any candidate is evaluated.

    Raises:
        BlipError: nothing is asked for, or more than there is.
    """
    if wish.frames is None and wish.atoms is None:
        raise BlipError(
            "it is not said how much to choose", field="n", remedy="give -n FRAMES or --budget-atoms ATOMS"
        )
    aside = f"{len(pool.excluded)} excluded, {len(pool.left_out)} left out" if pool.seen else ""
    if not len(pool):
        raise BlipError(
            f"no candidate is left of {pool.seen} frames: {aside}",
            file=pool.source,
            remedy="give frames that the run does not have",
        )
    most = Budget(pool.sizes, pool.groups, per_group=wish.per_group).most
    if wish.frames is not None and wish.frames > most:
        limit = "" if wish.per_group is None else f" with at most {wish.per_group} of each group"
        raise BlipError(
            f"{wish.frames} frames are asked for, and there are {most} to choose from{limit} "
            f"({pool.seen} read, {aside})",
            file=pool.source,
            field="n",
            remedy=f"ask for {most} at most, or give more candidates",
        )
    if wish.atoms is not None and wish.atoms < (least := int(pool.sizes.min())):
        raise BlipError(
            f"{wish.atoms} atoms are less than the smallest candidate has ({least})",
            field="budget-atoms",
            remedy=f"give {least} or more",
        )


def _audits(pool: Pool, wish: Wish, budget: Budget, drawn: NDArray[np.float64]) -> list[int]:
    """Take the share that is drawn at random, within the limits that hold for all."""
    if not wish.audit:
        return []
    share = Budget(
        pool.sizes,
        pool.groups,
        frames=None if wish.frames is None else round(wish.audit * wish.frames),
        atoms=None if wish.atoms is None else int(wish.audit * wish.atoms),
        per_group=wish.per_group,
    )
    chosen = list(largest(drawn, pool.keys, share))
    for i in chosen:
        budget.take(i)
    return chosen


_Found = Iterator[tuple[int, float | None, float | None, float | None]]


def _by_method(
    potential: BayesianPotential,
    known: Known,
    pool: Pool,
    wish: Wish,
    budget: Budget,
    audits: list[int],
    drawn: NDArray[np.float64],
    scratch: Path,
    progress: Progress,
) -> _Found:
    """Number, score, gain, and gain alone of every chosen candidate, audits first."""
    if wish.method in ("covariance", "energy"):
        yield from _informative(potential, known, pool, wish, budget, audits, scratch, progress)
        return
    if wish.method == "random":
        yield from ((i, None, None, None) for i in (*audits, *largest(drawn, pool.keys, budget)))
        return
    with progress("candidates", len(pool)) as advance:
        calls = Calls(wish.structures, wish.batch_atoms, advance)
        if wish.method == "farthest":
            found, width = places(pool, potential, calls)
            with closing(RowFile(scratch, width, wish.precision, len(pool))) as rows:
                for _, row in found:
                    rows.append(row)
                yield from ((i, None, None, None) for i in audits)
                for i, distance in farthest(rows, pool.keys, budget, audits):
                    yield i, None, distance, None
            return
        by = ood_scores if wish.method == "ood" else force_stds
        scores = np.array([score for _, score in by(pool, potential, calls)])
    for i in (*audits, *largest(scores, pool.keys, budget)):
        yield i, float(scores[i]), None, None


def _informative(
    potential: BayesianPotential,
    known: Known,
    pool: Pool,
    wish: Wish,
    budget: Budget,
    audits: list[int],
    scratch: Path,
    progress: Progress,
) -> _Found:
    """By the posterior covariance: rows of every candidate once, then greedily."""
    objective = known.recipe.objective
    whitening = Whitening(potential)
    information = Information(whitening.width, objective.kl_temperature)
    energies = wish.method == "energy"
    counts = np.ones_like(pool.sizes) if energies else 1 + np.minimum(wish.projections, 3 * pool.sizes)
    with closing(RowFile(scratch, whitening.width, wish.precision, int(counts.sum()))) as rows:
        scores, alone = np.zeros(len(pool)), np.zeros(len(pool))
        with progress("candidates", len(pool)) as advance:
            calls = Calls(wish.structures, wish.batch_atoms, advance)
            made = (
                energy_rows(pool, potential, objective, whitening, calls)
                if energies
                else label_rows(
                    pool, potential, objective, whitening, calls, projections=wish.projections, seed=wish.seed
                )
            )
            for i, mine in made:
                rows.append(mine)
                # as they are read again: rounded
                alone[i] = information.gains([rows[i]])[0]
                scores[i] = prior_std(mine, int(pool.sizes[i]), wish.method, objective, potential.calibration)
        for i in audits:
            gain = float(information.gains([rows[i]])[0])
            information.take(rows[i])
            yield i, float(scores[i]), gain, float(alone[i])
        with progress("choosing", budget.frames or len(pool)) as advance:
            for i, gain in most_informative(rows, alone, pool.keys, budget, information, progress=advance):
                yield i, float(scores[i]), gain, float(alone[i])


def _uniform(keys: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) of every candidate, of its key and the seed alone."""
    out = []
    for key in keys.tolist():
        digest = hashlib.blake2b(repr(("select", seed, key)).encode(), digest_size=8).digest()
        out.append((int.from_bytes(digest, "little") >> 11) / 2**53)
    return np.array(out)
