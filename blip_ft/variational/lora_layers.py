"""LoRA of peft for weights that are several matrices."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from blip_ft.variational.base import VariationalLayer
from blip_ft.variational.sites import Block


class _Factors(nn.Module):
    """One flat parameter, cut into a thin matrix per block."""

    def __init__(self, shapes: list[tuple[int, int]], like: Tensor) -> None:
        super().__init__()
        self.shapes = shapes
        self.weight = nn.Parameter(like.new_zeros(sum(m * n for m, n in shapes)))

    def matrices(self) -> list[Tensor]:
        """A view per block."""
        parts = self.weight.split([m * n for m, n in self.shapes])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@functools.cache
def block_lora(kind: type[VariationalLayer]) -> type[nn.Module]:
    """The class of LoRA layers for modules of which ``kind`` is the variational form; imports peft."""
    from peft.tuners.lora.layer import LoraLayer

    class BlockLora(nn.Module, LoraLayer):  # type: ignore[misc]
        """LoRA on each matrix of a vendor's weight.

        A block with fewer rows or columns than the rank takes their number as its rank.

        Args:
            base_layer: the vendor's module.
            adapter_name: peft's name of the adapter.
            config: peft's configuration.
            options: what else peft passes.
        """

        # attributes of peft's class
        r: dict[str, int]
        lora_alpha: dict[str, float]
        scaling: dict[str, float]
        lora_dropout: Any
        lora_A: Any  # noqa: N815
        lora_B: Any  # noqa: N815

        def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> None:
            nn.Module.__init__(self)
            LoraLayer.__init__(self, base_layer, **options)
            self.blocks: tuple[Block, ...] = kind.blocks(base_layer)
            self.shape = kind.shape(base_layer)
            self._active_adapter = adapter_name
            like = kind.parameter(base_layer).detach()
            ranks = [min(config.r, *b.shape) for b in self.blocks]
            pairs = list(zip(self.blocks, ranks, strict=True))
            self.r[adapter_name], self.lora_alpha[adapter_name] = config.r, config.lora_alpha
            self.scaling[adapter_name] = config.lora_alpha / config.r
            self.lora_dropout[adapter_name] = nn.Identity()
            self.lora_A[adapter_name] = _Factors([(r, b.shape[1 - b.output_axis]) for b, r in pairs], like)
            self.lora_B[adapter_name] = _Factors([(b.channels, r) for b, r in pairs], like)

        def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
            """Sizes of a single matrix, which peft asks for; there may be several."""
            return None, None

        def get_delta_weight(self, adapter: str) -> Tensor:
            """(*shape) the change of the vendor's weight."""
            parts = []
            first: list[Tensor] = self.lora_A[adapter].matrices()
            second: list[Tensor] = self.lora_B[adapter].matrices()
            for block, a, b in zip(self.blocks, first, second, strict=True):
                product = b @ a
                parts.append((product if block.output_axis == 0 else product.T).reshape(-1))
            whole: Tensor = torch.cat(parts).reshape(self.shape) * self.scaling[adapter]
            return whole

        def forward(self, *inputs: Any) -> Any:
            """Not used: the variational layer computes with the weight."""
            raise NotImplementedError

    return BlockLora
