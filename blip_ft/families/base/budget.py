"""Room that ``posterior.max_bytes`` leaves, and how the families of the full covariance are fitted into it.

Two things are as large as the number P of noisy weights times something: what the model file holds, and the
gradient rows that are held while the posterior is fitted, (frames) (1 + R) P numbers. Each must fit. The full
covariance takes every force component while these rows fit (3 GB where no bound is given), random projections else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from blip_ft.errors import RecipeError

#: least rank and projections before fewer weights carry noise: with r = 16 error bars on ammonia and
#: on unseen phases of SiO2 were too narrow by far, with 32 nearly as good as with 64
MIN_RANK = 32
MIN_PROJECTIONS = 2
#: gradient rows of the families of the full covariance, bytes, where the recipe gives no bound
ROW_BYTES = 3 * 10**9
#: bytes per number
SIZES = {"float32": 4, "float16": 2, "float64": 8}

Options = TypeVar("Options")


@dataclass(frozen=True)
class Scope:
    """Modules that carry noise, and how many weights they have."""

    noise: str | list[str]
    names: frozenset[str]
    weights: int


@dataclass(frozen=True)
class Room:
    """What a fit is about to hold.

    Attributes:
        n_atoms: of every training frame.
        n_context: frames without labels.
        dtype: of the model.
        noise: modules that carry noise, as the recipe says.
        scope: ``noise`` -> what that is in this model.
        presets: names of narrower choices that the model knows.
    """

    n_atoms: Sequence[int]
    n_context: int
    dtype: str
    noise: str | list[str]
    scope: Callable[[str | list[str]], Scope]
    presets: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fitted(Generic[Options]):
    """Options, and modules that carry noise, within the bound."""

    options: Options
    noise: str | list[str]


class Rows(Protocol):
    """Options of a family that is fitted to gradient rows."""

    @property
    def row_dtype(self) -> str | None: ...  # noqa: D102
    @property
    def projections(self) -> int | Literal["all"]: ...  # noqa: D102
    @property
    def max_bytes(self) -> int | None: ...  # noqa: D102


def fit_full_covariance(options: Rows, room: Room, say: Callable[[str], object]) -> int | Literal["all"]:
    """As many projections of each frame's forces as fit.

    Raises:
        RecipeError: too little room for :data:`MIN_PROJECTIONS` projections.
    """
    limit = int(options.max_bytes or ROW_BYTES)
    number = SIZES[options.row_dtype or room.dtype]
    p = room.scope(room.noise).weights
    n_frames, every = len(room.n_atoms), sum(1 + 3 * n for n in room.n_atoms)
    rows = every if options.projections == "all" else n_frames * (1 + options.projections)
    if not p or not n_frames or rows * p * number <= limit:
        return options.projections
    found = limit // (n_frames * p * number) - 1
    if found < MIN_PROJECTIONS:
        least = row_bytes(p, n_frames, MIN_PROJECTIONS, number)
        raise RecipeError(
            f"the gradients of {n_frames} frames with respect to {p:,} noisy weights do not fit into "
            f"{megabytes(limit)}",
            field="posterior.max_bytes",
            remedy=f"give at least {least} ({megabytes(least)}), or noise on fewer weights "
            "(model.noise=readout)",
        )
    say(
        f"posterior.max_bytes {megabytes(limit)}: {found} random projections of each frame's forces instead of "
        f"{options.projections}, whose gradients take {megabytes(rows * p * number)}"
    )
    return found


def fit_samples(rank: int, max_bytes: int | None, room: Room, say: Callable[[str], object]) -> int:
    """As many samples of all noisy weights, of ``rank``, as fit.

    Raises:
        RecipeError: too little room for :data:`MIN_RANK` samples.
    """
    limit = int(max_bytes or ROW_BYTES)
    p = room.scope(room.noise).weights
    size = SIZES[room.dtype] * p
    if not room.n_atoms or rank * size <= limit:
        return rank
    if limit // size < MIN_RANK:
        raise RecipeError(
            f"{MIN_RANK} samples of {p:,} noisy weights do not fit into {megabytes(limit)}",
            field="posterior.max_bytes",
            remedy=f"give at least {MIN_RANK * size} ({megabytes(MIN_RANK * size)}), or noise on fewer "
            "weights (model.noise=readout)",
        )
    say(f"posterior.max_bytes {megabytes(limit)}: {limit // size} samples instead of {rank}")
    return limit // size


def row_bytes(weights: int, n_frames: int, projections: int, number: int) -> int:
    """Bytes of the gradient rows: the energy and R projections of the forces of every frame."""
    return n_frames * (1 + projections) * weights * number


def megabytes(n: int) -> str:
    """Bytes in words, rounded up."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            digits = 10 ** max(0, 2 - int(math.log10(n / size)))
            return f"{math.ceil(n / size * digits) / digits:g} {unit}"
    return f"{n} bytes"
