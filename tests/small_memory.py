"""A machine on which the fake model fits into memory up to so many atoms, in evaluation or in training's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from blip_ft.backbones.conservative import Evaluation, geometry_is_wanted
from blip_ft.backbones.protocol import Batch
from blip_ft.testing.fake import FakeBackbone

#: as torch 2 says it on a CPU
CPU = (
    "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "68719476736 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = {
    "cpu": RuntimeError(CPU),
    "cuda": torch.OutOfMemoryError("CUDA out of memory."),
    "python": MemoryError(),
}


@dataclass
class Seen:
    """Atoms of the calls that fitted, and of those that did not."""

    fitted: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)


class _Gradient(torch.autograd.Function):
    """The same number; memory runs out when a loss is differentiated, not when forces are."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, fail: Any) -> torch.Tensor:
        ctx.fail = fail
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if not geometry_is_wanted():
            ctx.fail()
        return grad, None


@contextmanager
def memory_for(atoms: int, *, error: str = "cpu", backward: bool = False) -> Iterator[Seen]:
    """Memory runs out in calls of more atoms.

    Args:
        atoms: that fit.
        error: key of :data:`ERRORS`.
        backward: it runs out when a loss is differentiated.
    """
    seen, energy = Seen(), FakeBackbone.energy_of

    def limited(self: FakeBackbone, batch: Batch, *, leaves: bool = True) -> Evaluation:
        n = int(batch.numbers.numel())

        def check() -> None:
            (seen.failed if n > atoms else seen.fitted).append(n)
            if n > atoms:
                raise type(ERRORS[error])(*ERRORS[error].args)

        if not backward:
            check()
            return energy(self, batch, leaves=leaves)
        out = energy(self, batch, leaves=leaves)
        if torch.is_grad_enabled() and out.energy.requires_grad:
            out.energy = _Gradient.apply(out.energy, check)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeBackbone, "energy_of", limited)
        yield seen
