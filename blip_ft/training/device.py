"""Where predictions are made, apart from Lightning, which is slow to import."""

from __future__ import annotations

import torch

from blip_ft.config import Recipe


def device_of(recipe: Recipe) -> torch.device:
    """Device that predictions after training run on."""
    accelerator = recipe.trainer.get("accelerator", "auto")
    use = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if use else "cpu")
