"""Machine code for the convolution of :mod:`~blip_ft.adapters.shared.convolution`, on a CPU.

The message pass of one path (l1, l2, l3) is linear in each of four things,

    Q(w, x, M, g) = sum over edges, i, k, u of w[e, u] x[from e, i, u] M[e, i, k] g[to e, k, u],

and all that is ever wanted of it are derivatives of Q, or of Q(w', x, M, g) + Q(w, x', M, g) + Q(w, x, M', g), with
respect to some of its four arguments. :func:`address` writes the loop for one such wish in LLVM's language and has it
compiled, some tens of milliseconds each; llvmlite, which numba too is built on, does both. Nothing is kept on disk.
A convolution has ten to twenty paths, each a call of such a loop: :func:`run` makes all of them from one table.

Every edge is a pair of neighbours and is used in both directions, in the second M has the sign of Y_l2(-r) /
Y_l2(r); or it has a direction (``Wish.both``). Channels u are the innermost loop and lie side by side in memory, so
that they fill vector registers.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
from llvmlite import ir

I64, I32 = ir.IntType(64), ir.IntType(32)
#: sums may be taken in any order and products fused into them, as a compiler may for BLAS
FAST = ("reassoc", "nsz", "arcp", "contract")
#: the arrays of a kernel in this order; those that a wish does not need are null. ``d...`` are added to.
ARRAYS = ("w", "x", "M", "g", "tw", "tx", "tM", "dw", "dx", "dM", "dg")
#: 8-byte words in a row of a table of calls
WORDS = 1 + len(ARRAYS) + 2 + 9 + 1
Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Wish:
    """What to compute, and for which sizes.

    Attributes:
        i: 2 l1 + 1.
        k: 2 l3 + 1.
        tangents: of w, x, M those that have a second value, w', x', M'; none: derivatives of Q itself.
        wanted: of w, x, M, g those to differentiate by.
        double: float64, else float32.
        lanes: channels in one vector register; their number is a multiple of it.
        both: every edge is a pair of neighbours, used in both directions; else it has one.
    """

    i: int
    k: int
    tangents: str
    wanted: str
    double: bool
    lanes: int
    both: bool = True


class _Writer:
    """The body of the loop over channels, from arithmetic on vectors."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.scalar = ir.DoubleType() if wish.double else ir.FloatType()
        self.vector = ir.VectorType(self.scalar, wish.lanes) if wish.lanes > 1 else self.scalar
        self.module = ir.Module(name="blip_ft")
        self.module.triple = llvm.get_process_triple()

    # ---- pieces --------------------------------------------------------------------------
    def sum(self, terms: list[tuple[Any, Any]]) -> Any:
        """Sum of products; ``None`` of no terms."""
        total = None
        for a, b in terms:
            product = self.b.fmul(a, b, flags=FAST)
            total = product if total is None else self.b.fadd(total, product, flags=FAST)
        return total

    def at(self, pointer: Any, offset: Any) -> Any:
        return self.b.gep(pointer, [offset], source_etype=self.scalar)

    def load(self, pointer: Any, offset: Any) -> Any:
        """A vector of channels."""
        value = self.b.load(self.at(pointer, offset), typ=self.vector)
        value.align = 8 if self.wish.double else 4
        return value

    def add_to(self, pointer: Any, offset: Any, terms: list[tuple[Any, Any]]) -> None:
        """Add a sum of products to a vector of channels in memory."""
        if not terms:
            return
        place = self.at(pointer, offset)
        old = self.b.load(place, typ=self.vector)
        old.align = 8 if self.wish.double else 4
        self.b.store(self.b.fadd(old, self.sum(terms), flags=FAST), place, align=8 if self.wish.double else 4)

    def splat(self, value: Any) -> Any:
        if self.wish.lanes == 1:
            return value
        one = self.b.insert_element(ir.Constant(self.vector, ir.Undefined), value, I32(0))
        mask = ir.Constant(ir.VectorType(I32, self.wish.lanes), [0] * self.wish.lanes)
        return self.b.shuffle_vector(one, ir.Constant(self.vector, ir.Undefined), mask)

    def total(self, value: Any) -> Any:
        """Sum over the channels of a vector."""
        if self.wish.lanes == 1:
            return value
        name = f"llvm.vector.reduce.fadd.v{self.wish.lanes}{'f64' if self.wish.double else 'f32'}"
        reduce = self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(self.scalar, [self.scalar, self.vector]), name
        )
        return self.b.call(reduce, [ir.Constant(self.scalar, -0.0), value], fastmath=FAST)

    def loop(
        self,
        start: Any,
        stop: Any,
        step: int,
        body: Callable[[Any, list[Any]], list[Any]],
        carried: list[Any],
    ) -> list[Any]:
        """``for n in range(start, stop, step): carried = body(n, carried)``; what ``carried`` is in the end."""
        before = self.b.block
        head, inside, after = (self.b.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        n = self.b.phi(I64)
        n.add_incoming(start, before)
        phis = []
        for value in carried:
            phi = self.b.phi(value.type)
            phi.add_incoming(value, before)
            phis.append(phi)
        self.b.cbranch(self.b.icmp_signed("<", n, stop), inside, after)
        self.b.position_at_end(inside)
        after_turn = body(n, list(phis))
        n.add_incoming(self.b.add(n, I64(step)), self.b.block)
        for phi, value in zip(phis, after_turn, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return phis

    # ---- the kernel ----------------------------------------------------------------------
    def write(self) -> ir.Module:
        """Arguments: the arrays, src, dst, first and last edge, U, four row lengths, U of l1, U of l3, sign."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), _arguments()), "run")
        arrays = dict(zip(ARRAYS, function.args, strict=False))
        for argument in function.args[: len(ARRAYS)]:
            argument.add_attribute("noalias")
        src, dst, begin, end, n_u, *strides, width_1, width_3, sign = function.args[len(ARRAYS) :]
        self.b = ir.IRBuilder(function.append_basic_block())
        if not self.wish.double:
            sign = self.b.fptrunc(sign, self.scalar)
        row_w, row_x, row_m, row_g = strides
        rows = {"w": row_w, "x": row_x, "M": row_m, "g": row_g}
        one = ir.Constant(self.scalar, 1.0)

        def turn(n: Any, none: list[Any]) -> list[Any]:
            edge, second = self.b.lshr(n, I64(1)), self.b.trunc(n, ir.IntType(1))
            ends = [self.b.load(self.b.gep(p, [edge], source_etype=I64), typ=I64) for p in (src, dst)]
            place = {
                "w": edge,
                "M": edge,
                "x": self.b.select(second, ends[1], ends[0]),
                "g": self.b.select(second, ends[0], ends[1]),
            }
            flip = self.b.select(second, sign, one)
            row = {
                name: self.at(array, self.b.mul(place[name[-1]], rows[name[-1]]))
                for name, array in arrays.items()
            }
            self._edge(row, flip, n_u, width_1, width_3)
            return none

        self.loop(self.b.shl(begin, I64(1)), self.b.shl(end, I64(1)), 1 if self.wish.both else 2, turn, [])
        self.b.ret_void()
        return self.module

    def _edge(self, row: dict[str, Any], flip: Any, n_u: Any, width_1: Any, width_3: Any) -> None:
        """One direction of one edge, all channels."""
        wish, b = self.wish, self.b
        pairs = [(i, k) for i in range(wish.i) for k in range(wish.k)]

        def matrix(pointer: Any) -> dict[tuple[int, int], Any]:
            values = {}
            for i, k in pairs:
                value = b.load(self.at(pointer, I64(i * wish.k + k)), typ=self.scalar)
                values[i, k] = self.splat(b.fmul(value, flip, flags=FAST))
            return values

        of_w, of_x, of_m = (name in wish.tangents for name in "wxM")
        tangent = bool(wish.tangents)
        plain_m = not tangent or of_w or of_x  # some term has M itself
        by_w_or_x = set(wish.wanted) & set("wx")
        m = matrix(row["M"]) if plain_m and set(wish.wanted) & set("wxg") else {}
        tm = matrix(row["tM"]) if of_m and set(wish.wanted) & set("wxg") else {}
        offset_x = [b.mul(width_1, I64(i)) for i in range(wish.i)]
        offset_g = [b.mul(width_3, I64(k)) for k in range(wish.k)]

        def channels(u: Any, sums: list[Any]) -> list[Any]:
            at_x, at_g = [b.add(o, u) for o in offset_x], [b.add(o, u) for o in offset_g]
            each_i, each_k = range(wish.i), range(wish.k)
            w, x = self.load(row["w"], u), [self.load(row["x"], o) for o in at_x]
            tw = self.load(row["tw"], u) if of_w else None
            tx = [self.load(row["tx"], o) for o in at_x] if of_x else []
            g = [self.load(row["g"], o) for o in at_g] if set(wish.wanted) & set("wxM") else []
            # c = M g and d = M' g: what x meets on the other side
            c = [self.sum([(m[i, k], g[k]) for k in each_k]) for i in each_i] if m and by_w_or_x else []
            d = [self.sum([(tm[i, k], g[k]) for k in each_k]) for i in each_i] if tm and by_w_or_x else []
            # terms of Q by what stands on either side: w x, w' x or w x', and M or M'
            if "w" in wish.wanted:
                terms = [] if tangent else [(x[i], c[i]) for i in each_i]
                terms += [(tx[i], c[i]) for i in each_i] if of_x else []
                terms += [(x[i], d[i]) for i in each_i] if of_m else []
                self.add_to(row["dw"], u, terms)
            if "x" in wish.wanted:
                for i in each_i:
                    terms = [] if tangent else [(w, c[i])]
                    terms += [(tw, c[i])] if of_w else []
                    terms += [(w, d[i])] if of_m else []
                    self.add_to(row["dx"], at_x[i], terms)
            if not set(wish.wanted) & set("Mg"):
                return sums
            wx = [self.sum([(w, x[i])]) for i in each_i] if of_m or not tangent else []
            moved = [  # w' x + w x'
                self.sum(([(tw, x[i])] if of_w else []) + ([(w, tx[i])] if of_x else [])) for i in each_i
            ]
            left = moved if tangent else wx
            if "g" in wish.wanted:
                for k in each_k:
                    terms = [(left[i], m[i, k]) for i in each_i] if m else []
                    terms += [(wx[i], tm[i, k]) for i in each_i] if of_m else []
                    self.add_to(row["dg"], at_g[k], terms)
            return [  # none where M is not wanted
                b.fadd(total, b.fmul(left[i], g[k], flags=FAST), flags=FAST)
                for total, (i, k) in zip(sums, pairs, strict=False)
            ]

        by_m = "M" in wish.wanted and (not tangent or of_w or of_x)
        zero = ir.Constant(self.vector, [0.0] * wish.lanes if wish.lanes > 1 else 0.0)
        totals = self.loop(I64(0), n_u, wish.lanes, channels, [zero] * len(pairs) if by_m else [])
        for total, (i, k) in zip(totals, pairs, strict=False):
            place = self.at(row["dM"], I64(i * wish.k + k))
            value = b.fmul(self.total(total), flip, flags=FAST)
            b.store(b.fadd(b.load(place, typ=self.scalar), value, flags=FAST), place)


def _arguments() -> list[Any]:
    """Types of a kernel's arguments, which a row of a table holds behind the kernel's address, 8 bytes each."""
    return [ir.PointerType()] * (len(ARRAYS) + 2) + [I64] * 9 + [ir.DoubleType()]


def _driver() -> ir.Module:
    """A function that makes the calls of a table: (first row, number of rows)."""
    module, types = ir.Module(name="blip_ft"), _arguments()
    module.triple = llvm.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.PointerType(), I64]), "run")
    start, inside, end = (function.append_basic_block() for _ in range(3))
    b = ir.IRBuilder(start)
    b.cbranch(b.icmp_signed("<", I64(0), function.args[1]), inside, end)
    b.position_at_end(inside)
    n = b.phi(I64)
    n.add_incoming(I64(0), start)
    row = b.gep(function.args[0], [b.mul(n, I64(WORDS))], source_etype=I64)
    words = [b.load(b.gep(row, [I64(k)], source_etype=I64), typ=t) for k, t in enumerate([I64, *types])]
    kernel = b.inttoptr(words[0], ir.FunctionType(ir.VoidType(), types).as_pointer())
    b.call(kernel, words[1:])
    following = b.add(n, I64(1))
    n.add_incoming(following, inside)
    b.cbranch(b.icmp_signed("<", following, function.args[1]), inside, end)
    b.position_at_end(end)
    b.ret_void()
    return module


class _Compiler:
    """One compiler of the process, for this machine's processor."""

    def __init__(self) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features()
        self.bits = 512 if features.get("avx512f") else 256
        self.engines: list[Any] = []  # own the machine code
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(self.compile(_driver()))

    def compile(self, module: ir.Module) -> int:
        """Address of the function ``run`` of a module."""
        # a machine for every module, as an engine takes its own
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        engine = llvm.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        self.engines.append(engine)
        return int(engine.get_function_address("run"))


_LOCK = threading.RLock()
_KERNELS: dict[Wish, int] = {}
_COMPILERS: list[_Compiler] = []


def _compiler() -> _Compiler:
    """Made by one thread alone: the machine code of a second compiler would go with it."""
    if _COMPILERS:
        return _COMPILERS[0]
    with _LOCK:
        if not _COMPILERS:
            _COMPILERS.append(_Compiler())
        return _COMPILERS[0]


def address(wish: Wish) -> int:
    """Where the compiled loop is."""
    if wish not in _KERNELS:
        with _LOCK:
            if wish not in _KERNELS:
                _KERNELS[wish] = _compiler().compile(_Writer(wish).write())
    return _KERNELS[wish]


def run(table: Table) -> None:
    """Make the calls of a table, one after the other, without Python's lock: several threads can be in it.

    Args:
        table: a row for every call: the kernel's :func:`address`, pointers to the arrays, src and dst, first and last
            edge, number of channels, lengths of rows of w, x, M and g, channels of l1 and of l3, and the bits of a
            float64, the sign of the second direction.
    """
    _compiler().run(table.ctypes.data, len(table))


def lanes(channels: int, *, double: bool) -> int:
    """Widest vector that divides a number of channels."""
    widest = _compiler().bits // (64 if double else 32)
    return next(n for n in (16, 8, 4, 2, 1) if n <= widest and channels % n == 0)
