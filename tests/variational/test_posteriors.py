import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from blip_ft.families.registry import FAMILIES, posterior_class
from blip_ft.variational.prior import PretrainedPrior
from blip_ft.variational.sites import Block, Site

DOUBLE = torch.float64
FACTORISED = ["channel", "weight"]


@st.composite
def setups(draw):
    """(sites, pretrained weights): one or two sites of one or two blocks, some of them zero."""
    sites, weights = {}, {}
    dtype = draw(st.sampled_from([torch.float32, DOUBLE]))
    for i in range(draw(st.integers(1, 2))):
        blocks, start = [], 0
        for _ in range(draw(st.integers(1, 2))):
            shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
            blocks.append(Block(start, shape, draw(st.integers(0, 1))))
            start += blocks[-1].numel
        name = f"layer.{i}"
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        sites[name] = Site(name, (start,), tuple(blocks))
        weights[name] = torch.randn(start, generator=generator, dtype=DOUBLE).to(dtype)
        if draw(st.booleans()):
            weights[name][: blocks[0].numel] = 0
    return sites, weights


def make(family, sites, weights, *, prior_scale=0.3, init_std=0.1, spread=0.0):
    prior = PretrainedPrior(sites, weights, prior_scale)
    posterior = posterior_class(family)(list(sites.values()), prior, init_std)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in posterior.parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator, dtype=DOUBLE).to(p))
    return posterior


def example(family, **options):
    sites = {
        "a": Site("a", (2, 3), (Block(0, (2, 3), 0),)),
        "b": Site("b", (6,), (Block(0, (1, 2), 1), Block(2, (2, 2), 1))),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s.shape, generator=generator, dtype=DOUBLE) for n, s in sites.items()}
    return make(family, sites, weights, **options)


@pytest.mark.parametrize("family", FACTORISED)
class TestKl:
    @given(setup=setups(), prior_scale=st.floats(0.01, 2.0), init_std=st.floats(0.001, 2.0))
    def test_against_torch_distributions(self, family, setup, prior_scale, init_std):
        sites, weights = setup
        posterior = make(family, sites, weights, prior_scale=prior_scale, init_std=init_std, spread=0.5)
        expected = sum(
            kl_divergence(Normal(0.0, s.double()), Normal(0.0, posterior.prior.std(n).double())).sum()
            for n, s in posterior.std().items()
        )
        tight = weights["layer.0"].dtype == DOUBLE
        kl = posterior.kl()
        assert kl.dtype == weights["layer.0"].dtype
        torch.testing.assert_close(kl.double(), expected, rtol=1e-9 if tight else 1e-3, atol=1e-4)

    def test_zero_and_flat_at_the_prior(self, family):
        posterior = example(family, prior_scale=0.3, init_std=0.3)
        kl = posterior.kl()
        assert abs(kl.item()) < 1e-14
        kl.backward()
        assert all(p.grad.abs().max() < 1e-14 for p in posterior.parameters())
        assert posterior.relative_std().item() == pytest.approx(1)

    def test_by_monte_carlo(self, family):
        """KL = E_q[log q - log p], with the posterior's own samples."""
        posterior = example(family, prior_scale=0.3, init_std=0.15, spread=0.3)
        n = 20_000
        latent = posterior.latent([("mc",)], DOUBLE).new_empty(n, posterior.latent_numel)
        latent.normal_(generator=torch.Generator().manual_seed(0))
        log_ratio = torch.zeros(n, dtype=DOUBLE)
        std = posterior.std()
        for name, w in posterior.sample(latent).items():
            q, p = Normal(0.0, std[name]), Normal(0.0, posterior.prior.std(name))
            log_ratio += (q.log_prob(w) - p.log_prob(w)).reshape(n, -1).sum(dim=1).detach()
        standard_error = log_ratio.std() / n**0.5
        assert abs(log_ratio.mean() - posterior.kl()) < 4 * standard_error
        assert standard_error < 0.02 * posterior.kl()

    def test_known_value(self, family):
        """ln 2 - 3/8 per weight where the posterior is half as wide as the prior."""
        posterior = example(family, prior_scale=0.3, init_std=0.15)
        assert posterior.kl().item() == pytest.approx(12 * (math.log(2) - 3 / 8))

    def test_no_sites(self, family):
        posterior = posterior_class(family)([], PretrainedPrior({}, {}, 0.1), 0.1)
        assert posterior.kl() == 0
        assert posterior.latent_numel == 0
        assert posterior.std() == {}
        assert posterior.relative_std() == 0


@pytest.mark.parametrize("family", FACTORISED)
class TestSample:
    @given(setup=setups())
    def test_unit_latents_give_the_covariance(self, family, setup):
        """sample() is linear, so its value on unit vectors is a factor of the covariance."""
        sites, weights = setup
        posterior = make(family, sites, weights, spread=0.5)
        n = posterior.latent_numel
        sampled = posterior.sample(torch.eye(n, dtype=weights["layer.0"].dtype))
        for name, site in sites.items():
            assert sampled[name].shape == (n, *site.shape)
        factor = torch.cat([sampled[n_].reshape(n, -1) for n_ in sites], dim=1)
        std = torch.cat([posterior.std()[n_].reshape(-1) for n_ in sites])
        torch.testing.assert_close(factor.T @ factor, std.square().diag())
        assert (std > 0).all()

    def test_linear(self, family):
        posterior = example(family, spread=0.5)
        z = torch.randn(2, posterior.latent_numel, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        one, two = (posterior.sample(z[[i]]) for i in range(2))
        both = posterior.sample(2 * z[[0]] - 3 * z[[1]])
        for name in both:
            torch.testing.assert_close(both[name], 2 * one[name] - 3 * two[name])

    def test_latents_belong_to_their_key_and_layer(self, family):
        posterior = example(family)
        keys = [("structure", 0, 1, k) for k in (5, 6, 7)]
        latent = posterior.latent(keys, DOUBLE)
        assert latent.shape == (3, 12)
        assert torch.equal(posterior.latent(keys[::-1], DOUBLE), latent.flip(0))
        assert torch.equal(posterior.latent(keys[1:2], DOUBLE), latent[1:2])
        assert not torch.isclose(latent[0], latent[1]).any()
        assert not torch.isclose(latent[:, :6], latent[:, 6:]).any()
        assert torch.equal(posterior.latent(keys, torch.float32), latent.float())
        assert posterior.latent([], DOUBLE).shape == (0, 12)

    def test_latents_of_a_layer_do_not_depend_on_the_others(self, family):
        posterior = example(family)
        alone = posterior_class(family)(posterior.sites[1:], posterior.prior, 0.1)
        keys = [("draw", 0, 0)]
        assert torch.equal(alone.latent(keys, DOUBLE), posterior.latent(keys, DOUBLE)[:, 6:])

    def test_gradients_reach_the_spread(self, family):
        posterior = example(family, init_std=0.1)
        latent = torch.ones(1, posterior.latent_numel, dtype=DOUBLE)
        total = sum(w.sum() for w in posterior.sample(latent).values())
        total.backward()
        # d(sum sigma_i)/d(log sigma of a group) = sum of sigma over the group
        for p, (_, std) in zip(posterior.log_std, posterior.std().items(), strict=True):
            assert p.grad.sum().item() == pytest.approx(std.sum().item())


class TestShapes:
    def test_start(self):
        for family in FACTORISED:
            posterior = example(family, prior_scale=0.5, init_std=0.02)
            for name, std in posterior.std().items():
                torch.testing.assert_close(std, 0.02 * posterior.prior.rms(name))
            assert posterior.relative_std().item() == pytest.approx(0.04)
            assert posterior.factorised

    def test_number_of_variational_parameters(self):
        assert sum(p.numel() for p in example("weight").parameters()) == 12
        assert sum(p.numel() for p in example("channel").parameters()) == 2 + 2 + 2

    def test_channels_share_their_relative_std(self):
        posterior = example("channel", spread=0.5)
        relative = posterior.std()["a"] / posterior.prior.rms("a")
        torch.testing.assert_close(relative, relative[:, :1].expand(2, 3))
        assert abs(relative[0, 0] - relative[1, 0]) > 1e-3

    def test_the_prior_is_saved_once(self):
        assert set(example("weight").state_dict()) == {"log_std.0", "log_std.1"}

    def test_registry_names(self):
        for name in FAMILIES.names():
            assert posterior_class(name).options is FAMILIES[name]
            assert FAMILIES[name].name() == name
