"""What training needs of a potential, what it refuses, and moments over draws."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from blip_ft.config import PosteriorConfig
from blip_ft.errors import ConversionError
from blip_ft.families.subspace.options import SubspaceOptions
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.predict import predict_batch
from blip_ft.uncertainty.shrinkage import shrunk
from blip_ft.variational.noise import Noise

from .around_fake import batch_of, make, same, structures


class TestTraining:
    @pytest.mark.parametrize("mode", ["local", "structure", "draw"])
    def test_gradient_of_a_force_loss(self, mode):
        """Second derivatives through the whole model, against finite differences."""
        potential = make(init_std=0.2, train="rest")
        parameters = [*potential.mean_parameters, *potential.posterior.parameters()]
        batch = batch_of(potential, structures())

        def loss():
            out = potential(batch, Noise(mode), stress=True, create_graph=True)
            return out.energy.sum() + out.forces.square().sum() + out.stress[0].square().sum()

        gradients = torch.autograd.grad(loss(), parameters)
        generator = torch.Generator().manual_seed(0)
        for group in (potential.mean_parameters, list(potential.posterior.parameters())):
            direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in group]
            slopes = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    for p, d in zip(group, direction, strict=True):
                        p.add_(d, alpha=h)
                slopes.append(loss().item())
                with torch.no_grad():
                    for p, d in zip(group, direction, strict=True):
                        p.sub_(d, alpha=h)
            expected = (slopes[0] - slopes[1]) / 2e-5
            chosen = [g for g, p in zip(gradients, parameters, strict=True) if any(p is q for q in group)]
            found = sum(float((g * d).sum()) for g, d in zip(chosen, direction, strict=True))
            assert found == pytest.approx(expected, rel=1e-6)

    def test_kl_has_both_parts(self):
        potential = make(prior_scale=0.3, init_std=0.3, moved=False)
        assert abs(potential.kl().item()) < 1e-12  # the prior itself
        moved = make(prior_scale=0.3, init_std=0.03)
        parts = moved.prior.kl_mean(dict(moved.converted.deltas)), moved.posterior.kl()
        torch.testing.assert_close(moved.kl(), sum(parts))
        assert all(p > 1 for p in parts)
        moved.kl().backward()
        assert all((p.grad != 0).any() for p in moved.mean_parameters)
        assert all((p.grad != 0).all() for p in moved.posterior.parameters())

    def test_mean_parameters(self):
        assert sum(p.numel() for p in make().mean_parameters) == 472
        assert sum(p.numel() for p in make(train="readout").mean_parameters) == 144
        assert make(train="none").mean_parameters == []
        # rest: five biases; the tied module's once
        assert sum(p.numel() for p in make(train="rest").mean_parameters) == 472 + 16 + 8 + 8 + 16 + 1

    def test_the_rest_is_held_by_the_kl(self):
        potential = make(train="rest", moved=False, init_std=0.3, prior_scale=0.3)
        bias = next(iter(potential.converted.rest.values()))
        start = bias.detach().clone()
        with torch.no_grad():
            bias.mul_(2)
        expected = 0.5 * bias.numel() / 0.3**2
        assert potential.kl().item() == pytest.approx(expected)
        potential.prior.restore_rest()
        assert torch.equal(bias, start)

    def test_stays_in_evaluation_mode(self):
        """Dropout inside a vendor's model must not add noise of its own."""
        backbone = FakeBackbone()
        backbone.model.dropout = nn.Dropout(0.5)
        potential = make(backbone=backbone)
        potential.train()
        assert not any(m.training for m in potential.modules())


class TestRefusals:
    @pytest.mark.backend("sevennet")
    def test_row_noise_on_paths_that_are_not_scalar(self):
        import e3nn.o3

        backbone = FakeBackbone()
        backbone.model.vectors = e3nn.o3.Linear("2x0e+1x1o", "1x0e+1x1o").double()
        with pytest.raises(ConversionError, match=r"scalar paths only: 1 noisy modules \(first: vectors\)"):
            make(mode="local", noise=["readout", "vectors"], backbone=backbone)
        backbone = FakeBackbone()
        backbone.model.vectors = e3nn.o3.Linear("2x0e+1x1o", "1x0e+1x1o").double()
        make(mode="local", noise="readout", backbone=backbone)

    def test_row_noise_needs_independent_weights(self, monkeypatch):
        with pytest.raises(ValidationError, match="mode"):
            PosteriorConfig(family="subspace", mode="local")
        monkeypatch.setattr(SubspaceOptions, "noise_mode", "local")  # as a family may that forgets to say so
        with pytest.raises(ConversionError, match="independent weights"):
            make(family="subspace")


class TestMoments:
    def test_against_a_loop_over_draws(self):
        potential = make(init_std=0.2)
        potential.references = {8: -100.0}
        batch = batch_of(potential, structures())
        draws = [potential(batch, Noise("draw", draw=k), stress=True) for k in range(4)]
        moments = predict_batch(potential, batch)

        def stack(name):
            return np.stack([getattr(d, name).detach().numpy() for d in draws])

        close = {"rtol": 1e-10, "atol": 1e-12}
        np.testing.assert_allclose(moments.mean.energy, stack("energy").mean(0), **close)
        np.testing.assert_allclose(moments.mean.forces, stack("forces").mean(0), **close)
        np.testing.assert_allclose(moments.mean.stress, stack("stress").mean(0), **close)
        np.testing.assert_allclose(moments.energy_std, stack("energy").std(0), **close)
        np.testing.assert_allclose(moments.stress_std, stack("stress").std(0), **close)
        np.testing.assert_allclose(moments.node_energy_std, stack("node_energy").std(0), **close)
        covariances = [np.cov(stack("forces")[:, i].T, ddof=0) for i in range(len(batch.numbers))]
        expected = shrunk(torch.from_numpy(np.stack(covariances)), 3)  # four draws about their mean
        np.testing.assert_allclose(moments.forces_cov, expected, **close)
        for i, covariance in enumerate(covariances):
            np.testing.assert_allclose(moments.forces_std[i], np.sqrt(np.diag(expected[i])), **close)
            trace = math.sqrt(np.trace(covariance))
            assert moments.forces_std_norm[i].item() == pytest.approx(trace, abs=1e-12)

    def test_mean_weights_only(self):
        potential = make()
        batch = batch_of(potential, structures())
        moments = predict_batch(potential, batch, n_draws=0)
        same(moments.mean, potential(batch, stress=True))
        assert moments.energy_std is moments.forces_cov is moments.stress_std is None
        assert moments.forces_std is moments.forces_std_norm is None

    def test_leaves_no_graph_and_no_trace(self):
        potential = make()
        batch = batch_of(potential, structures())
        moments = predict_batch(potential, batch, n_draws=3)
        assert not moments.mean.forces.requires_grad
        assert potential.n_draws == 4
        assert all(p.grad is None for p in potential.parameters())
