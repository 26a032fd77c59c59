"""The code that e3nn generates, rearranged so that its derivatives are cheaper and its numbers the same.

e3nn's tensor products and linear maps cut their inputs into slices, one for each irrep or path, and put results
together with ``torch.cat``. The derivative of a slice is a tensor of zeros as large as the whole with one part
filled in, and autograd adds one of these up for each slice; the same happens in the second derivative of ``cat``,
whose first is a slice. ``torch.split`` gives all slices at once, its derivative is one ``cat``, and
:class:`Cat` differentiates into ``split``. Terms are added in no other order (all but one of them were zero), so
energies, forces and gradients stay what they were, bit for bit. Outer products that nothing uses, which TorchScript
would drop, go too.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

WHOLE = slice(None)


class Cat(torch.autograd.Function):
    """``torch.cat`` whose derivative is ``torch.split``, and so on to any order."""

    @staticmethod
    def forward(ctx: Any, dim: int, *parts: Tensor) -> Tensor:
        """``torch.cat(parts, dim)``."""
        ctx.dim, ctx.sizes = dim, [p.shape[dim] for p in parts]
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient in pieces."""
        (grad,) = grads
        return (None, *torch.split(grad, ctx.sizes, ctx.dim))


def cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat`` by :class:`Cat`."""
    out: Tensor = Cat.apply(dim, *parts)
    return out


def rearrange(model: nn.Module) -> int:
    """Rearrange every graph of a model, in place; their number.

    Args:
        model: with the graphs that e3nn made at ``jit_script_fx=False``, which is what adapters load with.
    """
    graphs = [m for m in model.modules() if isinstance(m, GraphModule)]
    for module in graphs:
        _drop_unused(module)
        _split_slices(module)
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target is torch.cat and len(node.args[0]) > 1:
                node.target = cat
        module.graph.lint()
        module.recompile()
    return len(graphs)


def _drop_unused(module: GraphModule) -> None:
    """Outer products that nothing reads; not all dead code, as some of e3nn's writes into slices in place."""
    for node in reversed(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.functional.einsum and not node.users:
            module.graph.erase_node(node)


def _split_slices(module: GraphModule) -> None:
    """Slices ``x[:, a:b]`` that together are all of ``x`` become the parts of one split."""
    slices: dict[Node, dict[tuple[int, int], list[Node]]] = defaultdict(lambda: defaultdict(list))
    for node in module.graph.nodes:
        if (span := _span(node)) is not None:
            slices[node.args[0]][span].append(node)
    for source, spans in slices.items():
        edges = sorted(spans)
        tiles = edges[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(edges))
        if len(edges) < 2 or not tiles or edges[-1][1] != _width(source):
            continue
        with module.graph.inserting_after(source):
            parts = module.graph.call_function(torch.split, (source, [b - a for a, b in edges], 1))
        for index, span in enumerate(edges):
            for node in spans[span]:
                with module.graph.inserting_before(node):
                    part = module.graph.call_function(operator.getitem, (parts, index))
                node.replace_all_uses_with(part)
                module.graph.erase_node(node)


def _span(node: Node) -> tuple[int, int] | None:
    """(a, b) of a node that is ``x[:, a:b]``, or ``x.narrow(-1, a, b - a)`` of a matrix."""
    match node.op, node.target, node.args:
        case "call_function", operator.getitem, (Node(), (slice() as rows, slice() as columns)):
            a, b = columns.start, columns.stop
            plain = rows == WHOLE and columns.step is None and isinstance(a, int) and isinstance(b, int)
            return (a, b) if plain else None
        case "call_method", "narrow", (Node(), -1, int() as a, int() as n):
            return a, a + n
    return None


def _width(source: Node) -> int | None:
    """Columns of ``x.reshape(-1, width)``, the form in which e3nn cuts; ``None`` for any other node."""
    match source.op, source.target, source.args:
        case "call_method", "reshape", (Node(), -1, int() as width):
            return width
    return None
