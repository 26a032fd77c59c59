"""The convolution of e3nn models on pairs of neighbours: their ``uvu`` tensor product and the sum over
neighbours in one.

e3nn's tensor product makes arrays of (edges, channels, 2 l1 + 1, 2 l2 + 1), and autograd makes them again for every
derivative; nothing of that size exists here. The coupling coefficients meet the spherical harmonics first, once for all
layers (:meth:`Convolution.couplings`), and what is left is linear in each of its arguments (``kernels``): the
value, its first and its second derivative are all that forces and their training need. On a CPU they run as machine
code, on other devices as batched products of torch.

Features are held as (component, channel) within each irrep, *inner* order, where e3nn has (channel, component). All
channels of one irrep of the output are side by side, as e3nn's ``Irreps.simplify`` would have them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip_ft.backbones.conservative import geometry_is_wanted
from blip_ft.system.side_by_side import side_by_side, width

try:
    from blip_ft.adapters.shared import kernels
except ImportError:  # a platform without llvmlite
    kernels = None  # type: ignore[assignment]


#: column of the first pair in a table of calls
_BEGIN = 1 + 13


@dataclass(frozen=True)
class Path:
    """One coupling of an irrep of the input with one of the edges; offsets count numbers in a row.

    Attributes:
        u: channels.
        i, k: components of the input's irrep and of the output's.
        w, x, m, y: offsets in the weights, the input, the couplings and the output.
        block: where the output's irrep starts, with the channels of all paths to it.
        width_x, width_y: channels of all of the input's and of the output's irrep.
        odd: whether the spherical harmonics change sign with the direction of the edge.
    """

    u: int
    i: int
    k: int
    w: int
    x: int
    m: int
    y: int
    block: int
    width_x: int
    width_y: int
    odd: bool


def inner_order(irreps: Any) -> Tensor:
    """Where e3nn has what stands in each column of inner order: ``x[:, order]`` is ``x`` in inner order."""
    parts = [
        torch.arange(s.start, s.stop).reshape(mul, ir.dim).T.reshape(-1)
        for s, (mul, ir) in zip(irreps.slices(), irreps, strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def outer_order(irreps: Any) -> Tensor:
    """The inverse of :func:`inner_order`."""
    return torch.argsort(inner_order(irreps))


class Convolution:
    """What an e3nn ``TensorProduct`` of node features with spherical harmonics does, in numbers; it holds no weights.

    Args:
        product: all of its paths are ``uvu`` with weights from outside, and the second input has one channel
            of each irrep.

    Raises:
        ValueError: it is of another kind.
    """

    def __init__(self, product: Any) -> None:
        into, harmonics, outof = product.irreps_in1, product.irreps_in2, product.irreps_out
        start, before = _merged(outof)
        paths, blocks, w, m = [], [], 0, 0
        of_entry: dict[int, Path] = {}
        for ins in product.instructions:
            (mul, ir_x), (one, ir_y) = into[ins.i_in1], harmonics[ins.i_in2]
            mul_out, ir_out = outof[ins.i_out]
            if ins.connection_mode != "uvu" or one != 1 or not ins.has_weight or mul != mul_out:
                raise ValueError(
                    f"a path of kind '{ins.connection_mode}' is no convolution with edge weights"
                )
            paths.append(
                Path(
                    u=mul,
                    i=ir_x.dim,
                    k=ir_out.dim,
                    w=w,
                    x=into.slices()[ins.i_in1].start,
                    m=m,
                    y=start[str(ir_out)] + before[ins.i_out],
                    block=start[str(ir_out)],
                    width_x=mul,
                    width_y=sum(n for n, ir in outof if ir == ir_out),
                    odd=ir_y.l % 2 == 1,
                )
            )
            block = torch.zeros(harmonics.dim, ir_x.dim * ir_out.dim, dtype=torch.float64)
            coupling = _coefficients(product, ir_x.l, ir_y.l, ir_out.l) * float(ins.path_weight)
            block[harmonics.slices()[ins.i_in2]] = coupling.permute(1, 0, 2).flatten(1)
            blocks.append(block)
            of_entry[ins.i_out] = paths[-1]
            w, m = w + mul, m + ir_x.dim * ir_out.dim
        self.paths, self.dim_in, self.dim_out, self.n_weights = tuple(paths), into.dim, outof.dim, w
        self.coefficients = torch.cat(blocks, dim=1)
        #: convolutions of one key share their couplings
        self.key = (harmonics.dim, *((p.i, p.k, p.m, p.odd) for p in self.paths))
        #: where the numbers of e3nn's output stand in ours; numbers without a path are the column behind the last
        self.order_out = torch.cat(
            [_columns(of_entry.get(n), mul, ir.dim, self.dim_out) for n, (mul, ir) in enumerate(outof)]
        )
        # paths from one irrep add to the same gradient; those from different ones can be done at the same time
        places = sorted({p.x for p in self.paths})
        self.groups = [[n for n, p in enumerate(self.paths) if p.x == x] for x in places]
        self._tables: dict[tuple[str, str, torch.dtype, bool], Any] = {}

    def couplings(self, harmonics: Tensor) -> Tensor:
        """(pairs, m) the spherical harmonics of every pair in the coupling coefficients of all paths."""
        return harmonics @ self.coefficients.to(harmonics)

    def __call__(self, weight: Tensor, x: Tensor, couplings: Tensor, pairs: Pairs) -> Tensor:
        """Sum over the neighbours of every atom.

        Args:
            weight: (pairs, w) of every path and channel, the same for both directions of a pair.
            x: (atoms, dim_in) features, in inner order.
            couplings: of :meth:`couplings`.
            pairs: which atoms.

        Returns:
            (atoms, dim_out) in inner order, differentiable twice.
        """
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and kernels is not None:
            out: Tensor = _Value.apply(self, pairs, weight, x, couplings)
            return out
        return self.in_torch(weight, x, couplings, pairs)

    def table(self, tangents: str, wanted: str, dtype: torch.dtype, *, both: bool) -> kernels.Table:
        """Calls of all paths (``kernels.run``), with offsets in bytes in place of pointers, and no pairs.

        Args:
            tangents: see ``kernels.Wish``.
            wanted: likewise.
            dtype: float32 or float64.
            both: see ``kernels.Wish``.
        """
        key = tangents, wanted, dtype, both
        if key not in self._tables:
            double, size = dtype == torch.float64, dtype.itemsize
            strides = self.n_weights, self.dim_in, self.coefficients.shape[1], self.dim_out
            used = {*"wxM", *(f"t{n}" for n in tangents), *(f"d{n}" for n in wanted)} | (
                {"g"} if set(wanted) & set("wxM") else set()
            )
            rows = []
            for p in self.paths:
                lanes = kernels.lanes(p.u, double=double)
                wish = kernels.Wish(p.i, p.k, tangents, wanted, double, lanes, both)
                offset = {"w": p.w, "x": p.x, "M": p.m, "g": p.y}
                places = [size * offset[name[-1]] if name in used else 0 for name in kernels.ARRAYS]
                sign = int(np.float64(-1.0 if p.odd else 1.0).view(np.int64))
                edges, channels = (0, 0, 0, 0), (p.width_x, p.width_y)
                rows.append([kernels.address(wish), *places, *edges, p.u, *strides, *channels, sign])
            self._tables[key] = np.array(rows, dtype=np.int64).reshape(-1, kernels.WORDS)
        out: kernels.Table = self._tables[key]
        return out

    def in_torch(self, weight: Tensor, x: Tensor, couplings: Tensor, pairs: Pairs) -> Tensor:
        """The same by products that torch knows, for any device."""
        ends, both = (pairs.source, pairs.target), pairs.both
        if both:
            ends = torch.cat(ends), torch.cat(ends[::-1])
        inputs = {}
        for p in self.paths:
            if p.x not in inputs:
                part = x[:, p.x : p.x + p.i * p.width_x]
                inputs[p.x] = part.reshape(-1, p.i, p.width_x).index_select(0, ends[0])
        blocks: dict[int, list[Tensor]] = {}
        for p in sorted(self.paths, key=lambda p: p.y):
            m = couplings[:, p.m : p.m + p.i * p.k].reshape(-1, p.i, p.k).transpose(1, 2)
            w = weight[:, None, p.w : p.w + p.u]
            if both:
                m, w = torch.cat((m, -m if p.odd else m)), torch.cat((w, w))
            messages = torch.bmm(m, w * inputs[p.x])
            total = x.new_zeros(len(x), p.k, p.u).index_add(0, ends[1], messages)
            blocks.setdefault(p.block, []).append(total)
        return torch.cat([torch.cat(parts, dim=2).flatten(1) for parts in blocks.values()], dim=1)


def _columns(path: Path | None, mul: int, dim: int, none: int) -> Tensor:
    """(mul * dim,) where the numbers of one entry of the output, in e3nn's order, stand in ours."""
    if path is None:
        return torch.full((mul * dim,), none)
    channel, component = torch.arange(mul)[:, None], torch.arange(dim)[None]
    return (path.y + channel + component * path.width_y).flatten()


def _merged(irreps: Any) -> tuple[dict[str, int], list[int]]:
    """Where each irrep starts if all of its channels are side by side; channels of the same irrep before each entry."""
    totals: dict[str, int] = {}
    sizes: dict[str, int] = {}
    before = []
    for mul, ir in irreps:
        before.append(totals.get(str(ir), 0))
        totals[str(ir)] = totals.get(str(ir), 0) + mul
        sizes[str(ir)] = ir.dim
    start, at = {}, 0
    for name, total in totals.items():
        start[name] = at
        at += total * sizes[name]
    return start, before


def _coefficients(product: Any, first: int, second: int, last: int) -> Tensor:
    """(2 l1 + 1, 2 l2 + 1, 2 l3 + 1) as the product has them: where no l is 0 it keeps a table, rounded as the
    model was when it was built; e3nn's formulas with l = 0 need none.
    """
    name = f"_w3j_{first}_{second}_{last}"
    for key, buffer in product.named_buffers():
        if key.rpartition(".")[2] == name:
            table: Tensor = (
                buffer.detach().double().cpu().reshape(2 * first + 1, 2 * second + 1, 2 * last + 1)
            )
            return table
    if 0 not in (first, second, last):
        raise ValueError(f"the tensor product has no table of coefficients {name}")
    from e3nn.o3 import wigner_3j

    exact: Tensor = wigner_3j(first, second, last, dtype=torch.float64)
    return exact


class EdgeConvolution:
    """Stands in for the ``forward`` of an e3nn ``TensorProduct`` and for the sum over neighbours behind it.

    Arguments and result are in e3nn's order, edges have a direction each: models whose code takes a product and a sum
    in one (``mace``: ``conv_fusion``) need no other change. The modules, their names and buffers stay what they are.

    Args:
        product: see :class:`Convolution`.

    Raises:
        ValueError: it is of another kind, or several paths lead to one entry of its output.
    """

    def __init__(self, product: Any) -> None:
        self.convolution = Convolution(product)
        if len({ins.i_out for ins in product.instructions}) < len(product.instructions):
            raise ValueError("several paths lead to one entry of the output")
        self.order_in = inner_order(product.irreps_in1)

    def __call__(self, x: Tensor, harmonics: Tensor, weight: Tensor, edge_index: Tensor) -> Tensor:
        """(atoms, dim_in), (edges, dim_2), (edges, w), (2, edges) from and to -> (atoms, dim_out)."""
        convolution, (source, target) = self.convolution, edge_index
        pairs = Pairs(source.contiguous(), target.contiguous(), (len(source),), both=False)
        couplings = convolution.couplings(harmonics)
        y = convolution(weight, x[:, self.order_in.to(x.device)], couplings, pairs)
        order = convolution.order_out.to(x.device)
        if len(order) and int(order.max()) >= convolution.dim_out:
            y = torch.cat((y, y.new_zeros(len(y), 1)), dim=1)
        return y[:, order]


@dataclass(frozen=True)
class Pairs:
    """Pairs of neighbours, each once, structure after structure.

    Attributes:
        source: (pairs,) int64, the sender in a pair's own direction.
        target: (pairs,) int64, the receiver.
        parts: ends of pieces of the pairs that have no atom in common.
        both: whether each is used in both directions; else every edge is one of ``source`` to ``target``.
    """

    source: Tensor
    target: Tensor
    parts: tuple[int, ...]
    both: bool = True

    @classmethod
    def of(cls, source: Tensor, target: Tensor, counts: Sequence[int]) -> Pairs:
        """Structures are put together into about as many pieces as there are threads.

        Args:
            source: (pairs,).
            target: (pairs,).
            counts: pairs of every structure.
        """
        pieces = width(source.device)
        total, after = sum(counts), list(itertools.accumulate(counts))
        ends = {total} | {
            min(after, key=lambda n, k=k: abs(n - k * total / pieces))  # type: ignore[misc]
            for k in range(1, pieces if after else 1)
        }
        return cls(source.contiguous(), target.contiguous(), tuple(sorted(ends)))


class _Value(torch.autograd.Function):
    """dQ/dg: the convolution."""

    @staticmethod
    def forward(ctx: Any, conv: Convolution, pairs: Pairs, w: Tensor, x: Tensor, m: Tensor) -> Tensor:
        w, x, m = w.contiguous(), x.contiguous(), m.contiguous()
        y = x.new_zeros(len(x), conv.dim_out)
        _run(conv, pairs, "", {"w": w, "x": x, "M": m, "dg": y})
        ctx.save_for_backward(w, x, m)
        ctx.conv, ctx.pairs = conv, pairs
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        # a first derivative whose graph is kept has the geometry in it, one that is not may do without
        skip = not torch.is_grad_enabled() and not geometry_is_wanted()
        needs = ctx.needs_input_grad
        wanted = "".join(
            n for n, need in zip("wxM", needs[2:], strict=True) if need and (n != "M" or not skip)
        )
        return (None, None, *_First.apply(ctx.conv, ctx.pairs, wanted, *ctx.saved_tensors, g.contiguous()))


class _First(torch.autograd.Function):
    """dQ/dw, dQ/dx, dQ/dM."""

    @staticmethod
    def forward(
        ctx: Any, conv: Convolution, pairs: Pairs, wanted: str, w: Tensor, x: Tensor, m: Tensor, g: Tensor
    ) -> Any:
        inputs = dict(zip("wxM", (w, x, m), strict=True))
        out = {name: torch.zeros_like(inputs[name]) for name in wanted}
        _run(conv, pairs, "", {**inputs, "g": g} | {f"d{n}": t for n, t in out.items()})
        ctx.save_for_backward(w, x, m, g)
        ctx.conv, ctx.pairs = conv, pairs
        ctx.set_materialize_grads(False)
        return tuple(out.get(name) for name in "wxM")

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        w, x, m, g = ctx.saved_tensors
        given = {n: t.contiguous() for n, t in zip("wxM", tangents, strict=True) if t is not None}
        needs = dict(zip("wxMg", ctx.needs_input_grad[3:], strict=True))
        inputs = {"w": w, "x": x, "M": m, "g": g}
        # the derivative by the only argument that has a tangent is zero
        wanted = [n for n in "wxMg" if needs[n] and (n != "M" or geometry_is_wanted()) and set(given) - {n}]
        out = {name: torch.zeros_like(inputs[name]) for name in wanted}
        if given:
            arrays = inputs | {f"t{n}": t for n, t in given.items()} | {f"d{n}": t for n, t in out.items()}
            _run(ctx.conv, ctx.pairs, "".join(given), arrays)
        return (None, None, None, *(out.get(name) for name in "wxMg"))


def _run(conv: Convolution, pairs: Pairs, tangents: str, arrays: dict[str, Tensor]) -> None:
    """All paths of a convolution, in several threads where there are several pieces of work."""
    wanted = "".join(n for n in "wxMg" if f"d{n}" in arrays)
    table = conv.table(tangents, wanted, arrays["x"].dtype, both=pairs.both).copy()
    first = [arrays[name].data_ptr() if name in arrays else 0 for name in kernels.ARRAYS]
    table[:, 1:_BEGIN] += [*first, pairs.source.data_ptr(), pairs.target.data_ptr()]
    total = len(pairs.source)
    pieces = list(zip((0, *pairs.parts), pairs.parts, strict=False))
    if total < 64 or width("cpu") == 1:
        tasks = [_part(table, 0, total)]
    elif len(pieces) > 1:
        tasks = [_part(table, *piece) for piece in pieces]
    else:
        tasks = [_part(table[rows], 0, total) for rows in conv.groups]
    side_by_side(kernels.run, tasks)


def _part(table: kernels.Table, first: int, last: int) -> kernels.Table:
    """The calls for some of the pairs."""
    out = table.copy()
    out[:, _BEGIN], out[:, _BEGIN + 1] = first, last
    return out
