"""A backbone around any module, and a layer on its own with everything it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip_ft.backbones.protocol import Backbone
from blip_ft.families.base.posterior import Posterior
from blip_ft.families.registry import posterior_class
from blip_ft.variational.layers import VariationalLayer, layer_type
from blip_ft.variational.mean import FullChange
from blip_ft.variational.noise import NoiseState, RowLayout, keyed_row_normal
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Site


class ToyBackbone(Backbone):
    """Any module, to convert; it knows no atoms and cannot be evaluated as a potential."""

    name = "toy"

    def __init__(self, model: nn.Module, keep: dict[str, str], presets: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.model = model
        self.keep, self.presets = keep, {"all": (".*",), "scalar": (".*",)} | presets

    def row_kind(self, module_name: str) -> str:
        return "edge" if "edge" in module_name else "atom"

    def _unused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    load = from_config = classmethod(_unused)
    config = graph = collate = forward = stock_calculator = _unused


@dataclass
class Bench:
    """One converted layer with its prior, posterior and noise."""

    base: nn.Module
    layer: VariationalLayer
    site: Site
    prior: PretrainedPrior
    posterior: Posterior
    keys: list[int] = field(default_factory=list)

    @property
    def noise(self) -> NoiseState:
        return self.layer.noise

    def rows(self, counts: list[int]) -> RowLayout:
        """RowLayout of ``len(counts)`` structures; structure i has key 100 + i."""
        self.keys = [100 + i for i in range(len(counts))]
        return RowLayout.from_index(torch.repeat_interleave(torch.tensor(counts)), len(counts))

    def off(self) -> None:
        self.noise.clear()

    def draw(self, latent: Tensor) -> None:
        self.noise.clear()
        self.noise.weights = {n: w[0] for n, w in self.posterior.sample(latent).items()}
        self.noise.mode = "draw"

    def structure(self, counts: list[int], latent: Tensor | None = None, epoch: int = 0) -> None:
        """Noise of given latent numbers, or keyed as in training."""
        rows = self.rows(counts)
        if latent is None:
            latent = self.posterior.latent(
                [("structure", 0, epoch, k) for k in self.keys], self.layer.delta.dtype
            )
        self.noise.clear()
        self.noise.weights = self.posterior.sample(latent)
        self.noise.rows = {"atom": rows}
        self.noise.mode = "structure"

    def local(self, counts: list[int], epoch: int = 0) -> None:
        rows = self.rows(counts)
        self.noise.clear()
        self.noise.variances = {n: s.square() for n, s in self.posterior.std().items()}
        self.noise.row_normal = keyed_row_normal(0, epoch, self.keys)
        self.noise.rows = {"atom": rows}
        self.noise.mode = "local"


@pytest.fixture(scope="session")
def toy_backbone() -> Callable[..., ToyBackbone]:
    """``toy_backbone(model, keep={}, presets={})``."""

    def make(
        model: nn.Module,
        keep: dict[str, str] | None = None,
        presets: dict[str, tuple[str, ...]] | None = None,
    ) -> ToyBackbone:
        return ToyBackbone(model, keep or {}, presets or {})

    return make


@pytest.fixture(scope="session")
def bench() -> Callable[..., Bench]:
    """``bench(module)``: its variational form, with random mean and spread."""

    def make(
        base: nn.Module,
        *,
        family: str = "weight",
        prior_scale: float = 0.5,
        spread: float = 0.3,
        seed: int = 0,
        delta: bool = True,
    ) -> Bench:
        generator = torch.Generator().manual_seed(seed)
        weight = base.weight
        assert isinstance(weight, nn.Parameter)
        kind = layer_type(base)
        assert not isinstance(kind, str), kind
        site = Site("layer", tuple(weight.shape), kind.blocks(base))
        shift = torch.zeros_like(weight)
        if delta:
            shift = 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
        prior = PretrainedPrior({"layer": site}, {"layer": weight.detach()}, prior_scale)
        posterior = posterior_class(family)([site], prior, spread)
        with torch.no_grad():
            for p in posterior.parameters():  # a different std for every weight
                p.add_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
        layer = kind(base, site, FullChange(nn.Parameter(shift)), NoiseState(), "atom")
        return Bench(base, layer, site, prior, posterior)

    return make


@pytest.fixture(scope="session")
def random_rotation() -> Callable[[int], Tensor]:
    """A proper rotation (3, 3), float64, from a seed."""

    def make(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        q = q * r.diagonal().sign()
        return q * torch.linalg.det(q).sign()

    return make
