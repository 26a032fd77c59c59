"""What identifies a trained model by what it predicts, whatever file it came from."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from torch import Tensor

from blip_ft.potential.bayesian import BayesianPotential


def fingerprint(potential: BayesianPotential) -> str:
    """SHA-256 of all that predictions depend on: tensors in their precision, references, draws, calibration."""
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = dict(potential.state_dict())
    if potential.ood is not None:
        tensors |= {f"ood.{name}": tensor for name, tensor in potential.ood.tensors().items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().reshape(-1).numpy()).tobytes())
    rest = {
        "adapter": potential.backbone.name,
        "choices": potential.backbone.choices(),
        "posterior": potential.posterior_config.model_dump(),
        "prior_scale": potential.prior.prior_scale,
        "draws": [potential.seed, potential.n_draws, potential.amplitude],
        "references": sorted(potential.references.items()),
        "calibration": None if potential.calibration is None else potential.calibration.to_dict(),
    }
    digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return digest.hexdigest()
