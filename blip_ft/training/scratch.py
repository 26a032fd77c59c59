"""Training from scratch: the architecture of a pretrained model with the vendor's own initial weights."""

from __future__ import annotations

import torch

from blip_ft.backbones.protocol import Backbone
from blip_ft.errors import BlipError
from blip_ft.variational.convert import matches


def initial(backbone: Backbone, seed: int) -> Backbone:
    """A backbone of the same architecture whose weights are freshly initialised.

    What belongs to the architecture stays, and so do the constants that the adapter never converts
    (``Backbone.keep``: energy scale and shift per element, mean number of neighbours).

    Args:
        backbone: gives the architecture; not changed.
        seed: of the initial weights.

    Raises:
        BlipError: the adapter cannot initialise its architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(backbone).from_config(backbone.config())
    trained = dict(backbone.model.named_modules())
    for name, module in fresh.model.named_modules():
        if matches(list(backbone.keep), name):  # its own tensors: modules inside it may be converted
            for own in ("_parameters", "_buffers"):
                for key, value in getattr(trained[name], own).items():
                    if value is not None:
                        getattr(module, own)[key].data.copy_(value)
    weights = [p for p in fresh.parameters() if p.is_floating_point()]
    usable = all(not p.is_meta and bool(torch.isfinite(p).all()) for p in weights)
    if not usable or not any(bool((p != 0).any()) for p in weights):
        raise BlipError(
            f"the adapter {backbone.name} has no initial weights for this architecture",
            field="model.from_scratch",
            remedy="fine-tune its pretrained weights: from_scratch=false",
        )
    fresh.origin = {
        "checkpoint": f"initial weights, seed {seed}, in the architecture of {backbone.origin['checkpoint']}",
        "sha256": "",
    }
    return fresh.to(backbone.device)
