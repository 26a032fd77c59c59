"""What fits into ``posterior.max_bytes``: storage, projections, rank and scope of a subspace posterior.

Two things are as large as the number P of noisy weights times something: the directions in the
model file, r P numbers of the storage type, and the gradient rows that are held while they are
fitted, (frames) (1 + R) P numbers of the model's precision. Each must fit. Given up, in this order, is

1. storage in float32;
2. projections R per frame (rows), not below ``MIN_PROJECTIONS``;
3. rank r (directions), not below ``MIN_RANK``;
4. noise on all that the recipe says: ``scalar`` weights, then ``readout`` alone, with 1 to 3 anew.

That is for ``subspace``. The families of the full covariance take every force component while these rows
fit (3 GB where no bound is given), random projections else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blip_ft.backbone import Backbone
from blip_ft.config import PosteriorConfig, Recipe
from blip_ft.errors import RecipeError
from blip_ft.variational.convert import plan

#: least rank and projections before fewer weights carry noise: with r = 16 error bars on ammonia and
#: on unseen phases of SiO2 were too narrow by far, with 32 nearly as good as with 64
MIN_RANK = 32
MIN_PROJECTIONS = 2
#: gradient rows of the families of the full covariance, bytes, where the recipe gives no bound
ROW_BYTES = 3 * 10**9
#: projections of ``subspace`` that "all" stands for: it spans what the data leave open with few
PROJECTIONS = 8
#: presets that are tried, wide to narrow
SCOPES = ("scalar", "readout")
#: bytes per number
SIZES = {"float32": 4, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Scope:
    """Modules that carry noise, and how many weights they have."""

    noise: str | list[str]
    names: frozenset[str]
    weights: int


@dataclass(frozen=True)
class Fitted:
    """What a scope comes to within a budget."""

    scope: Scope
    storage: str
    projections: int
    rank: int


def fit_to_budget(
    recipe: Recipe, backbone: Backbone, n_atoms: Sequence[int], n_context: int, say: Callable[[str], object]
) -> Recipe:
    """The recipe with what has to be smaller for ``posterior.max_bytes``; itself where all fits.

    Args:
        recipe: validated.
        backbone: not yet converted.
        n_atoms: of every training frame.
        n_context: frames without labels whose gradients ``subspace`` holds too.
        say: is told what was reduced, from what to what, with the bytes.

    Raises:
        RecipeError: nothing fits; the message has the smallest bound that would.
    """
    family = recipe.posterior.family
    if family == "subspace" and recipe.posterior.max_bytes is not None:
        return _fit_subspace(recipe, backbone, len(n_atoms) + n_context, say)
    if family in ("pathwise", "posthoc_laplace"):
        return _fit_full(recipe, backbone, n_atoms, say)
    return recipe


def _fit_subspace(recipe: Recipe, backbone: Backbone, n_frames: int, say: Callable[[str], object]) -> Recipe:
    """Storage, projections, rank and scope of ``subspace``."""
    options = recipe.posterior
    assert options.max_bytes is not None
    limit, number = int(options.max_bytes), SIZES[recipe.model.dtype]
    scopes = _scopes(recipe, backbone)
    found = next((f for s in scopes if (f := _fit(s, options, n_frames, number, limit))), None)
    if found is None:
        least = min(_least(s, options, n_frames, number) for s in scopes)
        raise RecipeError(
            f"no subspace posterior of this model and {n_frames} frames fits into {megabytes(limit)}",
            field="posterior.max_bytes",
            remedy=f"give at least {least} ({megabytes(least)}), or fewer frames (posterior.context)",
        )
    _tell(found, scopes[0], options, n_frames, number, limit, say)
    out = recipe.model_copy(deep=True)
    out.model.noise = found.scope.noise
    out.posterior.rank, out.posterior.projections = found.rank, found.projections
    out.posterior.storage = "float32" if found.storage == "float32" else "float16"
    return out


def _fit_full(
    recipe: Recipe, backbone: Backbone, n_atoms: Sequence[int], say: Callable[[str], object]
) -> Recipe:
    """As many projections and samples as fit, for families of the full covariance.

    Raises:
        RecipeError: too little room for :data:`MIN_PROJECTIONS` projections or :data:`MIN_RANK` samples.
    """
    options = recipe.posterior
    limit = int(options.max_bytes or ROW_BYTES)
    # the Laplace covariance takes its rows to float64
    number = SIZES["float64" if options.family == "posthoc_laplace" else recipe.model.dtype]
    p = _scope(recipe.model.noise, recipe, backbone).weights
    n_frames, every = len(n_atoms), sum(1 + 3 * n for n in n_atoms)
    if not p or not n_frames:
        return recipe
    rows = every if options.projections == "all" else n_frames * (1 + options.projections)
    out = recipe.model_copy(deep=True)
    where = f"posterior.max_bytes {megabytes(limit)}"
    if rows * p * number > limit:
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
        out.posterior.projections = found
        say(
            f"{where}: {found} random projections of each frame's forces instead of {options.projections}, "
            f"whose gradients take {megabytes(rows * p * number)}"
        )
    samples = SIZES[recipe.model.dtype] * p
    if options.family == "pathwise" and options.rank * samples > limit:
        if limit // samples < MIN_RANK:
            raise RecipeError(
                f"{MIN_RANK} samples of {p:,} noisy weights do not fit into {megabytes(limit)}",
                field="posterior.max_bytes",
                remedy=f"give at least {MIN_RANK * samples} ({megabytes(MIN_RANK * samples)}), or noise on fewer "
                "weights (model.noise=readout)",
            )
        out.posterior.rank = limit // samples
        say(f"{where}: {out.posterior.rank} samples instead of {options.rank}")
    return out if out.posterior != options else recipe


def _scopes(recipe: Recipe, backbone: Backbone) -> list[Scope]:
    """The recipe's own modules, then narrower presets inside them."""
    out = [_scope(recipe.model.noise, recipe, backbone)]
    for preset in SCOPES:
        if preset in backbone.presets:
            scope = _scope(preset, recipe, backbone)
            if scope.names < out[-1].names and scope.weights < out[-1].weights:
                out.append(scope)
    return out


def _scope(noise: str | list[str], recipe: Recipe, backbone: Backbone) -> Scope:
    train = "none" if recipe.model.mean == "frozen" else recipe.model.train
    rows = [r for r in plan(backbone, train=train, noise=noise).table if r.noisy]
    return Scope(noise, frozenset(r.name for r in rows), sum(r.n_weights for r in rows))


def _storages(options: PosteriorConfig) -> Sequence[str]:
    return ("float32", "float16") if options.storage == "auto" else (options.storage,)


def projections_of(options: PosteriorConfig) -> int:
    """R of ``subspace``."""
    return PROJECTIONS if options.projections == "all" else options.projections


def row_bytes(weights: int, n_frames: int, projections: int, number: int) -> int:
    """Bytes of the gradient rows: the energy and R projections of the forces of every frame."""
    return n_frames * (1 + projections) * weights * number


def _fit(scope: Scope, options: PosteriorConfig, n_frames: int, number: int, limit: int) -> Fitted | None:
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


def _least(scope: Scope, options: PosteriorConfig, n_frames: int, number: int) -> int:
    """Smallest bound with which :func:`_fit` finds something."""
    p = scope.weights
    rank = min(options.rank, p, MIN_RANK)
    projections = min(projections_of(options), MIN_PROJECTIONS)
    return max(rank * p * SIZES[_storages(options)[-1]], row_bytes(p, n_frames, projections, number))


def _tell(
    found: Fitted,
    first: Scope,
    options: PosteriorConfig,
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


def megabytes(n: int) -> str:
    """Bytes in words, rounded up."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            digits = 10 ** max(0, 2 - int(math.log10(n / size)))
            return f"{math.ceil(n / size * digits) / digits:g} {unit}"
    return f"{n} bytes"
