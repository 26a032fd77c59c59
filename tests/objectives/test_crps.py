import math

import numpy as np
import pytest
import scoringrules
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from blip_ft.objectives import fair_crps, gaussian_crps

DOUBLE = torch.float64


def brute_force(samples, label):
    k = len(samples)
    distance = (samples - label).abs().mean(dim=0)
    pairs = sum((samples[i] - samples[j]).abs() for i in range(k) for j in range(k))
    return distance - pairs / (2 * k * (k - 1))


@st.composite
def ensembles(draw):
    """(samples (K, ...), label (...))."""
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    dtype = draw(st.sampled_from([torch.float32, DOUBLE]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    samples = torch.randn(draw(st.integers(2, 9)), *shape, generator=generator, dtype=DOUBLE).to(dtype)
    if draw(st.booleans()):
        samples[1] = samples[0]  # a tie
    return samples, torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)


@given(ensembles())
def test_against_brute_force_and_scoringrules(ensemble):
    samples, label = ensemble
    score = fair_crps(samples, label)
    assert score.shape == label.shape
    assert score.dtype == samples.dtype
    torch.testing.assert_close(score, brute_force(samples, label))
    members = samples.movedim(0, -1).double().numpy()
    expected = scoringrules.crps_ensemble(label.double().numpy(), members, estimator="fair")
    np.testing.assert_allclose(score.double().numpy(), expected, rtol=1e-5, atol=1e-6)


@given(ensembles(), st.floats(0.1, 10), st.floats(-5, 5))
def test_unit_and_origin(ensemble, scale, shift):
    samples, label = ensemble[0].double(), ensemble[1].double()
    moved = fair_crps(scale * samples + shift, scale * label + shift)
    torch.testing.assert_close(moved, scale * fair_crps(samples, label), rtol=1e-9, atol=1e-9)


def test_known_values():
    assert fair_crps(torch.tensor([3.0, 3.0]), torch.tensor(1.0)) == 2  # a sharp prediction: its error
    assert fair_crps(torch.tensor([0.0, 2.0]), torch.tensor(1.0)) == 0  # 1 - 1/4 (2 + 2)
    assert fair_crps(torch.tensor([0.0, 2.0]), torch.tensor(0.0)) == 0


@pytest.mark.parametrize("k", [0, 1])
def test_needs_two_samples(k):
    with pytest.raises(ValueError, match="two samples"):
        fair_crps(torch.zeros(k, 3), torch.zeros(3))


def test_unbiased():
    """The mean over ensembles of any size is the CRPS of their law."""
    generator = torch.Generator().manual_seed(0)
    y, sigma = torch.tensor(0.7, dtype=DOUBLE), 1.3
    z = y / sigma
    normal = Normal(torch.zeros((), dtype=DOUBLE), 1.0)
    exact = sigma * (
        z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - 1 / math.pi**0.5
    )  # Gneiting et al. 2005
    for k in (2, 3, 10):
        samples = sigma * torch.randn(k, 40_000, generator=generator, dtype=DOUBLE)
        scores = fair_crps(samples, y.expand(40_000))
        assert abs(scores.mean() - exact) < 4 * scores.std() / 40_000**0.5


class TestProper:
    """Labels from N(0, 1), K = 4 predictions from N(0, spread^2): which spread scores best?"""

    spreads = torch.tensor([0, 0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 10, 100], dtype=DOUBLE)

    def scores(self, spread_factor=1.0):
        generator = torch.Generator().manual_seed(1)
        n = 20_000
        label = torch.randn(n, generator=generator, dtype=DOUBLE)
        eps = torch.randn(4, n, generator=generator, dtype=DOUBLE)
        out = []
        for spread in self.spreads:
            samples = spread * eps
            distance = (samples - label).abs().mean(dim=0)
            pairs = distance - fair_crps(samples, label)  # the term that rewards spread
            out.append((distance - spread_factor * pairs).mean())
        return torch.stack(out)

    def test_best_at_the_true_spread(self):
        scores = self.scores()
        best = int(scores.argmin())
        assert self.spreads[best] == 1
        assert (scores[: best + 1].diff() < 0).all()
        assert (scores[best:].diff() > 0).all()

    def test_without_the_half_it_falls_without_bound(self):
        scores = self.scores(spread_factor=2.0)
        assert (scores.diff() < 0).all()
        assert scores[-1] < -30

    def test_gradient_vanishes_at_the_true_spread(self):
        generator = torch.Generator().manual_seed(2)
        n = 40_000
        label = torch.randn(n, generator=generator, dtype=DOUBLE)
        eps = torch.randn(2, n, generator=generator, dtype=DOUBLE)
        slopes = {}
        for spread in (0.5, 1.0, 2.0):
            s = torch.tensor(spread, dtype=DOUBLE, requires_grad=True)
            fair_crps(s * eps, label).mean().backward()
            slopes[spread] = s.grad.item()
        assert slopes[0.5] < -0.05
        assert abs(slopes[1.0]) < 0.01
        assert slopes[2.0] > 0.05


def test_gradients():
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(5, 3, 2, generator=generator, dtype=DOUBLE, requires_grad=True)
    label = torch.randn(3, 2, generator=generator, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(fair_crps, (samples, label))


def test_gradient_is_finite_at_ties():
    samples = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    fair_crps(samples, torch.zeros((), dtype=DOUBLE)).backward()
    assert torch.isfinite(samples.grad).all()


class TestGaussian:
    @settings(deadline=None)
    @given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
    def test_against_scoringrules(self, error, std):
        expected = float(scoringrules.crps_normal(error, 0.0, std))
        assert float(gaussian_crps(error, std)) == pytest.approx(expected, rel=1e-12, abs=1e-14 * std)

    def test_arrays_are_broadcast(self):
        errors = np.linspace(-2, 2, 9)
        scores = gaussian_crps(errors, 0.3)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, scoringrules.crps_normal(errors, 0.0, 0.3), rtol=1e-13)
        np.testing.assert_allclose(scores, scores[::-1], rtol=1e-14)

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("std", [0.0, 1e-300])
    def test_without_spread_it_is_the_error(self, std):
        np.testing.assert_allclose(
            gaussian_crps([-0.5, 0.0, 2.0], std), [0.5, 0.0, 2.0], rtol=1e-15, atol=std
        )

    @pytest.mark.filterwarnings("error")
    def test_nan_passes(self):
        scores = gaussian_crps([np.nan, 1.0, np.nan, 1.0], [1.0, np.nan, 0.0, 1.0])
        assert np.isnan(scores).tolist() == [True, True, True, False]
