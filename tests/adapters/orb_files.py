"""Small random Orb models as the state dicts that the vendor's training writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "latent_dim": 16,
    "base_mlp_hidden_dim": 24,
    "base_mlp_depth": 2,
    "head_mlp_hidden_dim": 12,
    "head_mlp_depth": 1,
    "num_message_passing_steps": 2,
}


def write_orb(path: Path, architecture: str, *, seed: int = 0, **sizes: int) -> Path:
    """A state dict of the vendor's architecture, with normalisers away from 0 and 1.

    Args:
        path: of the file.
        architecture: name of a vendor's model.
        seed: of the weights.
        sizes: other sizes than ``SIZES``.
    """
    from orb_models.forcefield import pretrained
    from orb_models.forcefield.atomic_system import SystemConfig

    options: dict[str, Any] = {"device": "cpu", "system_config": SystemConfig(6.0, 120)}
    torch.manual_seed(seed)
    if "v2" in architecture:
        model = pretrained.orb_v2_architecture(**{"num_message_passing_steps": 1, **sizes}, **options)
    else:
        if "omol" in architecture:
            options |= {"has_charge_spin_cond": True, "has_stress": False}
        kind = "conservative" if "conservative" in architecture else "direct"
        function = getattr(pretrained, f"orb_v3_{kind}_architecture")
        model = function(**{**SIZES, **sizes}, **options)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean") and "heads.forces" not in name:  # forces have no mean
                buffer += 0.05
            if name.endswith("running_var"):
                buffer *= 0.3
    torch.save(model.state_dict(), path)
    return path
