"""How many buckets fit into ``posterior.max_bytes``, and how many projections of the forces a fit takes.

The model file holds the covariance's factor, a triangle of m numbers, and the samples, r m numbers, in the model's
precision. A fit holds some matrices of m^2 numbers; neither depends on the number of frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from blip_ft.errors import RecipeError
from blip_ft.families.base.budget import SIZES, Room, megabytes

#: of the posterior in a model file, where the recipe gives no bound
FILE_BYTES = 10**7
#: fewest buckets that are chosen; with fewer the error of the sketch is that of a handful of samples
LEAST = 512
#: of force components and energies in all up to which every one is a row
ALL_ROWS = 2000
#: fewest projections of each frame's forces beyond; a gradient costs .6 to .8 of a step of training of its frame
PROJECTIONS = 8
#: groups that are left out one at a time; further ones share
FOLDS = 8
#: most buckets in which groups are left out
SCORING = 2048


class Wanted(Protocol):
    """What a recipe asks for."""

    @property
    def buckets(self) -> int | Literal["auto"]: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def max_bytes(self) -> int | None: ...  # noqa: D102


def file_bytes(buckets: int, rank: int, number: int) -> int:
    """Bytes of m buckets in a model file: factor and samples."""
    return (buckets * (buckets + 1) // 2 + min(rank, buckets) * buckets) * number


def least_buckets(weights: int) -> int:
    """The fewest that are chosen by themselves: one for every weight where these are few."""
    return min(LEAST, weights)


def most_buckets(options: Wanted, weights: int, number: int) -> int:
    """The most that fit: those of the recipe, else the largest power of two; 0 where none fit.

    Args:
        options: of the recipe.
        weights: P.
        number: bytes per number.
    """
    limit = options.max_bytes
    if options.buckets != "auto":
        fits = limit is None or file_bytes(options.buckets, options.rank, number) <= limit
        return options.buckets if fits else 0
    found, limit = least_buckets(weights), FILE_BYTES if limit is None else limit
    if file_bytes(found, options.rank, number) > limit:
        return 0
    while 2 * found <= weights and file_bytes(2 * found, options.rank, number) <= limit:
        found *= 2
    return found


def fit_buckets(options: Wanted, room: Room) -> None:
    """Refuse what no fit could keep to.

    Raises:
        RecipeError: more buckets than noisy weights, or a bound that is too small for any; the message has the smallest
            that works.
    """
    weights, number = room.scope(room.noise).weights, SIZES[room.dtype]
    if not weights:
        return
    wanted = options.buckets
    if wanted != "auto" and wanted > weights:
        raise RecipeError(
            f"{wanted:,} buckets are more than the {weights:,} noisy weights that are hashed into them",
            field="posterior.buckets",
            remedy=f"give {weights} at most, which is no sketch but all weights, or leave the key out",
        )
    if not most_buckets(options, weights, number):
        buckets = least_buckets(weights) if wanted == "auto" else wanted
        least = file_bytes(buckets, options.rank, number)
        raise RecipeError(
            f"{buckets:,} buckets with {min(options.rank, buckets)} samples do not fit into "
            f"{megabytes(int(options.max_bytes or 0))}",
            field="posterior.max_bytes",
            remedy=f"give at least {least} ({megabytes(least)}), or fewer samples (posterior.rank)",
        )


def fit_projections(
    wanted: int | Literal["all"], room: Room, say: Callable[[str], object]
) -> int | Literal["all"]:
    """R of the last fit.

    A gradient costs as long as some part of a step of training of its frame, so that R sets the share of the time:
    a fixed R for sets of any size, and more for small ones, whose error bars need them.
    """
    if wanted != "all":
        return wanted
    n_frames, every = len(room.n_atoms), sum(1 + 3 * n for n in room.n_atoms)
    if every <= ALL_ROWS or not n_frames:
        return "all"
    found = max(PROJECTIONS, ALL_ROWS // n_frames - 1)
    if found >= 3 * max(room.n_atoms):
        return "all"
    say(
        f"posterior.projections: {found} orthonormal projections of each frame's forces instead of all components, "
        f"{n_frames * (1 + found):,} gradients instead of {every:,}"
    )
    return found


def scoring_width(buckets: int) -> int:
    """Buckets in which groups are left out, which takes a decomposition for each: a divisor of m."""
    while buckets > SCORING and buckets % 2 == 0:
        buckets //= 2
    return buckets


def algebra(options: Wanted, rows: float, weights: int, number: int) -> tuple[float, float]:
    """Products of numbers, and bytes, of a fit: sums of rows, left-out groups, the factor."""
    m = float(most_buckets(options, weights, number) or least_buckets(weights))
    width = float(scoring_width(int(m)))
    products = rows * (m * m + width * width) / 2 + 10 * FOLDS * width**3 + 4 * m**3
    return products, 8 * (5 * m * m + (FOLDS + 4) * width * width)
