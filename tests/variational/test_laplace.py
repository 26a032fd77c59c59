"""The Laplace covariance where it is the exact posterior: linear models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from blip_ft.families.base.linear import ClosedFormData, LinearizedModel
from blip_ft.families.posthoc_laplace.posterior import LaplacePosterior
from blip_ft.variational import Block, PretrainedPrior, Site

DOUBLE = torch.float64
P, RMS = 24, 1.7


def make(dtype: torch.dtype = DOUBLE) -> LaplacePosterior:
    sites = {
        "a": Site("a", (14,), (Block(0, (14, 1), output_axis=1),)),
        "b": Site("b", (2, 5), (Block(0, (2, 5), output_axis=0),)),
    }
    weights = {n: torch.full(s.shape, RMS, dtype=dtype) for n, s in sites.items()}
    return LaplacePosterior(list(sites.values()), PretrainedPrior(sites, weights, 0.3), 0.01)


def problem(
    m: int, seed: int = 0, context: int = 0, dtype: torch.dtype = DOUBLE
) -> tuple[LinearizedModel, np.ndarray]:
    """m labels that are linear in P weights, of very different strength; rows over their noise."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m + context, P)) * 10.0 ** rng.uniform(-2, 2, (m + context, 1))
    y = x @ (0.4 * rng.normal(size=P)) + rng.normal(size=m + context)
    y[m:] = np.nan
    gradients = torch.from_numpy(x).to(dtype)
    scored = np.ones(m + context, dtype=bool)
    return LinearizedModel(gradients, y, np.arange(m + context) % 3, scored), x[:m]


def fitted(rows: LinearizedModel, s: float, t: float, dtype: torch.dtype = DOUBLE) -> LaplacePosterior:
    posterior = make(dtype)
    posterior.fit(ClosedFormData(rows, prior_scale=s, temperature=t))
    return posterior


def exact(x: np.ndarray, s: float, t: float) -> np.ndarray:
    return RMS**2 * np.linalg.inv(np.eye(P) / s**2 + x.T @ x / t)


def covariance(posterior: LaplacePosterior) -> np.ndarray:
    """Of the weights, from what ``sample`` does to unit vectors."""
    unit = torch.eye(P, dtype=posterior.prior_std.dtype)
    flat = torch.cat([w.flatten(1) for w in posterior.sample(unit).values()], dim=1).double()
    return (flat.T @ flat).numpy()


@given(
    m=st.integers(1, 40),
    s=st.floats(0.02, 2.0),
    t=st.sampled_from([1.0, 7.0]),
    seed=st.integers(0, 1000),
    context=st.integers(0, 3),
)
def test_is_the_exact_posterior_of_a_linear_model(
    m: int, s: float, t: float, seed: int, context: int
) -> None:
    """Fewer labels than weights, and more; up to the directions that hardly change anything."""
    rows, x = problem(m, seed, context)
    ours = covariance(fitted(rows, s, t))
    np.testing.assert_allclose(ours, exact(x, s, t), rtol=0, atol=1.01e-3 * s**2 * RMS**2)


def test_to_rounding_where_no_direction_is_negligible() -> None:
    rows, x = problem(10)
    x /= np.linalg.norm(x, axis=1, keepdims=True) / 5
    rows.gradients.copy_(torch.from_numpy(x))
    for s, t in ((0.4, 1.0), (1.5, 3.0)):
        posterior = fitted(rows, s, t)
        assert len(posterior.mu) == 10
        np.testing.assert_allclose(covariance(posterior), exact(x, s, t), rtol=0, atol=1e-12)


def test_stiff_directions_survive_single_precision() -> None:
    """A label known hundreds of times better than the prior: its variance is a small difference."""
    rows, x = problem(10, dtype=torch.float32)
    posterior = fitted(rows, 1.0, 1.0, torch.float32)
    assert posterior.mu.max() > 1e5
    g = torch.from_numpy(x).float() / RMS
    parts = {"a": g[:, :14].reshape(-1, 14), "b": g[:, 14:].reshape(-1, 2, 5)}
    found = posterior.linear_variance(parts).double().numpy()
    want = np.einsum("ip,pq,iq->i", x / RMS, exact(x, 1.0, 1.0), x / RMS)
    np.testing.assert_allclose(found, want, rtol=0.02)


def test_linearised_std_is_exact() -> None:
    rows, _ = problem(8)
    posterior = fitted(rows, 0.4, 2.0)
    g = torch.randn(5, P, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    parts = {"a": g[:, :14].reshape(-1, 14), "b": g[:, 14:].reshape(-1, 2, 5)}
    want = np.einsum("ip,pq,iq->i", g.numpy(), covariance(posterior), g.numpy())
    np.testing.assert_allclose(posterior.linear_variance(parts).numpy(), want, rtol=1e-10)


def test_samples_have_the_stated_covariance() -> None:
    posterior = fitted(problem(10)[0], 0.4, 1.0)
    n = 20_000
    latent = posterior.latent([("test", k) for k in range(n)], DOUBLE)
    w = torch.cat([v.flatten(1) for v in posterior.sample(latent).values()], dim=1).numpy()
    want = covariance(posterior)
    error = np.sqrt((np.outer(want.diagonal(), want.diagonal()) + want**2) / n)
    assert (np.abs(w.T @ w / n - want) < 5.5 * error).all()


def test_std_is_the_marginal() -> None:
    posterior = fitted(problem(10)[0], 0.4, 1.0)
    std = torch.cat([v.flatten() for v in posterior.std().values()]).numpy()
    np.testing.assert_allclose(std, np.sqrt(covariance(posterior).diagonal()), rtol=1e-9)


@pytest.mark.parametrize("m", [3, 40])
def test_kl_against_torch(m: int) -> None:
    posterior = fitted(problem(m)[0], 0.4, 1.0)
    q = MultivariateNormal(torch.zeros(P, dtype=DOUBLE), torch.from_numpy(covariance(posterior)))
    p = MultivariateNormal(torch.zeros(P, dtype=DOUBLE), (0.4 * RMS) ** 2 * torch.eye(P, dtype=DOUBLE))
    torch.testing.assert_close(posterior.kl(), kl_divergence(q, p), rtol=1e-8, atol=1e-8)


def test_scale_by_the_left_out_rule() -> None:
    """The rule of the subspace posterior, with the same rows."""
    from blip_ft.families.base.gram import gram_matrix
    from blip_ft.families.base.linear import PRIOR_SCALES, widest_as_good
    from blip_ft.families.base.spectrum import left_out_nll

    rows, _ = problem(30, context=4)
    posterior = make()
    report = posterior.fit(ClosedFormData(rows))
    train = rows.is_train
    table = left_out_nll(
        gram_matrix(rows.gradients)[np.ix_(train, train)],
        rows.targets[train],
        rows.groups[train],
        rows.scored[train],
        scales=PRIOR_SCALES,
    )
    assert report["prior_scale"] == widest_as_good(table)
    assert report["temperature"] == 1.0
    assert float(posterior.prior_std) == pytest.approx(report["prior_scale"])
    assert report["effective_parameters"] == pytest.approx(float((posterior.mu / (1 + posterior.mu)).sum()))


def test_a_hotter_temperature_is_closer_to_the_prior() -> None:
    posterior = fitted(problem(10)[0], 0.4, 1.0)
    cold, numbers = covariance(posterior), posterior.effective_parameters()
    posterior.set_covariance(0.4, 1e9)
    assert posterior.effective_parameters() < 1e-2 * numbers
    posterior.set_covariance(0.4, 1.0)  # and back: nothing was lost
    np.testing.assert_allclose(covariance(posterior), cold, rtol=1e-12)


def test_no_noise_before_the_fit_and_the_files_own_size_after_it() -> None:
    posterior, other = fitted(problem(10)[0], 0.4, 1.0), make()
    assert not other.ready
    other.load_state_dict(posterior.state_dict())
    assert other.ready
    assert len(other.mu) == len(posterior.mu) > 0
    np.testing.assert_array_equal(covariance(other), covariance(posterior))
