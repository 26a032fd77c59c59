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
    check_ready,
    distance,
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
    found: list[Choice] = []
    for method, i, score, gain, alone in _by_method(potential, known, pool, wish, scratch, progress):
        place, order = pool.places[i], len(found) + 1
        size, group = int(pool.sizes[i]), pool.groups[i]
        found.append(Choice(order, i, place.source, place.frame, group, size, method, score, gain, alone))
    return found


def check_method(potential: BayesianPotential, method: Method) -> None:
    """Refuse a method that the model has not what it takes for, before candidates are read.

    Raises:
        BlipError: of its family, its features, or without a posterior.
    """
    if method in ("covariance", "energy"):
        Whitening(potential)
    elif method in ("farthest", "ood"):
        distance(potential)
    elif method == "top":
        check_ready(potential)


def caution(potential: BayesianPotential, wish: Wish) -> str:
    """What a batch is too large for, in words; empty where there is nothing to say."""
    if wish.method not in ("covariance", "energy") or wish.frames is None:
        return ""
    whitening = Whitening(potential)
    labels = wish.frames * (1 if wish.method == "energy" else 1 + wish.projections)
    if whitening.of_features or labels <= whitening.width:
        return ""
    return (
        f"the posterior '{potential.posterior.family}' is held in {whitening.width} numbers, which the {labels} labels "
        "of the batch use up: the last choices say little; choose fewer frames, or train with posterior.family=sketch"
    )


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


class _Draw:
    """What may be chosen, once it is known which candidates are of use; audits are drawn first."""

    def __init__(self, pool: Pool, wish: Wish) -> None:
        self.keys, self.wish = pool.keys, wish
        self.uniform = _uniform(pool.keys, wish.seed)
        self.budget = self._budget(pool, wish.frames, wish.atoms)
        self.audits: list[int] = []
        if wish.audit:
            frames = None if wish.frames is None else round(wish.audit * wish.frames)
            atoms = None if wish.atoms is None else int(wish.audit * wish.atoms)
            self.audits = list(largest(self.uniform, pool.keys, self._budget(pool, frames, atoms)))
        for i in self.audits:
            self.budget.take(i)

    def _budget(self, pool: Pool, frames: int | None, atoms: int | None) -> Budget:
        per_group = self.wish.per_group
        budget = Budget(pool.sizes, pool.groups, frames=frames, atoms=atoms, per_group=per_group)
        budget.close(pool.lost)
        return budget

    def by(self, scores: NDArray[np.float64]) -> Iterator[tuple[str, int]]:
        """Method and number of each, audits first, then the largest scores."""
        yield from ((AUDIT, i) for i in self.audits)
        yield from ((self.wish.method, i) for i in largest(scores, self.keys, self.budget))


_Found = Iterator[tuple[str, int, float | None, float | None, float | None]]


def _by_method(
    potential: BayesianPotential,
    known: Known,
    pool: Pool,
    wish: Wish,
    scratch: Path,
    progress: Progress,
) -> _Found:
    """Method, number, score, gain, and gain alone of every chosen candidate, audits first."""
    if wish.method in ("covariance", "energy"):
        yield from _informative(potential, known, pool, wish, scratch, progress)
        return
    if wish.method == "random":
        draw = _Draw(pool, wish)
        yield from ((method, i, None, None, None) for method, i in draw.by(draw.uniform))
        return
    if wish.method == "farthest":
        yield from _farthest(potential, pool, wish, scratch, progress)
        return
    by = ood_scores if wish.method == "ood" else force_stds
    with progress("candidates", len(pool)) as advance:
        calls = Calls(wish.structures, wish.batch_atoms, advance)
        scores = np.array([0.0 if s is None else s for _, s in by(pool, potential, calls)])
    for method, i in _Draw(pool, wish).by(scores):
        yield method, i, float(scores[i]), None, None


def _farthest(
    potential: BayesianPotential, pool: Pool, wish: Wish, scratch: Path, progress: Progress
) -> _Found:
    with progress("candidates", len(pool)) as advance:
        found, width = places(pool, potential, Calls(wish.structures, wish.batch_atoms, advance))
        rows = RowFile(scratch, width, wish.precision, len(pool))
        with closing(rows):
            for _, row in found:
                rows.append(row)
            draw = _Draw(pool, wish)
            yield from ((AUDIT, i, None, None, None) for i in draw.audits)
            for i, distance in farthest(rows, pool.keys, draw.budget, draw.audits):
                yield wish.method, i, None, distance, None


def _informative(
    potential: BayesianPotential,
    known: Known,
    pool: Pool,
    wish: Wish,
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
                if mine is not None:
                    # as they are read again: rounded
                    alone[i] = information.gains([rows[i]])[0]
                    scores[i] = prior_std(
                        mine, int(pool.sizes[i]), wish.method, objective, potential.calibration
                    )
        draw = _Draw(pool, wish)
        for i in draw.audits:
            gain = float(information.gains([rows[i]])[0])
            information.take(rows[i])
            yield AUDIT, i, float(scores[i]), gain, float(alone[i])
        budget = draw.budget
        with progress("choosing", len(pool) if budget.frames is None else budget.frames) as advance:
            for i, gain in most_informative(rows, alone, pool.keys, budget, information, progress=advance):
                yield wish.method, i, float(scores[i]), gain, float(alone[i])


def _uniform(keys: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) of every candidate, of its key and the seed alone."""
    out = []
    for key in keys.tolist():
        digest = hashlib.blake2b(repr(("select", seed, key)).encode(), digest_size=8).digest()
        out.append((int.from_bytes(digest, "little") >> 11) / 2**53)
    return np.array(out)
