"""A batch evaluated as several, one after the other, so that one of them has to fit into memory.

A graph of forces that can be differentiated holds some MB per atom until the backward call. Here no graph is kept: the
backward call evaluates each part again, differentiates it and lets it go. Noise is keyed, so that the second
evaluation is the first. It costs one evaluation more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from blip_ft.backbones.parts import named, total, unnamed
from blip_ft.backbones.protocol import Batch, Prediction

Evaluate = Callable[[Batch], tuple[Prediction, Tensor | None]]


def evaluate_in_turn(
    evaluate: Evaluate, parts: Sequence[Batch], parameters: Iterable[Tensor]
) -> tuple[Prediction, Tensor | None]:
    """Evaluate the parts of a batch one after the other; the result is that of the whole batch.

    Args:
        evaluate: prediction of one part, and one number for each structure or ``None``; gives the same twice.
        parts: their structures follow each other.
        parameters: with grad enabled the result is differentiable with respect to those that require grad.
    """
    wanted = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if not wanted:
        results = [named(evaluate(part)) for part in parts]
        return unnamed({name: torch.cat([r[name] for r in results]) for name in results[0]})
    names: list[str] = []
    flat = _InTurn.apply(evaluate, parts, names, *wanted)
    return unnamed(dict(zip(names, flat, strict=True)))


class _InTurn(torch.autograd.Function):
    """Evaluates the parts again in the backward call."""

    @staticmethod
    def forward(
        ctx: Any, evaluate: Evaluate, parts: Sequence[Batch], names: list[str], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        results: list[dict[str, Tensor]] = []
        moving: set[str] = set()  # of some part: forces on an atom alone are constant
        for part in parts:
            with torch.enable_grad():  # the backbone detaches its forces without
                result = named(evaluate(part))
            moving |= {name for name, value in result.items() if value.requires_grad}
            results.append({name: value.detach() for name, value in result.items()})
            del result
        names.extend(results[0])
        ctx.evaluate, ctx.parts, ctx.names, ctx.parameters = evaluate, parts, names, parameters
        ctx.set_materialize_grads(False)
        outputs = tuple(torch.cat([r[name] for r in results]) for name in names)
        ctx.mark_non_differentiable(
            *(o for name, o in zip(names, outputs, strict=True) if name not in moving)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {n: g for n, g in zip(ctx.names, grads, strict=True) if g is not None}
        wanted = [p for p, need in zip(ctx.parameters, ctx.needs_input_grad[3:], strict=True) if need]
        sums: list[Tensor | None] = [None] * len(wanted)
        done = dict.fromkeys(given, 0)
        for part in ctx.parts:
            with torch.enable_grad():
                result = named(ctx.evaluate(part))
            names = [n for n in given if result[n].requires_grad]
            own = []
            for n in given:
                rows = slice(done[n], done[n] + len(result[n]))
                done[n] = rows.stop
                if n in names:
                    own.append(given[n][rows])
            if names:
                some = torch.autograd.grad([result[n] for n in names], wanted, own, allow_unused=True)
                sums = [total(pair) for pair in zip(sums, some, strict=True)]
            del result
        totals = iter(sums)
        return (None, None, None, *(next(totals) if need else None for need in ctx.needs_input_grad[3:]))
