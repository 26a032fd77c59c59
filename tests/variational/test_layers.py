"""Each layer form against the vendor's own module, one draw at a time."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blip_ft.variational.layers import (
    VariationalIrrepsLinear,
    VariationalLayer,
    VariationalLinear,
    VariationalRadialLayer,
    layer_type,
)
from blip_ft.variational.noise import keyed_signs

needs_e3nn = pytest.mark.backend("sevennet")
#: every kind of layer; irreps with several paths into one output, a bias, an output without a path
LAYERS = [
    "linear",
    pytest.param("irreps", marks=needs_e3nn),
    pytest.param("product", marks=needs_e3nn),
    pytest.param("radial", marks=needs_e3nn),
    pytest.param("radial_last", marks=needs_e3nn),
]
IRREPS_IN, IRREPS_OUT = "3x0e+2x1o+2x0e+2x2e+1x0o", "2x0e+2x1o+1x3o+1x0e+3x2e+1x0o"
COUNTS = [2, 0, 3]


def make_base(kind: str, dtype: torch.dtype = torch.float64, *, small: bool = False) -> nn.Module:
    """A vendor's module with weights of its own."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(2 if small else 4, 2 if small else 3).to(dtype)
    import e3nn.nn
    import e3nn.o3

    if kind == "irreps":
        irreps = ("1x0e+1x1o+1x0e", "1x1o+1x0e") if small else (IRREPS_IN, IRREPS_OUT)
        base = e3nn.o3.Linear(*irreps, biases=True).to(dtype)
        nn.init.normal_(base.bias)
        return base
    if kind == "product":
        second, last = ("2x0e", "1x1o+1x0e") if small else ("2x0e+1x1o", "2x0e+2x1o+1x0e")
        first = "1x0e+1x1o" if small else IRREPS_IN
        return e3nn.o3.FullyConnectedTensorProduct(first, second, last).to(dtype)
    net = e3nn.nn.FullyConnectedNet(
        [2, 2] if small else [4, 3],
        nn.functional.silu,
        variance_in=2,
        variance_out=3,
        out_act=kind == "radial",
    )
    return net.to(dtype).layer0


def width(base: nn.Module) -> int:
    """Length of an input row."""
    if isinstance(base, nn.Linear):
        return base.in_features
    if hasattr(base, "irreps_in2"):
        return base.irreps_in1.dim + base.irreps_in2.dim
    return base.irreps_in.dim if hasattr(base, "irreps_in") else int(base.weight.shape[0])


def inputs(base: nn.Module, rows: int = sum(COUNTS), seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width(base), dtype=torch.float64, generator=generator).to(base.weight.dtype)


def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A module on a row of inputs, which a tensor product takes in two parts."""
    base = getattr(module, "base", module)
    if hasattr(base, "irreps_in2"):
        return module(*x.split([base.irreps_in1.dim, base.irreps_in2.dim], dim=1))
    return module(x)


def with_weight(base: nn.Module, weight: torch.Tensor) -> nn.Module:
    """The vendor's module with another weight."""
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.weight.copy_(weight)
    return other


def latents(b, n: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, b.posterior.latent_numel, dtype=torch.float64, generator=generator)
    return noise.to(b.layer.delta.dtype)


def zero_spread(b) -> None:
    with torch.no_grad():
        for p in b.posterior.log_std:
            p.fill_(-torch.inf)


@pytest.mark.parametrize("kind", LAYERS)
class TestAgainstTheVendor:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_untrained_mean_is_the_original_bit_for_bit(self, bench, kind, dtype):
        base = make_base(kind, dtype)
        x = inputs(base)
        before = call(base, x)
        assert torch.equal(call(bench(base, delta=False).layer, x), before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("mode", ["draw", "structure", "local"])
    def test_zero_spread_is_the_original(self, bench, kind, dtype, mode):
        base = make_base(kind, dtype)
        x = inputs(base)
        before = call(base, x)
        b = bench(base, delta=False)
        zero_spread(b)
        {"draw": lambda: b.draw(latents(b, 1)), "structure": lambda: b.structure(COUNTS)}.get(
            mode, lambda: b.local(COUNTS)
        )()
        after = call(b.layer, x)
        if (
            mode == "structure"
        ):  # a product per structure: libraries round the same row otherwise in another batch
            torch.testing.assert_close(after, before, rtol=0, atol=32 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(after, before)

    def test_mean_is_the_vendor_with_the_mean_weight(self, bench, kind):
        base = make_base(kind)
        x = inputs(base)
        b = bench(base)
        expected = call(with_weight(base, base.weight + b.layer.delta), x)
        torch.testing.assert_close(call(b.layer, x), expected, rtol=1e-13, atol=1e-13)

    def test_draw_is_the_vendor_with_the_drawn_weight(self, bench, kind):
        base = make_base(kind)
        x = inputs(base)
        b = bench(base)
        z = latents(b, 1)
        b.draw(z)
        drawn = base.weight + b.layer.delta + b.posterior.sample(z)["layer"][0]
        torch.testing.assert_close(
            call(b.layer, x), call(with_weight(base, drawn), x), rtol=1e-13, atol=1e-13
        )
        assert torch.equal(b.layer.weight, drawn)
        b.off()
        assert torch.equal(b.layer.weight, base.weight + b.layer.delta)

    @pytest.mark.parametrize("counts", [[2, 0, 3], [5], [0, 5], [1, 1, 1, 1, 1]])
    def test_structures_are_the_vendor_one_by_one(self, bench, kind, counts):
        base = make_base(kind)
        x = inputs(base)
        b = bench(base)
        z = latents(b, len(counts))
        b.structure(counts, z)
        together = call(b.layer, x)
        weights = b.posterior.sample(z)["layer"]
        parts = [
            call(with_weight(base, base.weight + b.layer.delta + w), part)
            for w, part in zip(weights, x.split(counts), strict=True)
        ]
        torch.testing.assert_close(together, torch.cat(parts), rtol=1e-12, atol=1e-12)

    def test_sampled_is_the_linear_part_of_the_vendor(self, bench, kind):
        base = make_base(kind)
        b = bench(base)
        x = inputs(base)
        rows = b.rows(COUNTS)
        weight = b.posterior.sample(latents(b, len(COUNTS)))["layer"]
        zero = torch.zeros_like(b.layer.pretrained)
        parts = [
            b.layer.mean(p, w) - b.layer.mean(p, zero) for p, w in zip(x.split(COUNTS), weight, strict=True)
        ]
        torch.testing.assert_close(b.layer.sampled(x, weight, rows), torch.cat(parts), rtol=1e-12, atol=1e-12)

    def test_no_rows(self, bench, kind):
        base = make_base(kind)
        b = bench(base)
        x = inputs(base, rows=0)
        b.structure([0, 0])
        assert call(b.layer, x).shape == call(base, x).shape
        b.local([0, 0])
        assert call(b.layer, x).shape == call(base, x).shape

    def test_the_pretrained_weight_is_frozen(self, bench, kind):
        base = make_base(kind)
        b = bench(base)
        call(b.layer, inputs(base)).sum().backward()
        assert base.weight.grad is None
        assert b.layer.delta.grad is not None

    @pytest.mark.parametrize("counts", [COUNTS, [5]])
    def test_weight_gradient_is_that_of_the_map(self, bench, kind, counts):
        base = make_base(kind)
        b = bench(base)
        x, rows = inputs(base), b.rows(counts)
        out = b.layer.mean(x, b.layer.weight)
        grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        direct = b.layer.weight_gradient(x, grad, rows)
        general = VariationalLayer.weight_gradient(b.layer, x, grad, rows)
        torch.testing.assert_close(direct.reshape(general.shape), general)
        weight = b.layer.weight.detach().requires_grad_(True)
        (whole,) = torch.autograd.grad(b.layer.mean(x, weight), weight, grad)
        torch.testing.assert_close(direct.sum(dim=0).reshape(whole.shape), whole)

    def test_wrong_kind_of_rows_is_an_error(self, bench, kind):
        base = make_base(kind)
        b = bench(base)
        for set_noise in (b.structure, b.local):
            set_noise([2, 2])
            with pytest.raises(RuntimeError, match="layer sees 5 rows, but the batch has 4 of kind 'atom'"):
                call(b.layer, inputs(base))


def jacobian(b, x):
    """d(mean)/d(weight), (rows, out, weights)."""
    jac = torch.func.jacrev(lambda w: b.layer.mean(x, w))(b.layer.weight.detach())
    return jac.reshape(*jac.shape[:2], b.layer.weight.numel())


class TestMoments:
    """Outputs of one layer for fixed inputs are Gaussian; their covariance is J diag(var) J^T."""

    @pytest.mark.parametrize("kind", ["linear", pytest.param("radial_last", marks=needs_e3nn)])
    @pytest.mark.parametrize("family", ["weight", "channel"])
    def test_row_variance(self, bench, kind, family):
        b = bench(make_base(kind), family=family)
        x = inputs(b.base)
        variance = b.posterior.std()["layer"].square()
        expected = (jacobian(b, x).square() * variance.reshape(-1)).sum(dim=-1)
        torch.testing.assert_close(b.layer.row_variance(x, variance), expected)

    @needs_e3nn
    def test_row_variance_of_irreps_is_that_of_the_scalar_paths(self, bench):
        b = bench(make_base("irreps"))
        x = inputs(b.base)
        variance = b.posterior.std()["layer"].square()
        expected = (jacobian(b, x).square() * variance.reshape(-1)).sum(dim=-1)
        scalars = torch.cat(
            [torch.full((mul * ir.dim,), str(ir) == "0e") for mul, ir in b.base.irreps_out]
        )  # all paths into an even scalar come from even scalars
        torch.testing.assert_close(b.layer.row_variance(x, variance), expected * scalars)

    @needs_e3nn
    def test_row_variance_of_products_is_that_of_the_scalar_paths(self, bench):
        b = bench(make_base("product"))
        x = inputs(b.base)
        variance = b.posterior.std()["layer"].square()
        weighted = jacobian(b, x).square() * variance.reshape(-1)
        scalar = torch.cat([torch.full((k.numel,), k.scalar) for k in b.site.blocks])
        assert 0 < scalar.sum() < len(scalar)
        torch.testing.assert_close(b.layer.row_variance(x, variance), (weighted * scalar).sum(dim=-1))

    @given(
        shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        rows=st.integers(1, 4),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        family=st.sampled_from(["weight", "channel"]),
        seed=st.integers(0, 1000),
    )
    def test_a_sample_has_the_exact_covariance(self, bench, shape, rows, dtype, family, seed):
        """Samples are linear in the latent numbers, so unit latent vectors give the covariance."""
        base = nn.Linear(*shape).to(dtype)
        b = bench(base, family=family, seed=seed)
        n = b.posterior.latent_numel
        x = inputs(base, rows, seed)
        mean = b.layer(x)
        b.structure([rows] * n, torch.eye(n, dtype=dtype))
        response = b.layer(x.repeat(n, 1)).reshape(n, rows, shape[1]) - mean
        covariance = torch.einsum("kro,ksp->rosp", response, response)
        # cov(y_ro, y_sp) = delta_op sum_i x_ri x_si sigma_oi^2
        variance = b.posterior.std()["layer"].square()
        expected = torch.einsum("ri,si,oi,op->rosp", x, x, variance, torch.eye(shape[1], dtype=dtype))
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(covariance, expected, **tolerance)

    @given(counts=st.lists(st.integers(0, 3), min_size=2, max_size=4), seed=st.integers(0, 1000))
    def test_the_sample_of_one_structure_moves_no_other(self, bench, counts, seed):
        base = make_base("linear")
        b = bench(base, seed=seed)
        x = inputs(base, sum(counts), seed)
        mean = b.layer(x)
        latent = latents(b, len(counts), seed)
        moved = torch.arange(len(counts)) == seed % len(counts)
        b.structure(counts, latent * moved[:, None])
        changed = ((b.layer(x) - mean).abs() > 1e-12).any(dim=1)
        assert torch.equal(changed, moved[b.rows(counts).index])

    @pytest.mark.parametrize("mode", ["structure", "local"])
    def test_sampled_moments(self, bench, mode):
        """Keyed noise of many structures with the same two rows."""
        n = 4_000
        base = make_base("linear")
        b = bench(base)
        x = inputs(base, 2)
        getattr(b, mode)([2] * n)
        out = b.layer(x.repeat(n, 1)).detach()
        b.off()
        off = out.reshape(n, 2, 3) - b.layer(x).detach()
        variance = b.posterior.std()["layer"].detach().square()
        expected = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
        for o in range(3):
            cross = (x * variance[o]) @ x.T
            expected[:, o, :, o] = cross if mode == "structure" else cross.diagonal().diag()
        flat, matrix = off.reshape(n, 6), expected.reshape(6, 6)
        scale = matrix.diagonal().sqrt()
        assert (flat.mean(dim=0) / scale).abs().max() < 5 / n**0.5
        sampled = flat.T @ flat / n / scale[:, None] / scale[None, :]
        assert (sampled - matrix / scale[:, None] / scale[None, :]).abs().max() < 5 * (2 / n) ** 0.5

    def test_structures_and_epochs_are_independent(self, bench):
        n = 4_000
        base = make_base("linear")
        b = bench(base)
        x = inputs(base, 1)
        outs = []
        for epoch in (0, 1):
            b.structure([1] * n, epoch=epoch)
            outs.append(b.layer(x.repeat(n, 1)).detach()[:, 0])
        first, second = outs
        pairs = [(first, second), (first[:-1], first[1:])]
        for a, c in pairs:
            assert torch.corrcoef(torch.stack([a, c]))[0, 1].abs() < 5 / n**0.5


class TestGradients:
    """Training on forces differentiates every layer twice."""

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("mode", ["draw", "structure", "local"])
    def test_first_and_second_derivatives(self, bench, kind, mode):
        base = make_base(kind, small=True)
        b = bench(base, family="channel")
        x = inputs(base, 2).requires_grad_()
        z = latents(b, 1)

        def run(*_):
            # the parameters are the tensors that gradcheck moves; noise is made again from them
            if mode == "draw":
                b.draw(z)
            else:
                getattr(b, mode)([1, 0, 1])
            return b.layer(x)

        arguments = (x, b.layer.delta, *b.posterior.log_std)
        assert torch.autograd.gradcheck(run, arguments)
        assert torch.autograd.gradgradcheck(run, arguments)

    @pytest.mark.parametrize("kind", LAYERS)
    def test_local_at_rows_without_variance(self, bench, kind):
        base = make_base(kind)
        b = bench(base)
        x = torch.zeros(3, width(base), dtype=torch.float64, requires_grad=True)
        b.local([3])
        (slope,) = torch.autograd.grad(b.layer(x).square().sum(), x, create_graph=True)
        slope.sum().backward()
        assert torch.isfinite(x.grad).all()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in b.posterior.parameters())


def wigner(irreps, rotation: torch.Tensor) -> torch.Tensor:
    """The matrix that rotates features, to rounding.

    e3nn's own goes through angles and loses eight digits, so it is read off the spherical harmonics:
    Y(R v) = D Y(v) for many v.
    """
    import e3nn.o3

    points = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = []
    for mul, ir in irreps:
        y = e3nn.o3.spherical_harmonics(ir.l, points, normalize=True)
        rotated = e3nn.o3.spherical_harmonics(ir.l, points @ rotation.T, normalize=True)
        blocks += mul * [torch.linalg.lstsq(y, rotated).solution.T]
    return torch.block_diag(*blocks)


@needs_e3nn
class TestEquivariance:
    @staticmethod
    def irreps(seed):
        """Random input and output irreps that share some."""
        import e3nn.o3

        generator = torch.Generator().manual_seed(seed)

        def draw():
            muls = torch.randint(0, 4, (5,), generator=generator).tolist()
            kinds = ["0e", "1o", "2e", "1e", "0o"]
            order = torch.randperm(5, generator=generator).tolist()
            return "+".join(f"{muls[i]}x{kinds[i]}" for i in order)

        return e3nn.o3.Irreps(draw() + "+2x0e+1x1o"), e3nn.o3.Irreps("2x1o+1x0e+" + draw())

    @settings(max_examples=12)
    @given(
        seed=st.integers(0, 1000),
        counts=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        mode=st.sampled_from(["structure", "flipout", "draw"]),
    )
    def test_moments(self, bench, seed, counts, dtype, mode):
        """Covariance of all rows of a structure: J diag(var) J^T, for any irreps and any batch."""
        import e3nn.o3

        torch.manual_seed(seed)
        base = e3nn.o3.Linear(*self.irreps(seed)).to(dtype)
        b = bench(base, seed=seed)
        x = inputs(base, sum(counts), seed)
        mean, n = b.layer(x), b.posterior.latent_numel
        jac = jacobian(b, x).double()
        responses = []
        for unit in torch.eye(n, dtype=dtype):
            if mode == "flipout":
                self.flip(b, counts, unit[None])
            else:
                b.draw(unit[None]) if mode == "draw" else b.structure(counts, unit.expand(len(counts), n))
            responses.append((b.layer(x) - mean).double())
        off = torch.stack(responses)
        variance = b.posterior.std()["layer"].reshape(-1).double().square()
        close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
        start = 0
        for count in counts if mode != "draw" else [sum(counts)]:
            part = slice(start, start + count)
            found = torch.einsum("kro,ksp->rosp", off[:, part], off[:, part])
            expected = torch.einsum("row,w,spw->rosp", jac[part], variance, jac[part])
            torch.testing.assert_close(found, expected, **close)
            start += count

    @staticmethod
    def flip(b, counts, latent):
        b.structure(counts)
        b.noise.weights = b.posterior.sample(latent)
        b.noise.signs, b.noise.mode = keyed_signs(0, 0, b.keys), "flipout"

    @pytest.mark.parametrize("mode", ["draw", "structure"])
    @pytest.mark.parametrize("seed", range(6))
    def test_linear_commutes_with_rotations(self, bench, random_rotation, seed, mode):
        import e3nn.o3

        irreps_in, irreps_out = self.irreps(seed)
        base = e3nn.o3.Linear(irreps_in, irreps_out).double()
        b = bench(base, spread=1.0, seed=seed)
        x = inputs(base, 5, seed)
        if mode == "draw":
            b.draw(latents(b, 1))
        else:
            b.structure([2, 0, 3])
        rotation = random_rotation(seed)
        d_in, d_out = wigner(irreps_in, rotation), wigner(irreps_out, rotation)
        out = b.layer(x)
        torch.testing.assert_close(b.layer(x @ d_in.T), out @ d_out.T, rtol=1e-12, atol=1e-12)
        b.off()
        assert (b.layer(x) - out).abs().max() > 0.1

    def test_local_leaves_everything_but_even_scalars_alone(self, bench):
        base = make_base("irreps")
        b = bench(base)
        x = inputs(base)
        b.off()
        before = b.layer(x)
        b.local(COUNTS)
        after = b.layer(x)
        for s, (_, ir) in zip(base.irreps_out.slices(), base.irreps_out, strict=True):
            if str(ir) == "0e":
                assert not torch.isclose(after[:, s], before[:, s]).any()
            else:
                assert torch.equal(after[:, s], before[:, s])

    @pytest.mark.parametrize("mode", ["draw", "structure", "local"])
    def test_message_passing_with_noisy_radial_and_path_weights(self, bench, random_rotation, mode):
        """Distances -> radial layers, times spherical harmonics -> linear, all with noise."""
        import e3nn.nn
        import e3nn.o3

        torch.manual_seed(3)
        edges = torch.randn(6, 3, dtype=torch.float64)
        middle = e3nn.o3.Irreps("4x0e+4x1o+4x2e")
        net = e3nn.nn.FullyConnectedNet([3, 8, 12], nn.functional.silu).double()
        stages = [bench(net.layer0), bench(net.layer1), bench(e3nn.o3.Linear(middle, middle).double())]

        def run(vectors):
            for i, stage in enumerate(stages):
                if mode == "draw":
                    stage.draw(latents(stage, 1, seed=i))
                else:
                    getattr(stage, mode)([2, 4])
            length = vectors.norm(dim=1, keepdim=True)
            radial = stages[1].layer(stages[0].layer(torch.cat([length, length**2, 1 / length], dim=1)))
            harmonics = e3nn.o3.spherical_harmonics([0, 1, 2], vectors, normalize=True).split(
                [1, 3, 5], dim=1
            )
            message = [
                (w[:, :, None] * y[:, None, :]).flatten(1)
                for w, y in zip(radial.split(4, dim=1), harmonics, strict=True)
            ]
            return stages[2].layer(torch.cat(message, dim=1))

        rotation = random_rotation(5)
        d = wigner(middle, rotation)
        torch.testing.assert_close(run(edges @ rotation.T), run(edges) @ d.T, rtol=1e-11, atol=1e-11)


class TestLayerType:
    def test_torch(self):
        class Odd(nn.Linear):
            pass

        assert layer_type(nn.Linear(2, 3)) is VariationalLinear
        assert layer_type(Odd(2, 3)) == "no variational form for Odd"
        assert layer_type(nn.LayerNorm(3)) == "no variational form for LayerNorm"

    @needs_e3nn
    def test_e3nn(self):
        import e3nn.nn
        import e3nn.o3

        linear = e3nn.o3.Linear
        assert layer_type(linear("2x0e", "3x0e")) is VariationalIrrepsLinear
        assert layer_type(e3nn.nn.FullyConnectedNet([2, 3])[0]) is VariationalRadialLayer
        assert layer_type(linear("2x0e", "3x1o")) == "e3nn Linear without paths"
        without = "e3nn Linear without a weight of its own"
        assert layer_type(linear("2x0e", "3x0e", internal_weights=False)) == without
        assert layer_type(linear("2x0e", "3x0e", f_in=2, f_out=2)) == without

    @needs_e3nn
    def test_blocks_of_irreps_follow_the_vendor(self):
        base = make_base("irreps")
        blocks = VariationalIrrepsLinear.blocks(base)
        paths = [i for i, ins in enumerate(base.instructions) if ins.i_in != -1]
        views = [base.weight_view_for_instruction(i) for i in paths]
        assert [b.shape for b in blocks] == [tuple(v.shape) for v in views]
        for block, view in zip(blocks, views, strict=True):
            mine = base.weight[block.start : block.start + block.numel].reshape(block.shape)
            assert torch.equal(mine, view)
        assert [b.scalar for b in blocks].count(True) == 4  # two inputs times two outputs of 0e
