"""Covariances of few draws, moved towards round ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.linalg import expm, logm
from scipy.special import digamma

from blip_ft.uncertainty.shrinkage import by_chance, shrunk

ROUND = np.diag([1.0, 1.0, 1.0])
LONG = np.diag([9.0, 1.0, 0.25])
VERY_LONG = np.diag([1.0, 0.03, 0.001])
LINE = np.diag([1.0, 0.0, 0.0])
PLANE = np.diag([2.0, 1.0, 0.0])


def samples(true, n_draws, n_atoms, seed=0):
    """(n_atoms, 3, 3) sample covariances of normal draws of known mean."""
    root = np.sqrt(true)
    z = np.random.default_rng(seed).normal(size=(n_atoms, n_draws, 3)) @ root
    return torch.from_numpy(np.einsum("akc,akd->acd", z, z) / n_draws)


def rotation(seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return torch.from_numpy(q * np.sign(np.diag(r)))


def by_formula(s, n):
    """Equation 3, written with a matrix logarithm."""
    trace = np.trace(s)
    apart = 3 * np.log(trace / 3) - np.linalg.slogdet(s)[1]
    chance = 3 * (digamma(1.5 * n) - np.log(3)) - sum(digamma((n - i) / 2) for i in range(3))
    rho = min(1.0, chance / (2 * apart))
    out = expm((1 - rho) * logm(s))
    return out * trace / np.trace(out)


@pytest.mark.parametrize("n", [3, 8, 64])
@pytest.mark.parametrize("true", [ROUND, LONG], ids=["round", "long"])
def test_is_the_stated_formula(true, n):
    found = samples(true, n, 50)
    expected = np.stack([by_formula(s.numpy(), n) for s in found])
    np.testing.assert_allclose(shrunk(found, n), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n", [3, 8, 64])
def test_what_a_round_covariance_shows_by_chance(n):
    found = samples(ROUND, n, 20000)
    apart = 3 * (found.diagonal(dim1=1, dim2=2).sum(1) / 3).log() - torch.linalg.slogdet(found)[1]
    assert abs(apart.mean() - by_chance(n)) < 4 * apart.std() / len(apart) ** 0.5


def loss(covariances, true):
    """Stein's loss of every covariance, twice KL(N(0, true) || N(0, covariance)), without its long tail."""
    ratio = torch.linalg.solve(covariances, torch.from_numpy(true).expand_as(covariances))
    return (ratio.diagonal(dim1=1, dim2=2).sum(1) - 3 - torch.linalg.slogdet(ratio)[1]).clamp_max(30)


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("true", [ROUND, LONG, VERY_LONG], ids=["round", "long", "very long"])
def test_is_nearer_to_the_truth_than_the_sample(true, n):
    found = samples(true, n, 4000)
    gain = loss(found, true) - loss(shrunk(found, n), true)
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


def test_many_draws_are_left_alone():
    found = samples(LONG, 4000, 20)
    torch.testing.assert_close(shrunk(found, 4000), found, rtol=0, atol=0.02)


def test_two_draws_say_nothing_about_roundness():
    found = samples(LONG, 2, 20)
    assert shrunk(found, 2) is found


@pytest.mark.parametrize(("true", "rank"), [(LINE, 1), (PLANE, 2)], ids=["line", "plane"])
def test_zeros_of_symmetry_stay(true, rank):
    turn = rotation(3)
    found = turn @ samples(true, 8, 100) @ turn.T
    after = turn.T @ shrunk(found, 8) @ turn
    assert after[:, rank:, rank:].abs().max() < 1e-12
    scatter = (after - turn.T @ found @ turn).abs().max()
    assert scatter < 0.1 * found.abs().max()


@given(
    draws=arrays(np.float64, (3, 5, 3), elements=st.floats(-1e3, 1e3, width=32)),
    seed=st.integers(0, 9),
)
def test_keeps_the_trace_and_turns_with_the_frame(draws, seed):
    found = torch.einsum("akc,akd->acd", *2 * [torch.from_numpy(draws)]) / 5
    after = shrunk(found, 5)
    traces = found.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(after.diagonal(dim1=1, dim2=2).sum(1), traces, rtol=1e-9, atol=1e-300)
    size = float(found.abs().max())
    assert torch.linalg.eigvalsh(after).min() >= -1e-9 * size
    turn = rotation(seed)
    turned = shrunk(turn @ found @ turn.T, 5)
    torch.testing.assert_close(turned, turn @ after @ turn.T, rtol=0, atol=1e-8 * size + 1e-300)


def test_no_draws_and_broken_ones():
    found = samples(LONG, 8, 3)
    found[1] = torch.nan
    found[2] = 0
    after = shrunk(found, 8)
    assert after[1].isnan().all()
    assert (after[2] == 0).all()
    torch.testing.assert_close(after[:1], shrunk(found[:1], 8))
    assert shrunk(found[:0], 8).shape == (0, 3, 3)
