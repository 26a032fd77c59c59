"""Means of low rank: the change of a weight from w0 is a product of two thin matrices.

    w = w0 + (alpha / rank) B A,   Hu et al., arXiv 2106.09685,

with one pair per matrix of the weight, hence one per path of an e3nn layer, which keeps it equivariant.
The layers are those of Hugging Face ``peft``: its own one for ``nn.Linear``, and
:func:`~blip_ft.variational.lora_layers.block_lora`'s, registered with peft, for every other type. Noise
comes on top, and the prior holds the product B A as it holds a full change.

peft takes types of its own by a private call and does not store them. They are therefore registered
again whenever a model is built, also from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip_ft.errors import BlipError, MissingBackendError
from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.lora_layers import block_lora
from blip_ft.variational.mean import Change
from blip_ft.variational.noise import normal

#: name of the one adapter in peft's layers
ADAPTER = "default"
#: releases of peft whose private interface is known to be as used here
TESTED = "0.21"


@dataclass(frozen=True)
class LowRank:
    """Rank and scale of the change of each matrix."""

    rank: int
    alpha: float


class LowRankChange(Change):
    """The product of the factors in one of peft's layers.

    Args:
        lora: peft's layer.
        site: name of the weight, which the first factors are a function of.
        shape: of the weight.
    """

    def __init__(self, lora: Any, site: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.lora, self.site, self.shape = lora, site, shape

    def value(self) -> Tensor:
        """Their product; it requires grad in every grad mode, as a parameter does."""
        with torch.enable_grad():
            out: Tensor = self.lora.get_delta_weight(ADAPTER)
        return out.reshape(self.shape)

    @torch.no_grad()
    def reset(self) -> None:
        """B is zero and A normal with std 1/rank (peft's ``gaussian``)."""
        for name, parameter in self.lora.named_parameters():
            if name.startswith("lora_A"):
                values = normal(("lora", self.site, name), parameter.numel(), parameter.dtype)
                parameter.copy_(values.reshape(parameter.shape) / self.lora.r[ADAPTER])
            else:
                parameter.zero_()


def lora_layers(
    modules: Mapping[str, tuple[nn.Module, type[VariationalLayer]]], options: LowRank
) -> dict[str, LowRankChange]:
    """One peft layer for every module, without the module inside.

    Args:
        modules: {site: (the vendor's module, its variational form)}; not changed.
        options: rank and scale.

    Returns:
        {site: the change of its weight}, zero at first.

    Raises:
        MissingBackendError: peft is not installed.
        BlipError: peft no longer takes types of layers that are not its own.
    """
    if not modules:
        return {}
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise MissingBackendError(
            "model.mean 'lora' needs the package 'peft', which is not installed",
            remedy="pip install 'blip-ft[lora]'",
            field="model.mean",
        ) from error
    names = {f"site{i}": site for i, site in enumerate(modules)}
    config: Any = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        target_modules=list(names),
    )
    own: dict[type[nn.Module], type[nn.Module]] = {}
    for module, kind in modules.values():
        if type(module) is not nn.Linear:
            own.setdefault(type(module), block_lora(kind))
    try:
        config._register_custom_module(own)
    except AttributeError as error:
        raise BlipError(
            f"peft {peft.__version__} no longer takes layers of other packages",
            remedy=f"pip install 'peft~={TESTED}.0', or model.mean=full",
            field="model.mean",
        ) from error
    holder = nn.ModuleDict({name: modules[site][0] for name, site in names.items()})
    peft.inject_adapter_in_model(config, holder, adapter_name=ADAPTER)
    out = {}
    for name, site in names.items():
        layer = holder[name]
        del layer.base_layer  # held by the variational layer, once
        module, kind = modules[site]
        out[site] = LowRankChange(layer, site, kind.shape(module))
        out[site].reset()
    return out
