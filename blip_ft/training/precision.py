"""In which precision a training may compute, and what is refused with its reason.

Weights are in ``model.dtype``. Below that stands TF32 (``model.tf32``: float32 matrix products of a GPU, with
10 bits of mantissa). Lightning's half precisions (``trainer.precision``) are refused for all models, TF32 for those
whose forces do not survive it (``Backbone.refused_precisions``): the errors of each are measured in
docs/adapters.md, "Precision".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from blip_ft.backbones.protocol import Backbone
from blip_ft.config import Recipe
from blip_ft.errors import RecipeError

_LAYERS = "variational layers compute in the precision of their weights, which they could not"
_BF16 = (
    "with matrix products in bfloat16 energies are off by 1.6 to 20 meV/atom and forces by 11 to 380 "
    "meV/Å (rms, SiO2, by "
    f"backbone), as much as fine-tuning is to correct; and {_LAYERS}"
)
_FP16 = (
    "with matrix products in float16 forces are off by 1.5 to 68 meV/Å (rms, SiO2, by backbone), no less than in TF32, "
    f"gradients of CHGNet overflow, MACE's code does not run; and {_LAYERS}"
)
#: what Lightning offers and is refused
_NEVER = {
    "bf16-mixed": _BF16,
    "bf16-true": _BF16,
    "16-mixed": _FP16,
    "16-true": _FP16,
}
#: Lightning's short names
_SHORT = {"bf16": "bf16-mixed", "16": "16-mixed", 16: "16-mixed"}


def check_precision(recipe: Recipe, backbone: type[Backbone]) -> None:
    """Raise if the recipe asks for a precision that the model does not survive.

    Args:
        recipe: options.
        backbone: the adapter.

    Raises:
        RecipeError: it does; says why.
    """
    if recipe.model.tf32:
        reason = backbone.refused_precisions.get("tf32")
        if reason is not None:
            raise RecipeError(
                f"TF32 is refused for {backbone.name}: {reason}",
                field="model.tf32",
                remedy="model.tf32=false",
            )
        if recipe.model.dtype == "float64":
            raise RecipeError(
                "TF32 is a way to multiply float32 numbers, and the model is in float64",
                field="model.tf32",
                remedy="model.tf32=false, or model.dtype=float32",
            )
    asked = recipe.trainer.get("precision")
    if asked is None:
        return
    name = _SHORT.get(asked, asked)
    if name in _NEVER:
        raise RecipeError(
            f"precision '{asked}' is refused: {_NEVER[name]}",
            field="trainer.precision",
            remedy="leave trainer.precision out (model.dtype chooses float32 or float64), or model.tf32=true on a GPU",
        )


@contextmanager
def matrix_products(*, tf32: bool) -> Iterator[None]:
    """Within it float32 matrix products on a GPU are in TF32, or are not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
