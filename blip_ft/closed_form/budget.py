"""What fits into ``posterior.max_bytes``: a recipe with what its posterior family has to make smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blip_ft.backbones.protocol import Backbone
from blip_ft.config import Recipe
from blip_ft.families.base.budget import Room, Scope
from blip_ft.variational.convert import plan


def fit_to_budget(
    recipe: Recipe, backbone: Backbone, n_atoms: Sequence[int], n_context: int, say: Callable[[str], object]
) -> Recipe:
    """The recipe with what has to be smaller for ``posterior.max_bytes``; itself where all fits.

    Args:
        recipe: validated.
        backbone: not yet converted.
        n_atoms: of every training frame.
        n_context: frames without labels whose gradients a family may hold too.
        say: is told what was reduced, from what to what, with the bytes.

    Raises:
        RecipeError: nothing fits; the message has the smallest bound that would.
    """
    train = "none" if recipe.model.mean == "frozen" else recipe.model.train

    def scope(noise: str | list[str]) -> Scope:
        rows = [r for r in plan(backbone, train=train, noise=noise).table if r.noisy]
        return Scope(noise, frozenset(r.name for r in rows), sum(r.n_weights for r in rows))

    room = Room(
        n_atoms, n_context, recipe.model.dtype, recipe.model.noise, scope, frozenset(backbone.presets)
    )
    fitted = recipe.posterior.fit_to_budget(room, say)
    if fitted.options == recipe.posterior and fitted.noise == recipe.model.noise:
        return recipe
    out = recipe.model_copy(deep=True)
    out.posterior, out.model.noise = fitted.options, fitted.noise
    return out
