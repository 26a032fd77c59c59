"""What fits into ``posterior.max_bytes``: storage, projections, rank and scope of a subspace posterior.

Two things are as large as the number P of noisy weights times something: the directions in the
model file, r P numbers of the storage type, and the gradient rows that are held while they are
fitted, (frames) (1 + R) P numbers of the model's precision. Each must fit. Given up, in this order, is

1. storage in float32;
2. projections R per frame (rows), not below ``MIN_PROJECTIONS``;
3. rank r (directions), not below ``MIN_RANK``;
4. noise on all that the recipe says: ``scalar`` weights, then ``readout`` alone, with 1 to 3 anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from blip_ft.errors import RecipeError
from blip_ft.families.base.budget import (
    MIN_PROJECTIONS,
    MIN_RANK,
    SIZES,
    Room,
    Scope,
    megabytes,
    row_bytes,
)

#: projections of ``subspace`` that "all" stands for: it spans what the data leave open with few
PROJECTIONS = 8
#: presets that are tried, wide to narrow
SCOPES = ("scalar", "readout")


class Wanted(Protocol):
    """What a recipe asks for."""

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def projections(self) -> int | Literal["all"]: ...  # noqa: D102
    @property
    def storage(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Fitted:
    """What a scope comes to within a budget."""

    scope: Scope
    storage: str
    projections: int
    rank: int


def fit(options: Wanted, limit: int, room: Room, say: Callable[[str], object]) -> Fitted:
    """The most that fits into ``limit`` bytes.

    Raises:
        RecipeError: nothing does; the message has the smallest bound that would.
    """
    n_frames, number = len(room.n_atoms) + room.n_context, SIZES[room.dtype]
    scopes = _scopes(room)
    found = next((f for s in scopes if (f := _fit(s, options, n_frames, number, limit))), None)
    if found is None:
        least = min(_least(s, options, n_frames, number) for s in scopes)
        raise RecipeError(
            f"no subspace posterior of this model and {n_frames} frames fits into {megabytes(limit)}",
            field="posterior.max_bytes",
            remedy=f"give at least {least} ({megabytes(least)}), or fewer frames (posterior.perturbed_share)",
        )
    _tell(found, scopes[0], options, n_frames, number, limit, say)
    return found


def _scopes(room: Room) -> list[Scope]:
    """The recipe's own modules, then narrower presets inside them."""
    out = [room.scope(room.noise)]
    for preset in SCOPES:
        if preset in room.presets:
            scope = room.scope(preset)
            if scope.names < out[-1].names and scope.weights < out[-1].weights:
                out.append(scope)
    return out


def _storages(options: Wanted) -> Sequence[str]:
    return ("float32", "float16") if options.storage == "auto" else (options.storage,)


def projections_of(options: Wanted) -> int:
    """R of ``subspace``."""
    return PROJECTIONS if options.projections == "all" else options.projections


def _fit(scope: Scope, options: Wanted, n_frames: int, number: int, limit: int) -> Fitted | None:
    """The most of a scope that fits, or None if that is too little."""
    p = scope.weights
    if not p:
        return None
    per_projection = n_frames * p * number
    asked = projections_of(options)
    projections = min(asked, limit // per_projection - 1)
    if projections < min(asked, MIN_PROJECTIONS):
        return None
    wanted = min(options.rank, p)
    for storage in _storages(options):
        rank = min(wanted, limit // (p * SIZES[storage]))
        if rank == wanted:
            break
    if rank < min(wanted, MIN_RANK):
        return None
    # a rank beyond the number of weights is cut by the posterior itself
    return Fitted(scope, storage, projections, options.rank if rank == wanted else rank)


def _least(scope: Scope, options: Wanted, n_frames: int, number: int) -> int:
    """Smallest bound with which :func:`_fit` finds something."""
    p = scope.weights
    rank = min(options.rank, p, MIN_RANK)
    projections = min(projections_of(options), MIN_PROJECTIONS)
    return max(rank * p * SIZES[_storages(options)[-1]], row_bytes(p, n_frames, projections, number))


def _tell(
    found: Fitted,
    first: Scope,
    options: Wanted,
    n_frames: int,
    number: int,
    limit: int,
    say: Callable[[str], object],
) -> None:
    """One line per reduction, and what is used."""
    where = f"posterior.max_bytes {megabytes(limit)}"
    p, size = found.scope.weights, SIZES[found.storage]
    if found.scope is not first:
        say(
            f"{where}: noise on {found.scope.noise} ({p:,} weights) instead of {first.noise} "
            f"({first.weights:,} weights), which needs {megabytes(_least(first, options, n_frames, number))} at least"
        )
    if options.storage == "auto" and found.storage == "float16":
        full = min(options.rank, p) * p * SIZES["float32"]
        say(f"{where}: directions stored in float16 instead of float32, which takes {megabytes(full)}")
    asked = projections_of(options)
    if found.projections < asked:
        before = row_bytes(p, n_frames, asked, number)
        say(
            f"{where}: {found.projections} projections instead of {asked}, whose gradients "
            f"({n_frames} frames) take {megabytes(before)}"
        )
    if found.rank < options.rank:
        before = min(options.rank, p) * p * size
        say(f"{where}: rank {found.rank} instead of {options.rank}, which takes {megabytes(before)}")
    rows = row_bytes(p, n_frames, found.projections, number)
    directions = min(found.rank, p) * p * size
    say(
        f"{where}: directions {megabytes(directions)} ({found.storage}), gradients {megabytes(rows)} "
        f"while they are fitted"
    )
