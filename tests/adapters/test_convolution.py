"""The convolution's kernels against e3nn's own tensor product: values, first and second derivatives."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blip_ft.adapters.shared import kernels
from blip_ft.adapters.shared.activations import silu, smooth
from blip_ft.adapters.shared.convolution import Convolution, EdgeConvolution, Pairs, inner_order, outer_order
from blip_ft.backbones.conservative import weights_only
from blip_ft.backbones.edges import one_direction

#: (features, largest l of the harmonics, largest l of the output, parity of the harmonics): SevenNet-0's three kinds of
#: layer and those of SevenNet-l3i5, MACE's, odd and repeated irreps; with other numbers of channels
LAYERS = {
    "first": ("16x0e", 2, 2, 1),
    "middle": ("16x0e+8x1e+4x2e", 2, 2, 1),
    "last": ("16x0e+8x1e+4x2e", 2, 0, 1),
    "l = 3": ("8x0e+4x1e+2x2e+2x3e", 3, 3, 1),
    "parity": ("6x0e+6x1o+6x1e", 3, 2, -1),
    "mace": ("16x0e+16x1o", 3, 3, -1),
    "channels that fill no vector": ("5x0e+3x1e", 1, 1, 1),
}
N_ATOMS = 6


def tensor_product(irreps: str, lmax: int, largest: int, parity: int):
    """As SevenNet and MACE build it."""
    from e3nn.o3 import Irreps, TensorProduct

    features, harmonics = Irreps(irreps), Irreps.spherical_harmonics(lmax, parity)
    middle, paths = [], []
    for (i, (mul, ir)), (j, (_, ir_y)) in itertools.product(enumerate(features), enumerate(harmonics)):
        for out in ir * ir_y:
            if out.l <= largest:
                paths.append((i, j, len(middle), "uvu", True))
                middle.append((mul, out))
    ordered, place, _ = Irreps(middle).sort()
    paths = sorted(((i, j, place[k], mode, w) for i, j, k, mode, w in paths), key=lambda path: path[2])
    options = {"shared_weights": False, "internal_weights": False}
    return TensorProduct(features, harmonics, ordered, paths, **options)


class Problem:
    """One layer on one graph, by e3nn on both directions of every edge and by the kernels."""

    def __init__(self, layer: str, n_pairs: int, dtype: torch.dtype) -> None:
        from e3nn.o3 import SphericalHarmonics

        self.product = tensor_product(*LAYERS[layer]).to(dtype)
        self.convolution = Convolution(self.product)
        generator = torch.Generator().manual_seed(n_pairs)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

        self.source, self.target = torch.randint(N_ATOMS, (2, n_pairs), generator=generator)
        self.inputs = (
            random(n_pairs, self.convolution.n_weights),
            random(N_ATOMS, self.product.irreps_in1.dim),
            random(n_pairs, 3),
        )
        self.harmonics = SphericalHarmonics(self.product.irreps_in2, True, "component")

    def by_e3nn(self, w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
        source, target = torch.cat((self.source, self.target)), torch.cat((self.target, self.source))
        y = torch.cat((self.harmonics(vectors), self.harmonics(-vectors)))
        messages = self.product(x[source], y, torch.cat((w, w)))
        out = x.new_zeros(len(x), messages.shape[1]).index_add(0, target, messages)
        return out[:, inner_order(self.product.irreps_out.simplify())]

    def by_kernels(self, w: Tensor, x: Tensor, vectors: Tensor, *, in_torch: bool = False) -> Tensor:
        pairs = Pairs.of(self.source, self.target, [len(w)])
        couplings = self.convolution.couplings(self.harmonics(vectors))
        call = self.convolution.in_torch if in_torch else self.convolution
        return call(w, x[:, inner_order(self.product.irreps_in1)], couplings, pairs)

    def derivatives(self, function) -> list[Tensor]:
        """Value, its gradients, and gradients of a mixture of these."""
        value = function(*self.inputs)
        generator = torch.Generator().manual_seed(0)

        def weighed(tensor: Tensor) -> Tensor:
            factors = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
            return (tensor * factors.to(tensor)).sum()

        first = torch.autograd.grad(
            weighed(value) + 0.1 * value.square().sum(), self.inputs, create_graph=True
        )
        second = torch.autograd.grad(sum(weighed(t) for t in first), self.inputs)
        return [t.detach() for t in (value, *first, *second)]


def check_alike(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=tolerance)


class KernelContract:
    """Runs in both families, as their versions of e3nn differ."""

    @pytest.mark.parametrize("threads", [1, 2])
    @pytest.mark.parametrize("n_pairs", [0, 1, 100])
    @pytest.mark.parametrize("layer", LAYERS)
    def test_value_and_derivatives_in_float64(self, layer, n_pairs, threads):
        problem, before = Problem(layer, n_pairs, torch.float64), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            ours = problem.derivatives(problem.by_kernels)
        finally:
            torch.set_num_threads(before)
        check_alike(ours, problem.derivatives(problem.by_e3nn), 1e-12)

    @pytest.mark.parametrize("layer", LAYERS)
    def test_float32_to_rounding(self, layer):
        problem = Problem(layer, 40, torch.float32)
        check_alike(problem.derivatives(problem.by_kernels), problem.derivatives(problem.by_e3nn), 2e-5)

    @pytest.mark.parametrize("layer", LAYERS)
    def test_products_of_torch_do_the_same(self, layer):
        problem = Problem(layer, 40, torch.float64)
        ours = problem.derivatives(lambda *inputs: problem.by_kernels(*inputs, in_torch=True))
        check_alike(ours, problem.derivatives(problem.by_e3nn), 1e-12)

    @pytest.mark.parametrize("in_torch", [False, True])
    @pytest.mark.parametrize("n_edges", [0, 1, 50])
    @pytest.mark.parametrize("layer", LAYERS)
    def test_edges_with_a_direction_in_the_order_of_e3nn(self, layer, n_edges, in_torch, monkeypatch):
        problem = Problem(layer, n_edges, torch.float64)
        edge_index = torch.stack((problem.source, problem.target))
        fused = EdgeConvolution(problem.product)
        if in_torch:
            monkeypatch.setattr("blip_ft.adapters.shared.convolution.kernels", None)

        def ours(w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
            return fused(x, problem.harmonics(vectors), w, edge_index)

        def theirs(w: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
            messages = problem.product(x[problem.source], problem.harmonics(vectors), w)
            return x.new_zeros(len(x), messages.shape[1]).index_add(0, problem.target, messages)

        check_alike(problem.derivatives(ours), problem.derivatives(theirs), 1e-12)

    def test_entries_of_the_output_without_a_path_are_zero(self):
        from e3nn.o3 import Irreps, TensorProduct

        options = {"shared_weights": False, "internal_weights": False}
        irreps = Irreps("4x0e+2x1o"), Irreps("0e+1o"), Irreps("4x0e+3x2e+4x1o")
        product = TensorProduct(*irreps, [(0, 0, 0, "uvu", True), (0, 1, 2, "uvu", True)], **options).double()
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(5, n, dtype=torch.float64, generator=generator) for n in (10, 4))
        w = torch.randn(5, product.weight_numel, dtype=torch.float64, generator=generator)
        edge_index = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 0, 4, 3]])
        expected = torch.zeros(5, 31, dtype=torch.float64)
        expected.index_add_(0, edge_index[1], product(x[edge_index[0]], y, w))
        ours = EdgeConvolution(product)(x, y, w, edge_index)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        assert not ours[:, 4:19].any()

    def test_several_paths_to_one_entry_are_refused(self):
        from e3nn.o3 import Irreps, TensorProduct

        options = {"shared_weights": False, "internal_weights": False}
        irreps = Irreps("4x0e+4x0e"), Irreps("0e"), Irreps("4x0e")
        product = TensorProduct(*irreps, [(0, 0, 0, "uvu", True), (1, 0, 0, "uvu", True)], **options)
        with pytest.raises(ValueError, match="several paths"):
            EdgeConvolution(product)

    def test_order_of_the_edges_does_not_matter(self):
        problem = Problem("middle", 30, torch.float64)
        w, x, vectors = problem.inputs
        before = problem.by_kernels(w, x, vectors)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
        problem.source, problem.target = problem.source[order], problem.target[order]
        torch.testing.assert_close(
            problem.by_kernels(w[order], x, vectors[order]), before, rtol=0, atol=1e-12
        )

    def test_pieces_are_structures(self):
        one, two = Problem("middle", 40, torch.float64), Problem("middle", 60, torch.float64)
        apart = [p.by_kernels(*p.inputs) for p in (one, two)]
        w, x, vectors = (torch.cat(parts) for parts in zip(one.inputs, two.inputs, strict=True))
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            source = torch.cat((one.source, two.source + N_ATOMS))
            target = torch.cat((one.target, two.target + N_ATOMS))
            pairs = Pairs.of(source, target, [40, 60])
            assert len(pairs.parts) == 2
            inner = x[:, inner_order(one.product.irreps_in1)]
            couplings = one.convolution.couplings(one.harmonics(vectors))
            together = one.convolution(w, inner, couplings, pairs)
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-12)

    def test_weights_only_leaves_gradients_of_weights_as_they_are(self):
        problem = Problem("middle", 20, torch.float64)

        def gradients() -> list[Tensor | None]:
            out = problem.by_kernels(*problem.inputs)
            (force,) = torch.autograd.grad(out.square().sum(), problem.inputs[2], create_graph=True)
            loss = force.square().sum() + out.sum()
            return list(torch.autograd.grad(loss, problem.inputs[:2]))

        before = gradients()
        out = problem.by_kernels(*problem.inputs)
        (force,) = torch.autograd.grad(out.square().sum(), problem.inputs[2], create_graph=True)
        with weights_only():
            after = torch.autograd.grad(force.square().sum() + out.sum(), problem.inputs[:2])
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    def test_another_kind_of_product_is_refused(self):
        from e3nn.o3 import FullyConnectedTensorProduct

        with pytest.raises(ValueError, match="uvw"):
            Convolution(FullyConnectedTensorProduct("2x0e", "1x0e", "2x0e"))

    def test_inner_order_and_back(self):
        from e3nn.o3 import Irreps

        irreps = Irreps("2x0e+3x1o+1x2e")
        order = inner_order(irreps)
        assert order[2:11].tolist() == [2, 5, 8, 3, 6, 9, 4, 7, 10]  # x of all channels, then y, then z
        assert order[outer_order(irreps)].tolist() == list(range(irreps.dim))

    def test_silu_has_the_derivatives_of_torchs(self):
        x = torch.linspace(-8, 8, 41, dtype=torch.float64).requires_grad_()

        def orders(function) -> list[Tensor]:
            out = [function(x)]
            for _ in range(3):
                (slope,) = torch.autograd.grad(out[-1].sum(), x, create_graph=True)
                out.append(slope)
            return out

        for ours, theirs in zip(orders(silu), orders(nn.functional.silu), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)

    def test_only_silu_is_replaced(self):
        from e3nn.math import normalize2mom

        net = nn.Sequential(normalize2mom(nn.functional.silu), normalize2mom(torch.tanh))
        x = torch.randn(5, dtype=torch.float64)
        before = net(x)
        assert smooth(net) == 1
        assert torch.equal(net(x), before)


@pytest.mark.backend("sevennet")
class TestKernelsInFamilyB(KernelContract):
    pass


@pytest.mark.backend("mace")
class TestKernelsInFamilyA(KernelContract):
    @pytest.fixture(scope="class", autouse=True)
    def e3nn_loads(self):
        torch.serialization.add_safe_globals([slice])  # its tables of constants hold one


@pytest.mark.parametrize("tangents", ["", "w", "x", "M", "wx", "wM", "xM", "wxM"])
@pytest.mark.parametrize("size", [(1, 3), (5, 3)])
def test_every_wish_is_a_derivative_of_the_form(size, tangents):
    """Each kernel against autograd on the form itself, with gaps in the rows and an odd sign."""
    i, k = size
    u, width_1, width_3, n_edges = 8, 11, 9, 7
    rng = np.random.default_rng(0)
    inputs = {
        "w": rng.standard_normal((n_edges, u + 2)),
        "x": rng.standard_normal((N_ATOMS, i * width_1)),
        "M": rng.standard_normal((n_edges, i * k + 1)),
        "g": rng.standard_normal((N_ATOMS, k * width_3)),
    }
    given = {name: rng.standard_normal(inputs[name].shape) for name in tangents}
    source, target = rng.integers(0, N_ATOMS, (2, n_edges))

    def form(w: Tensor, x: Tensor, m: Tensor, g: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        m = m[:, : i * k].reshape(n_edges, i, k)
        for s, t, sign in ((source, target, 1.0), (target, source, -1.0)):
            left = x.reshape(N_ATOMS, i, width_1)[s][:, :, :u]
            right = g.reshape(N_ATOMS, k, width_3)[t][:, :, :u]
            total = total + sign * torch.einsum("eu,eiu,eik,eku->", w[:, :u], left, m, right)
        return total

    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in inputs.items()}
    value = form(*leaves.values()) if not tangents else torch.zeros((), dtype=torch.float64)
    for name in tangents:
        value = value + form(*(leaves | {name: torch.tensor(given[name])}).values())
    expected = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    out = {name: np.zeros_like(array) for name, array in inputs.items()}
    arrays = inputs | {f"t{n}": a for n, a in given.items()} | {f"d{n}": a for n, a in out.items()}
    pointers = [arrays[n].ctypes.data if n in arrays else 0 for n in kernels.ARRAYS]
    strides = [inputs[name].shape[1] for name in "wxMg"]
    for lanes in (1, 4):
        for array in out.values():
            array[:] = 0
        address = kernels.address(kernels.Wish(i, k, tangents, "wxMg", double=True, lanes=lanes))
        ends = (source.ctypes.data, target.ctypes.data, 0, n_edges)
        sign = int(np.float64(-1.0).view(np.int64))
        call = [address, *pointers, *ends, u, *strides, width_1, width_3, sign]
        kernels.run(np.array([call], dtype=np.int64))
        for name, gradient in zip("wxMg", expected, strict=True):
            wanted = np.zeros_like(out[name]) if gradient is None else gradient.numpy()
            np.testing.assert_allclose(out[name], wanted, rtol=0, atol=1e-12)


def test_lanes_divide_the_channels():
    for channels, double in itertools.product((1, 3, 4, 12, 64, 128), (False, True)):
        assert channels % kernels.lanes(channels, double=double) == 0


def test_one_direction_of_every_pair():
    index = torch.tensor([[0, 1, 0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1]])
    shift = torch.tensor(
        [[0, 0, 0], [0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, -1, 2], [0, 1, -2], [0, 0, 1], [0, 0, -1]]
    )
    assert one_direction(index, shift).tolist() == [True, False, True, False, False, True, True, False]


FIRST_IN_TWO_THREADS = """
import threading
from blip_ft.adapters.shared import kernels as K
start = threading.Barrier(2)
def work():
    start.wait()
    made.append(K._compiler())
made = []
threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads], [t.join() for t in threads]
assert made[0] is made[1]
"""


def test_two_threads_share_one_compiler():
    """A second compiler would take the machine code of its kernels with it, and the process."""
    subprocess.run([sys.executable, "-c", FIRST_IN_TWO_THREADS], check=True, timeout=120)
