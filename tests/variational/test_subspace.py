"""The subspace posterior where the exact answer is known: Bayesian linear regression."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.families.base.gram import gram_matrix
from blip_ft.families.base.linear import (
    ClosedFormData,
    LinearizedModel,
    widest_as_good,
)
from blip_ft.families.base.spectrum import left_out_nll
from blip_ft.families.subspace.posterior import SubspacePosterior, geometric_mean
from blip_ft.variational import Block, PretrainedPrior, Site

P, RMS = 24, 1.7  # weights and their common pretrained size


def make(rank: int, *, p: int = P) -> SubspacePosterior:
    site = Site("layer", (p,), (Block(0, (p, 1), output_axis=1),))
    weights = torch.full((p,), RMS, dtype=torch.float64)
    prior = PretrainedPrior({"layer": site}, {"layer": weights}, 0.3)
    return SubspacePosterior([site], prior, 0.01, rank=rank).double()


def problem(m: int, seed: int = 0, groups: int = 3, *, p: int = P) -> tuple[LinearizedModel, np.ndarray]:
    """LinearizedModel of a linear model y = X w + noise of variance 1 (rows are in units of the noise)."""
    rng = np.random.default_rng(seed)
    # exactly representable in half precision is not needed: V is rounded, and H is fitted to it
    gradients = rng.normal(size=(m, p))
    targets = gradients @ (0.4 * rng.normal(size=p)) + rng.normal(size=m)
    rows = LinearizedModel(
        torch.from_numpy(gradients), targets, np.arange(m) % groups, np.ones(m, dtype=bool)
    )
    return rows, gradients


def fitted(posterior: SubspacePosterior, rows: LinearizedModel, s: float, t: float) -> SubspacePosterior:
    posterior.fit(ClosedFormData(rows, prior_scale=s, temperature=t))
    return posterior


def covariance(posterior: SubspacePosterior) -> np.ndarray:
    """Of w / rms, from the stored factors."""
    half = (posterior.scale.T @ posterior.directions).numpy()
    return half.T @ half


@pytest.mark.parametrize("t", [1.0, 7.0])
def test_exact_posterior_on_the_data_when_rank_is_full(t: float) -> None:
    rows, x = problem(m=10)
    s = 0.4
    posterior = fitted(make(rank=10), rows, s, t)
    exact = np.linalg.inv(np.eye(P) / s**2 + x.T @ x / t)
    # V is stored in half precision (11 bits): the predictive covariance is exact to that
    ours, want = x @ covariance(posterior) @ x.T, x @ exact @ x.T
    np.testing.assert_allclose(ours, want, rtol=0, atol=2e-3 * np.abs(want).max())


def test_the_rest_of_the_space_has_no_noise() -> None:
    rows, x = problem(m=10)
    posterior = fitted(make(rank=10), rows, 0.4, 1.0)
    null = np.linalg.svd(x)[2][10:]
    assert np.abs(null @ covariance(posterior) @ null.T).max() < 1e-6


def lost_std(basis: np.ndarray, x: np.ndarray, sigma: np.ndarray) -> float:
    """Sum over outputs of lost variance over std, for noise along the rows of ``basis`` alone."""
    total = np.einsum("ip,pq,iq->i", x, sigma, x)
    root = np.linalg.cholesky(sigma)
    q = np.linalg.qr((basis @ np.linalg.inv(root).T).T)[0]  # in whitened weights projection is orthogonal
    kept = np.square(x @ root @ q).sum(axis=1)
    return float(((total - kept) / np.sqrt(total)).sum())


def test_truncation_loses_least_of_the_stds() -> None:
    """Against random directions of the row space, and those that lose least of the variances."""
    rows, x = problem(m=10)
    x[:5] *= 30.0  # five outputs with a wide spread
    rows = replace(
        rows, gradients=torch.from_numpy(x), targets=np.where(np.arange(10) < 5, np.nan, rows.targets)
    )
    posterior = fitted(make(rank=4), rows, 0.4, 1.0)
    sigma = np.linalg.inv(np.eye(P) / 0.4**2 + x[5:].T @ x[5:])
    ours = lost_std(posterior.directions.numpy(), x, sigma)
    vectors = np.linalg.eigh(x @ sigma @ x.T)[1][:, -4:]
    assert ours < lost_std((sigma @ x.T @ vectors).T, x, sigma)
    rng = np.random.default_rng(1)
    for _ in range(50):
        assert ours < lost_std(rng.normal(size=(4, 10)) @ x @ sigma, x, sigma)


@given(n=st.integers(1, 6), seed=st.integers(0, 1000))
def test_geometric_mean_of_matrices(n: int, seed: int) -> None:
    """The positive definite solution X of X A^-1 X = B; of commuting ones sqrt(A B)."""
    rng = np.random.default_rng(seed)
    a, b = (m @ m.T + 0.1 * np.eye(n) for m in rng.normal(size=(2, n, n)))
    x = geometric_mean(a, b)
    np.testing.assert_allclose(x @ np.linalg.solve(a, x), b, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(x, geometric_mean(b, a), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(geometric_mean(a, a), a, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(geometric_mean(a, 4.0 * a), 2.0 * a, rtol=1e-9, atol=1e-10)


def test_context_rows_widen_the_space_but_do_not_narrow_the_posterior() -> None:
    rows, x = problem(m=6)
    extra = np.random.default_rng(5).normal(size=(5, P))
    both = LinearizedModel(
        torch.from_numpy(np.concatenate([x, extra])),
        np.concatenate([rows.targets, np.full(5, np.nan)]),
        np.concatenate([rows.groups, np.full(5, 9)]),
        np.ones(11, dtype=bool),
    )
    s = 0.4
    posterior = fitted(make(rank=11), both, s, 1.0)
    exact = np.linalg.inv(np.eye(P) / s**2 + x.T @ x)  # context frames have no labels
    want = np.einsum("ip,pq,iq->i", extra, exact, extra)
    ours = np.einsum("ip,pq,iq->i", extra, covariance(posterior), extra)
    np.testing.assert_allclose(ours, want, rtol=5e-3)


def test_samples_have_the_stated_covariance() -> None:
    rows, _ = problem(m=10)
    posterior = fitted(make(rank=6), rows, 0.4, 1.0)
    n = 40_000
    latent = posterior.latent([("test", k) for k in range(n)], torch.float64)
    w = posterior.sample(latent)["layer"].numpy() / RMS
    want = covariance(posterior)
    # standard error of a covariance of n normal samples: sqrt((C_ii C_jj + C_ij^2) / n)
    error = np.sqrt((np.outer(want.diagonal(), want.diagonal()) + want**2) / n)
    assert (np.abs(w.T @ w / n - want) < 5.5 * error).all()


def test_std_is_the_marginal_of_the_covariance() -> None:
    rows, _ = problem(m=10)
    posterior = fitted(make(rank=6), rows, 0.4, 1.0)
    np.testing.assert_allclose(
        posterior.std()["layer"].numpy() / RMS, np.sqrt(covariance(posterior).diagonal()), rtol=1e-12
    )


@given(st.integers(1, 8), st.floats(0.05, 2.0), st.integers(0, 1000))
def test_kl_against_torch(rank: int, s: float, seed: int) -> None:
    posterior = make(rank=rank)
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rank, rank))
    posterior.set_covariance(a @ a.T, s, 1.0)
    q = torch.distributions.MultivariateNormal(
        torch.zeros(rank).double(), posterior.scale @ posterior.scale.T
    )
    p = torch.distributions.MultivariateNormal(
        torch.zeros(rank).double(), s**2 * torch.eye(rank, dtype=torch.float64)
    )
    torch.testing.assert_close(posterior.kl(), torch.distributions.kl_divergence(q, p), rtol=1e-8, atol=1e-9)


def test_covariance_is_where_the_elbo_is_stationary() -> None:
    """d/dS of -E_q[log p] + T KL vanishes at equation (1), for a linear model."""
    rng = np.random.default_rng(3)
    a = rng.normal(size=(5, 5))
    h, s, t = a @ a.T, 0.7, 3.0
    posterior = make(rank=5)
    posterior.set_covariance(h, s, t)
    factor = posterior.scale.clone().requires_grad_(True)
    spread = factor @ factor.T
    expected_nll = 0.5 * (torch.from_numpy(h) * spread).sum()  # + terms without S
    kl = 0.5 * (spread.trace() / s**2 - torch.logdet(spread))
    (gradient,) = torch.autograd.grad(expected_nll + t * kl, factor)
    assert gradient.abs().max() < 1e-10


def test_left_out_groups_against_explicit_regression() -> None:
    rows, x = problem(m=12)
    s, t = 0.5, 2.0
    table = left_out_nll(x @ x.T, rows.targets, rows.groups, rows.scored, scales=[s], temperature=t)
    scores = []
    for g in np.unique(rows.groups):
        out = rows.groups == g
        sigma = np.linalg.inv(np.eye(P) / s**2 + x[~out].T @ x[~out] / t)
        mean = sigma @ x[~out].T @ rows.targets[~out] / t
        variance = np.einsum("ip,pq,iq->i", x[out], sigma, x[out]) + t
        error = rows.targets[out] - x[out] @ mean
        scores.append(np.mean(0.5 * np.log(2 * np.pi * variance) + 0.5 * error**2 / variance))
    np.testing.assert_allclose(table[s], scores, rtol=1e-9)


def test_left_out_rule_finds_the_true_scale() -> None:
    """Weights drawn with std 0.4 and noise of variance 1: averaged over data sets, 0.4 wins."""
    grid = [0.05, 0.15, 0.4, 1.2, 4.0]
    totals = np.zeros(len(grid))
    for seed in range(20):
        rows, x = problem(m=30, seed=seed, groups=5)
        table = left_out_nll(x @ x.T, rows.targets, rows.groups, rows.scored, scales=grid)
        totals += [table[s].mean() for s in grid]
    assert grid[int(totals.argmin())] == 0.4


def test_widest_scale_that_is_as_good() -> None:
    flat = {0.1: np.array([3.0, 1.0, 2.0]), 0.3: np.array([1.0, 1.0, 1.0]), 1.0: np.array([1.2, 0.9, 1.0])}
    assert widest_as_good(flat | {3.0: np.array([1.5, 1.6, 1.4])}) == 1.0  # lost by every group
    assert widest_as_good(flat | {3.0: np.array([1.5, 0.5, 1.4])}) == 3.0  # the groups disagree
    assert widest_as_good({0.3: flat[0.3], 1.0: flat[0.3] + 0.01}) == 0.3  # no doubt about the sign


def test_one_group_cannot_be_left_out() -> None:
    rows, x = problem(m=6, groups=1)
    with pytest.raises(ValueError, match="two groups"):
        left_out_nll(x @ x.T, rows.targets, rows.groups, rows.scored, scales=[1.0])


def test_no_noise_before_the_first_fit() -> None:
    posterior = make(rank=3)
    assert not posterior.ready
    sampled = posterior.sample(posterior.latent([("a",)], torch.float64))["layer"]
    assert torch.equal(sampled, torch.zeros_like(sampled))


def test_gram_matrix_of_float32_rows_keeps_small_eigenvalues() -> None:
    """Blocks summed in float64: eigenvalues far below float32 resolution of the largest survive."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(40_000, 4)))[0].T
    rows = torch.from_numpy((np.diag([1e2, 1.0, 1e-1, 3e-2]) @ q).astype(np.float32))
    values = np.sqrt(np.linalg.eigvalsh(gram_matrix(rows))[::-1])
    np.testing.assert_allclose(values, [1e2, 1.0, 1e-1, 3e-2], rtol=0.05)


@given(m=st.integers(1, 6), p=st.integers(1, 8), scale=st.floats(0.05, 20), seed=st.integers(0, 1000))
def test_gauss_newton_steps_are_the_damped_least_squares_solutions(m, p, scale, seed):
    rng = np.random.default_rng(seed)
    g, e = rng.normal(size=(m, p)), rng.normal(size=m)
    steps = rows_of(g, e).steps([scale, 2 * scale])
    for step, s in zip(steps, [scale, 2 * scale], strict=True):
        expected = np.linalg.solve(g.T @ g + np.eye(p) / s**2, g.T @ e)
        np.testing.assert_allclose(step.numpy(), expected, rtol=1e-7, atol=1e-10)


def test_gauss_newton_step_solves_a_linear_model_in_one_step():
    rng = np.random.default_rng(0)
    g, w = rng.normal(size=(5, 9)), rng.normal(size=9)
    (step,) = rows_of(g, g @ w).steps([1e6])
    np.testing.assert_allclose(g @ step.numpy(), g @ w, atol=1e-8)


def rows_of(g, errors):
    """LinearizedModel of labelled outputs, and one without a label in front, which counts nowhere."""
    everything = torch.from_numpy(np.vstack([np.ones_like(g[:1]), g]))
    known = np.concatenate([[np.nan], errors])
    return LinearizedModel(everything, known, np.full(len(known), ""), np.ones(len(known), bool), known)
