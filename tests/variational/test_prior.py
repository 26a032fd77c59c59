import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from blip_ft.families.registry import posterior_class
from blip_ft.variational.prior import EMPIRICAL_BAYES_WEIGHTS, DropoutPrior, PretrainedPrior
from blip_ft.variational.sites import Block, Site

DOUBLE = torch.float64


def two_sites(dtype=DOUBLE):
    """A matrix, and a weight with two paths of different size and scale."""
    sites = {
        "a.b": Site("a.b", (2, 3), (Block(0, (2, 3), 0),)),
        "c": Site("c", (8,), (Block(0, (2, 2), 1), Block(4, (4, 1), 1))),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a.b": torch.randn(2, 3, generator=generator, dtype=DOUBLE).to(dtype),
        "c": (torch.randn(8, generator=generator, dtype=DOUBLE) * torch.tensor([1.0] * 4 + [7.0] * 4)).to(
            dtype
        ),
    }
    return sites, weights


def parameters(values):
    return {name: nn.Parameter(v.clone()) for name, v in values.items()}


class TestScale:
    def test_std_is_the_scale_times_rms_per_path(self):
        sites, weights = two_sites()
        prior = PretrainedPrior(sites, weights, 0.25)
        torch.testing.assert_close(
            prior.std("a.b"), torch.full((2, 3), 0.25 * weights["a.b"].square().mean().sqrt(), dtype=DOUBLE)
        )
        first, second = (0.25 * part.square().mean().sqrt() for part in weights["c"].split(4))
        torch.testing.assert_close(prior.std("c"), torch.stack([first] * 4 + [second] * 4))

    def test_refresh_measures_again(self):
        sites, weights = two_sites()
        prior = PretrainedPrior(sites, {n: torch.ones_like(w) for n, w in weights.items()}, 0.25)
        prior.refresh(weights)
        for name in sites:
            assert torch.equal(prior.std(name), PretrainedPrior(sites, weights, 0.25).std(name))

    def test_follows_the_module_to_another_precision(self):
        sites, weights = two_sites()
        prior = PretrainedPrior(sites, weights, 0.25).float()
        assert prior.std("c").dtype == torch.float32
        assert prior.state_dict() == {}  # derived from the weights, hence not saved


class TestKlOfTheMean:
    @given(scale=st.floats(0.01, 3.0), size=st.floats(0.0, 2.0), seed=st.integers(0, 50))
    def test_is_the_kl_of_two_gaussians_of_equal_width(self, scale, size, seed):
        sites, weights = two_sites()
        prior = PretrainedPrior(sites, weights, scale)
        generator = torch.Generator().manual_seed(seed)
        deltas = parameters(
            {n: size * torch.randn(w.shape, generator=generator, dtype=DOUBLE) for n, w in weights.items()}
        )
        expected = sum(
            kl_divergence(Normal(w + deltas[n], prior.std(n)), Normal(w, prior.std(n))).sum()
            for n, w in weights.items()
        )
        torch.testing.assert_close(prior.kl_mean(deltas), expected)

    def test_zero_at_the_pretrained_weights(self):
        sites, weights = two_sites()
        prior = PretrainedPrior(sites, weights, 0.1)
        deltas = parameters({n: torch.zeros_like(w) for n, w in weights.items()})
        assert prior.kl_mean(deltas) == 0
        prior.kl_mean(deltas).backward()
        assert all((d.grad == 0).all() for d in deltas.values())

    def test_frozen_weights_do_not_count(self):
        sites, weights = two_sites()
        prior = PretrainedPrior(sites, weights, 0.1)
        deltas = parameters({n: torch.ones_like(w) for n, w in weights.items()})
        everything = prior.kl_mean(deltas)
        deltas["c"].requires_grad_(False)
        expected = 0.5 * (1 / prior.std("a.b")).square().sum()
        torch.testing.assert_close(prior.kl_mean(deltas), expected)
        assert expected < everything
        deltas["a.b"].requires_grad_(False)
        assert prior.kl_mean(deltas) == 0

    @pytest.mark.parametrize("family", ["channel", "weight"])
    def test_both_parts_together_are_the_full_kl(self, family):
        sites, weights = two_sites()
        prior = PretrainedPrior(sites, weights, 0.3)
        posterior = posterior_class(family)(list(sites.values()), prior, 0.05)
        with torch.no_grad():
            for i, p in enumerate(posterior.parameters()):
                p.add_(torch.linspace(-1, 1 + i, p.numel(), dtype=DOUBLE).reshape(p.shape))
        deltas = parameters({n: 0.1 * w for n, w in weights.items()})
        expected = sum(
            kl_divergence(Normal(1.1 * w, posterior.std()[n]), Normal(w, prior.std(n))).sum()
            for n, w in weights.items()
        )
        torch.testing.assert_close(prior.kl_mean(deltas) + posterior.kl(), expected)


class TestRest:
    """Trained parameters outside linear blocks."""

    def test_same_penalty_around_the_start(self):
        bias = nn.Parameter(torch.tensor([3.0, 4.0], dtype=DOUBLE))
        prior = PretrainedPrior({}, {}, 0.1, {"bias": bias})
        assert prior.kl_mean({}) == 0
        with torch.no_grad():
            bias += 0.5
        std = 0.1 * 12.5**0.5
        assert prior.kl_mean({}).item() == pytest.approx(0.5 * 2 * (0.5 / std) ** 2)

    def test_a_parameter_that_starts_at_zero_may_move(self):
        bias = nn.Parameter(torch.zeros(3))
        prior = PretrainedPrior({}, {}, 0.1, {"bias": bias})
        with torch.no_grad():
            bias += 0.01
        kl = prior.kl_mean({})
        kl.backward()
        assert kl.item() == pytest.approx(0.5 * 3 * 0.1**2)
        assert torch.allclose(bias.grad, torch.full((3,), 1.0))

    def test_restore(self):
        bias = nn.Parameter(torch.tensor([3.0, 4.0]))
        prior = PretrainedPrior({}, {}, 0.1, {"norm.bias": bias})
        with torch.no_grad():
            bias.mul_(2)
        prior.restore_rest()
        assert bias.tolist() == [3.0, 4.0]
        assert prior.kl_mean({}) == 0

    def test_the_start_is_saved(self):
        bias = nn.Parameter(torch.tensor([3.0, 4.0]))
        state = PretrainedPrior({}, {}, 0.1, {"norm.bias": bias}).state_dict()
        assert [v.tolist() for v in state.values()] == [[3.0, 4.0]]


class TestDropout:
    """p = N(0, alpha0 theta^2), q = N(theta, alpha theta^2)."""

    def setup(self, prior_scale=0.4, init_std=0.1, family="weight"):
        sites, weights = two_sites()
        layers = {
            n: SimpleNamespace(pretrained=w, delta=nn.Parameter(0.3 * w.flip(0))) for n, w in weights.items()
        }
        prior = DropoutPrior(sites, layers, prior_scale, list(sites))
        return prior, layers, posterior_class(family)(list(sites.values()), prior, init_std)

    @given(
        prior_scale=st.floats(0.05, 2.0),
        init_std=st.floats(0.01, 2.0),
        family=st.sampled_from(["weight", "channel"]),
    )
    def test_against_torch_distributions(self, prior_scale, init_std, family):
        prior, layers, posterior = self.setup(prior_scale, init_std, family)
        expected = torch.zeros((), dtype=DOUBLE)
        for name, layer in layers.items():
            theta = layer.pretrained + layer.delta
            q = Normal(theta, posterior.std()[name])
            expected += kl_divergence(q, Normal(0.0, prior_scale * theta.abs())).sum()
            torch.testing.assert_close(posterior.std()[name], init_std * theta.abs())
        kl = prior.kl_mean({}) + posterior.kl()
        torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=1e-6)

    def test_closed_form(self):
        prior, _, posterior = self.setup()
        alpha, alpha0 = 0.1**2, 0.4**2
        per_weight = 0.5 * ((alpha + 1) / alpha0 + math.log(alpha0 / alpha) - 1)
        assert (prior.kl_mean({}) + posterior.kl()).item() == pytest.approx(14 * per_weight, rel=1e-6)

    def test_the_mean_cancels(self):
        """Nothing holds it: neither value nor gradient of the KL know where it is."""
        prior, layers, posterior = self.setup()
        before = (prior.kl_mean({}) + posterior.kl()).item()
        kl = prior.kl_mean({n: x.delta for n, x in layers.items()}) + posterior.kl()
        kl.backward()
        assert all(x.delta.grad is None or (x.delta.grad == 0).all() for x in layers.values())
        with torch.no_grad():
            for layer in layers.values():
                layer.delta.mul_(-7)
        assert (prior.kl_mean({}) + posterior.kl()).item() == before

    def test_the_spread_follows_the_mean(self):
        _, layers, posterior = self.setup()
        assert posterior.relative_std().item() == pytest.approx(0.25)
        with torch.no_grad():  # a weight of zero has no spread, and no NaN either
            layers["a.b"].delta[0, 0] = -layers["a.b"].pretrained[0, 0]
        assert posterior.std()["a.b"][0, 0] == 0
        assert posterior.relative_std().item() == pytest.approx(0.25)
        sampled = posterior.sample(torch.ones(1, 14, dtype=DOUBLE))
        assert sampled["a.b"][0, 0, 0] == 0
        assert torch.isfinite(torch.autograd.grad(sampled["a.b"].sum(), layers["a.b"].delta)[0]).all()


class TestEmpiricalBayes:
    def setup(self, seed=0):
        sites, weights = two_sites()
        prior = PretrainedPrior(sites, weights, 0.3, empirical_bayes=True)
        posterior = posterior_class("weight")(list(sites.values()), prior, 0.1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in posterior.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=DOUBLE))
        deltas = parameters(
            {n: 0.5 * torch.randn(w.shape, generator=generator, dtype=DOUBLE) for n, w in weights.items()}
        )
        return prior, posterior, deltas

    def loss(self, prior, posterior, deltas):
        return float(prior.kl_mean(deltas) + posterior.kl() + prior.kl_scale())

    def test_starts_at_the_recipes_scale(self):
        prior, posterior, deltas = self.setup()
        plain = PretrainedPrior(*two_sites(), 0.3)
        assert torch.equal(prior.std("c"), plain.std("c"))
        assert prior.kl_scale() == 0
        torch.testing.assert_close(prior.kl_mean(deltas), plain.kl_mean(deltas))
        assert plain.update(deltas, posterior.std()) == {}

    @pytest.mark.parametrize("seed", range(5))
    def test_update_is_the_minimum_over_the_scales(self, seed):
        prior, posterior, deltas = self.setup(seed)
        before = self.loss(prior, posterior, deltas)
        scales = prior.update(deltas, posterior.std())
        best = self.loss(prior, posterior, deltas)
        assert best < before
        assert [len(v) for v in scales.values()] == [1, 2]
        for factor in (0.9, 1.1):
            for i, part in ((0, slice(0, 6)), (1, slice(0, 4)), (1, slice(4, 8))):
                path = getattr(prior, f"_path{i}").view(-1)
                path[part] *= factor
                assert self.loss(prior, posterior, deltas) > best
                path[part] /= factor

    def test_formula(self):
        prior, posterior, deltas = self.setup()
        scales = prior.update(deltas, posterior.std())
        square = (deltas["a.b"].square() + posterior.std()["a.b"].square()) / prior.rms("a.b").square()
        nu = EMPIRICAL_BAYES_WEIGHTS
        expected = math.sqrt((float(square.sum()) + nu * 0.09) / (6 + nu))
        assert scales["a.b"][0] == pytest.approx(expected)
        torch.testing.assert_close(prior.std("a.b"), expected * prior.rms("a.b"))

    def test_weights_without_noise_and_training_keep_their_scale(self):
        prior, _, deltas = self.setup()
        deltas["c"].requires_grad_(False)
        scales = prior.update(deltas, {})
        assert set(scales) == {"a.b"}
        torch.testing.assert_close(prior.std("c"), 0.3 * prior.rms("c"))

    def test_is_saved(self):
        prior, posterior, deltas = self.setup()
        prior.update(deltas, posterior.std())
        other = PretrainedPrior(*two_sites(), 0.3, empirical_bayes=True)
        other.load_state_dict(prior.state_dict())
        assert torch.equal(other.std("c"), prior.std("c"))
