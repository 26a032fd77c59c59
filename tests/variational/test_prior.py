import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal, kl_divergence

from blip_ft.variational.posteriors import FAMILIES
from blip_ft.variational.prior import PretrainedPrior
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
    @settings(deadline=None, max_examples=25)
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
        posterior = FAMILIES[family](list(sites.values()), prior, 0.05)
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
