"""A batch evaluated as several, side by side (``side_by_side``), and differentiated so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.system.side_by_side import side_by_side


def evaluate_parts(
    evaluate: Callable[[Batch], tuple[Prediction, Tensor | None]],
    parts: Sequence[Batch],
    parameters: Iterable[Tensor],
) -> tuple[Prediction, Tensor | None]:
    """Evaluate the parts of a batch side by side; the result is that of the whole batch.

    Args:
        evaluate: prediction of one part, and one number for each structure or ``None``.
        parts: their structures follow each other.
        parameters: what gradients may be wanted with respect to. With grad enabled the result is differentiable with
            respect to those that require grad, once; backward calls run side by side too.
    """
    wanted = [p for p in parameters if p.requires_grad] if torch.is_grad_enabled() else []
    if not wanted:
        results = [named(result) for result in side_by_side(evaluate, parts)]
        return unnamed({name: torch.cat([r[name] for r in results]) for name in results[0]})
    names: list[str] = []
    flat = _Parts.apply(evaluate, parts, names, *wanted)
    return unnamed(dict(zip(names, flat, strict=True)))


def named(result: tuple[Prediction, Tensor | None]) -> dict[str, Tensor]:
    """What an evaluation has given, by name."""
    prediction, own = result
    values = {f.name: getattr(prediction, f.name) for f in fields(prediction)} | {"own": own}
    return {name: value for name, value in values.items() if value is not None}


def unnamed(values: dict[str, Tensor]) -> tuple[Prediction, Tensor | None]:
    """The inverse of :func:`named`."""
    own = values.pop("own", None)
    return Prediction(**values), own


class _Parts(torch.autograd.Function):
    """Holds the graphs of the parts between a forward and a backward call."""

    @staticmethod
    def forward(
        ctx: Any, evaluate: Any, parts: Sequence[Batch], names: list[str], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            ctx.results = [named(result) for result in side_by_side(evaluate, parts)]
        names.extend(ctx.results[0])
        ctx.names, ctx.parameters = names, parameters
        ctx.set_materialize_grads(False)
        outputs = tuple(torch.cat([r[name].detach() for r in ctx.results]) for name in names)
        # forces on an atom alone are constant, those of another part need not be
        fixed = [
            o
            for name, o in zip(names, outputs, strict=True)
            if not any(r[name].requires_grad for r in ctx.results)
        ]
        ctx.mark_non_differentiable(*fixed)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.results is None:
            raise RuntimeError("a batch in parts can be differentiated once")
        results, ctx.results = ctx.results, None
        given = {n: g for n, g in zip(ctx.names, grads, strict=True) if g is not None}
        split = {n: g.split([len(r[n]) for r in results]) for n, g in given.items()}
        wanted = [p for p, need in zip(ctx.parameters, ctx.needs_input_grad[3:], strict=True) if need]

        def gradients(k: int) -> tuple[Tensor | None, ...]:
            names = [n for n in given if results[k][n].requires_grad]
            if not names:
                return (None,) * len(wanted)
            out: tuple[Tensor | None, ...] = torch.autograd.grad(
                [results[k][n] for n in names], wanted, [split[n][k] for n in names], allow_unused=True
            )
            results[k].clear()  # frees the graph
            return out

        each = side_by_side(gradients, range(len(results)))
        totals = iter([total(column) for column in zip(*each, strict=True)])
        return (None, None, None, *(next(totals) if need else None for need in ctx.needs_input_grad[3:]))


def total(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Sum in the order of the parts, so that it does not depend on which was first."""
    known = [p for p in parts if p is not None]
    return sum(known[1:], known[0]) if known else None
