"""Input-dependent spread: the network, its clamp, the KL, and the moments of one layer's noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from blip_ft.families.adaptive.posterior import AdaptivePosterior, Recorder
from blip_ft.variational import PretrainedPrior
from blip_ft.variational.layers import VariationalIrrepsLinear, VariationalLinear
from blip_ft.variational.mean import FullChange
from blip_ft.variational.noise import NoiseState, RowLayout, keyed_row_normal
from blip_ft.variational.sites import Site

DOUBLE = torch.float64
RANGE = (1e-3, 0.5)


def make(
    base: nn.Module | None = None,
    *,
    prior_scale: float = 0.2,
    init_std: float = 0.05,
    spread: float = 0.0,
    seed: int = 0,
    std_range: tuple[float, float] = RANGE,
) -> tuple[VariationalLinear, AdaptivePosterior]:
    """One converted layer with its posterior; ``spread`` makes alpha depend on the input."""
    base = nn.Linear(4, 3).double() if base is None else base
    kind = VariationalLinear if isinstance(base, nn.Linear) else VariationalIrrepsLinear
    site = Site("layer", tuple(base.weight.shape), kind.blocks(base))
    layer = kind(base, site, FullChange(nn.Parameter(torch.zeros_like(base.weight))), NoiseState(), "atom")
    prior = PretrainedPrior({"layer": site}, {"layer": base.weight.detach()}, prior_scale)
    posterior = AdaptivePosterior(
        [site],
        prior,
        init_std,
        inputs={"layer": layer.n_invariants},
        kinds={"layer": "update"},
        std_range=std_range,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in posterior.networks[0].last.parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator, dtype=DOUBLE).to(p))
    return layer, posterior


def inputs(n: int, width: int = 4, seed: int = 1, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def rows_of(counts: list[int]) -> RowLayout:
    return RowLayout.from_index(torch.repeat_interleave(torch.tensor(counts)), len(counts))


def alphas(layer, posterior, x):
    return posterior.amplitude(layer, x)[:, 0].square()


class TestAlpha:
    def test_starts_as_one_number(self):
        layer, posterior = make(init_std=0.05)
        torch.testing.assert_close(alphas(layer, posterior, inputs(5)), torch.full((5,), 0.0025).double())
        assert posterior.relative_std().item() == pytest.approx(0.05 / 0.2, rel=1e-6)

    def test_depends_on_the_row(self):
        layer, posterior = make(spread=1.0)
        a = alphas(layer, posterior, inputs(50))
        assert a.max() > 1.5 * a.min()
        torch.testing.assert_close(a[3:4], alphas(layer, posterior, inputs(50)[3:4]), rtol=1e-12, atol=0)

    def test_the_network_is_a_function_of_the_layers_name(self):
        torch.manual_seed(1)
        first = make()[1].state_dict()
        torch.manual_seed(2)
        assert all(torch.equal(v, first[k]) for k, v in make()[1].state_dict().items())

    @given(bias=st.floats(-60, 60), seed=st.integers(0, 20))
    def test_stays_within_the_clamp(self, bias, seed):
        layer, posterior = make(spread=3.0, seed=seed)
        with torch.no_grad():
            posterior.networks[0].last.bias.add_(bias)
        root = posterior.amplitude(layer, 1e3 * inputs(20, seed=seed))
        assert (root >= RANGE[0] * (1 - 1e-9)).all()
        assert (root <= RANGE[1] * (1 + 1e-9)).all()

    def test_the_clamp_is_smooth_and_lets_go(self):
        """Far outside the range the gradient still leads back, and nothing has a kink."""
        _, posterior = make()
        u = torch.linspace(-30, 30, 2001, dtype=DOUBLE, requires_grad=True)
        clamped = posterior._centre + posterior._half * torch.tanh((u - posterior._centre) / posterior._half)
        (slope,) = torch.autograd.grad(clamped.sum(), u)
        assert (slope > 0).all()
        assert slope.diff().abs().max() < 0.01

    def test_reports_where_the_clamp_binds(self):
        layer, posterior = make()
        with torch.no_grad():  # ln alpha far above the range for half of the rows
            network = posterior.networks[0]
            network.first.weight.zero_()
            network.first.weight[0, 0] = 50.0
            network.last.weight[0, 0] = 10.0
        x = torch.zeros(8, 4, dtype=DOUBLE)
        x[:4, 0] = 5.0
        Recorder(posterior, {"atom": rows_of([8])})(layer, x)
        assert posterior.clamped() == {"update": 0.5}
        assert posterior.clamped() == {}  # counted once

    def test_not_inside_the_range(self):
        with pytest.raises(ValueError, match="inside the range"):
            make(init_std=0.6)


class TestKl:
    @given(
        counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
        prior_scale=st.floats(0.01, 1.0),
        seed=st.integers(0, 100),
    )
    def test_against_torch_distributions(self, counts, prior_scale, seed):
        layer, posterior = make(prior_scale=prior_scale, spread=1.0, seed=seed)
        x = inputs(sum(counts), seed=seed)
        recorder = Recorder(posterior, {"atom": rows_of(counts)})
        recorder(layer, x)
        rms = posterior.prior.rms("layer")
        start = 0
        for value, count in zip(recorder.kl(), counts, strict=True):
            per_row = [
                kl_divergence(Normal(0.0, a.sqrt() * rms), Normal(0.0, prior_scale * rms)).sum()
                for a in alphas(layer, posterior, x[start : start + count])
            ]
            expected = torch.stack(per_row).mean() if per_row else torch.zeros((), dtype=DOUBLE)
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
            start += count

    def test_by_monte_carlo(self):
        """KL of one row's weights = E_q[log q - log p], with the family's own samples."""
        layer, posterior = make(spread=1.0)
        x = inputs(1)
        recorder = Recorder(posterior, {"atom": rows_of([1])})
        root = recorder(layer, x)
        latent = torch.randn(20_000, posterior.latent_numel, dtype=DOUBLE, generator=torch.Generator())
        w = (root * posterior.sample(latent)["layer"].flatten(1)).detach()
        rms = posterior.prior.rms("layer").flatten()
        ratio = Normal(0.0, root[0].detach() * rms).log_prob(w) - Normal(0.0, 0.2 * rms).log_prob(w)
        log_ratio = ratio.sum(dim=1)
        error = log_ratio.std() / len(log_ratio) ** 0.5
        assert abs(log_ratio.mean() - recorder.kl()[0].item()) < 4 * error
        assert error < 0.02 * recorder.kl()[0]

    def test_zero_at_the_prior(self):
        layer, posterior = make(prior_scale=0.05, init_std=0.05)
        recorder = Recorder(posterior, {"atom": rows_of([3, 2])})
        recorder(layer, inputs(5))
        assert recorder.kl().abs().max() < 1e-14
        assert posterior.kl() == 0  # no weights are shared by all structures

    def test_a_tied_weight_counts_once(self):
        """Its mean is over the rows of all places."""
        layer, posterior = make(spread=1.0)
        a, b = inputs(3, seed=1), inputs(3, seed=2)
        values = []
        for parts in ([a], [b], [a, b]):
            recorder = Recorder(posterior, {"atom": rows_of([3])})
            for x in parts:
                recorder(layer, x)
            values.append(recorder.kl()[0])
        torch.testing.assert_close(values[2], (values[0] + values[1]) / 2)


class TestMoments:
    """Noise of one layer for fixed inputs: covariance sqrt(alpha_r alpha_s) x_r . x_s rms^2."""

    @given(
        shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        rows=st.integers(1, 4),
        seed=st.integers(0, 100),
        dtype=st.sampled_from([torch.float32, DOUBLE]),
    )
    def test_structure(self, shape, rows, seed, dtype):
        torch.manual_seed(seed)
        layer, posterior = make(nn.Linear(*shape).to(dtype), spread=1.0, seed=seed)
        x = inputs(rows, shape[0], seed, dtype)
        mean, n = layer(x), posterior.latent_numel
        state = layer.noise
        state.weights = posterior.sample(torch.eye(n, dtype=dtype))
        state.rows = {"atom": rows_of([rows] * n)}
        state.mode, state.row_amplitude = "structure", posterior.amplitude
        off = (layer(x.repeat(n, 1)).reshape(n, rows, -1) - mean).double()
        covariance = torch.einsum("kro,ksp->rosp", off, off)
        root = posterior.amplitude(layer, x)[:, 0].double()
        rms2 = posterior.prior.rms("layer").flatten()[0].double() ** 2
        gram = rms2 * torch.outer(root, root) * (x.double() @ x.double().T)
        expected = torch.einsum("rs,op->rosp", gram, torch.eye(shape[1], dtype=DOUBLE))
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
        torch.testing.assert_close(covariance, expected, **close)

    @pytest.mark.parametrize("mode", ["structure", "local", "draw"])
    def test_sampled(self, mode):
        """Two rows, many samples: rows share their weights except in ``local`` mode."""
        layer, posterior = make(spread=1.0)
        n = 4000 if mode != "draw" else 600
        x, state = inputs(2), layer.noise
        mean = layer(x).detach()
        state.row_amplitude = posterior.amplitude
        keys = list(range(n))
        latent = posterior.latent([("structure", 0, 0, k) for k in keys], DOUBLE)
        state.rows = {"atom": rows_of([2] * n)}
        state.mode = mode
        if mode == "local":
            state.variances = posterior.row_variances()
            state.row_normal = keyed_row_normal(0, 0, keys)
        if mode == "draw":
            outs = []
            for z in latent:
                state.weights = {k: w[0] for k, w in posterior.sample(z[None]).items()}
                outs.append(layer(x).detach())
            off = torch.stack(outs) - mean
        else:
            state.weights = posterior.sample(latent) if mode == "structure" else {}
            off = layer(x.repeat(n, 1)).detach().reshape(n, 2, 3) - mean
        root = posterior.amplitude(layer, x)[:, 0].detach()
        gram = posterior.prior.rms("layer")[0, 0] ** 2 * torch.outer(root, root) * (x @ x.T)
        expected = gram.diagonal().diag() if mode == "local" else gram
        scale = gram.diagonal().sqrt()
        sampled = torch.einsum("nro,nso->rs", off, off) / (3 * n) / torch.outer(scale, scale)
        assert (sampled - expected / torch.outer(scale, scale)).abs().max() < 5 * (2 / (3 * n)) ** 0.5

    @pytest.mark.parametrize("mode", ["structure", "local", "draw"])
    def test_gradients_pass_through_alpha(self, mode):
        layer, posterior = make(nn.Linear(2, 2).double(), spread=1.0)
        x = inputs(2, 2).requires_grad_()
        state = layer.noise
        latent = posterior.latent([("z", 0), ("z", 1)], DOUBLE)

        def run(*_):
            state.clear()
            state.rows, state.mode, state.row_amplitude = {"atom": rows_of([1, 1])}, mode, posterior.amplitude
            if mode == "local":
                state.variances, state.row_normal = posterior.row_variances(), keyed_row_normal(0, 0, [1, 2])
            else:
                state.weights = posterior.sample(latent)
            if mode == "draw":
                state.weights = {k: w[0] for k, w in state.weights.items()}
            return layer(x)

        network = posterior.networks[0]
        parameters = (x, layer.delta, network.first.weight, network.last.weight, network.last.bias)
        assert torch.autograd.gradcheck(run, parameters)
        assert torch.autograd.gradgradcheck(run, parameters[:1] + parameters[3:])


@pytest.mark.backend("sevennet")
class TestIrreps:
    irreps_in, irreps_out = "3x0e+2x1o+2x2e+1x0o", "2x0e+2x1o+1x2e"

    def layer(self, spread=1.0):
        import e3nn.o3

        torch.manual_seed(0)
        return make(e3nn.o3.Linear(self.irreps_in, self.irreps_out).double(), spread=spread)

    def wigner(self, irreps, rotation):
        import e3nn.o3

        points = torch.randn(60, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        blocks = []
        for mul, ir in e3nn.o3.Irreps(irreps):
            y, z = (
                e3nn.o3.spherical_harmonics(ir.l, p, normalize=True) for p in (points, points @ rotation.T)
            )
            blocks += mul * [torch.linalg.lstsq(y, z).solution.T]
        return torch.block_diag(*blocks)

    @pytest.mark.parametrize("mode", ["structure", "draw"])
    def test_alpha_is_invariant_and_the_layer_equivariant(self, random_rotation, mode):
        layer, posterior = self.layer()
        x, rotation = inputs(5, 20), random_rotation(3)
        into, outof = (self.wigner(i, rotation) for i in (self.irreps_in, self.irreps_out))
        turned = x @ into.T
        assert layer.n_invariants == 8
        torch.testing.assert_close(layer.invariants(turned), layer.invariants(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(alphas(layer, posterior, turned), alphas(layer, posterior, x))
        assert alphas(layer, posterior, x).std() > 0
        state = layer.noise
        state.weights = posterior.sample(posterior.latent([("z",)], DOUBLE))
        state.rows, state.mode, state.row_amplitude = {"atom": rows_of([5])}, mode, posterior.amplitude
        if mode == "draw":
            state.weights = {k: w[0] for k, w in state.weights.items()}
        torch.testing.assert_close(layer(turned), layer(x) @ outof.T, rtol=1e-11, atol=1e-11)


def test_known_answer():
    """y = w x + noise, a latent w for every structure, w ~ N(w0, s^2 rms^2).

    The loss of a structure, E[NLL] + T KL, is stationary in alpha at

        alpha(x) = 1 / (1/s^2 + rms^2 |x|^2 / (T P sigma^2)),

    P the number of weights: wide where the row is small. The network has to find this function.
    """
    s, temperature, sigma, rms_weight = 0.4, 0.5, 0.3, 1.3
    base = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[rms_weight, -rms_weight]]))
    layer, posterior = make(base, prior_scale=s, init_std=0.1, std_range=(0.01, 0.6))
    x = inputs(200, 2, seed=5) * torch.linspace(0.05, 1.5, 200, dtype=DOUBLE)[:, None]
    rows = rows_of([1] * 200)
    rms2 = float(posterior.prior.rms("layer")[0, 0]) ** 2
    optimizer = torch.optim.LBFGS(
        posterior.networks.parameters(), max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure():
        optimizer.zero_grad()
        recorder = Recorder(posterior, {"atom": rows})
        alpha = recorder(layer, x)[:, 0].square()
        # E over w of (y - w x)^2 / (2 sigma^2): the mean's part does not depend on alpha
        expected_nll = 0.5 * alpha * rms2 * x.square().sum(dim=1) / sigma**2
        loss = (expected_nll + temperature * recorder.kl()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = 1 / (1 / s**2 + rms2 * x.square().sum(dim=1) / (temperature * 2 * sigma**2))
    found = alphas(layer, posterior, x).detach()
    assert exact.max() > 8 * exact.min()
    np.testing.assert_allclose(found.sqrt(), exact.sqrt(), rtol=0.1)
    assert (found.sqrt() / exact.sqrt() - 1).square().mean().sqrt() < 0.03
    assert math.isclose(found.max() ** 0.5, s, rel_tol=0.1)  # as wide as the prior where x says nothing
