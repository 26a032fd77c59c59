"""KL of the predictive from the pretrained model's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from blip_ft.backbones.protocol import Batch, Prediction
from blip_ft.objectives import function_kl
from blip_ft.objectives.function_kl import gaussian_kl

DOUBLE = torch.float64


@given(
    mean=st.floats(-2, 2),
    spread=st.floats(0.01, 2),
    noise=st.floats(0.1, 1),
    error=st.floats(0.1, 2),
)
def test_many_samples_give_the_kl_of_two_gaussians(mean, spread, noise, error):
    n = 20_000
    eps = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    eps = (eps - eps.mean()) / eps.std()
    found = gaussian_kl((mean + spread * eps)[:, None], torch.zeros(1, dtype=DOUBLE), noise, error)
    total = (spread**2 + noise**2) ** 0.5
    exact = kl_divergence(Normal(mean, total), Normal(0.0, error))
    assert found.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("spread", [0.01, 30.0])
def test_gradient_in_the_spread_is_right_with_two_samples(spread):
    """In both limits, v << s^2 and v >> s^2, in which the bias of ln v vanishes or is constant."""
    noise, error, n = 1.0, 3.0, 200_000
    eps = torch.randn(2, n, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    log_spread = torch.tensor(spread, dtype=DOUBLE).log().requires_grad_()
    kl = gaussian_kl(log_spread.exp() * eps, torch.zeros(n, dtype=DOUBLE), noise, error).mean()
    (found,) = torch.autograd.grad(kl, log_spread)
    v = spread**2
    exact = v / error**2 - v / (v + noise**2)
    assert found.item() == pytest.approx(exact, rel=0.05)


def test_one_sample_has_no_spread():
    found = gaussian_kl(torch.full((1, 1), 0.5, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE), 0.3, 0.7)
    exact = kl_divergence(Normal(0.5, 0.3), Normal(0.0, 0.7))
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)


def test_sums_over_the_outputs_of_each_structure():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    n_atoms = torch.tensor([2, 3])
    index = torch.repeat_interleave(torch.arange(2), n_atoms)
    labels = {"energy": randn(2), "forces": randn(5, 3), "stress": torch.full((2, 6), torch.nan)}
    batch = Batch(None, n_atoms, torch.ones(5), {"atom": index}, labels=labels)
    samples = [Prediction(randn(2), randn(5, 3)) for _ in range(3)]
    noise, error = {"energy": 0.1, "forces": 0.2}, {"energy": 0.5, "forces": 0.9}
    found = function_kl(samples, batch, noise, error)
    for i, part in enumerate((slice(0, 2), slice(2, 5))):
        energies = torch.stack([s.energy[i] / n_atoms[i] for s in samples])
        expected = gaussian_kl(energies, labels["energy"][i] / n_atoms[i], 0.1, 0.5)
        forces = torch.stack([s.forces[part] for s in samples])
        expected = expected + gaussian_kl(forces, labels["forces"][part], 0.2, 0.9).sum()
        torch.testing.assert_close(found[i], expected)
