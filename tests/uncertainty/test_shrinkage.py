"""Covariances of few draws, moved towards round ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from blip_ft.uncertainty.shrinkage import shrunk

ROUND = np.diag([1.0, 1.0, 1.0])
LONG = np.diag([9.0, 1.0, 0.25])
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
    """Equation 23 of Chen et al. (2010) for a full-rank 3 x 3 matrix."""
    p, square, trace = 3, np.trace(s @ s), np.trace(s)
    rho = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    rho = min(1.0, rho)
    return (1 - rho) * s + rho * trace / p * np.eye(3)


@pytest.mark.parametrize("n", [4, 8, 64])
@pytest.mark.parametrize("true", [ROUND, LONG], ids=["round", "long"])
def test_is_the_published_formula(true, n):
    found = samples(true, n, 50)
    expected = np.stack([by_formula(s.numpy(), n) for s in found])
    np.testing.assert_allclose(shrunk(found, n), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("true", [ROUND, LONG], ids=["round", "long"])
def test_is_nearer_to_the_truth_than_the_sample(true, n):
    found = samples(true, n, 4000)
    truth = torch.from_numpy(true)
    before = (found - truth).square().sum(dim=(1, 2))
    after = (shrunk(found, n) - truth).square().sum(dim=(1, 2))
    gain = before - after
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5


def test_many_draws_are_left_alone():
    found = samples(LONG, 4000, 20)
    torch.testing.assert_close(shrunk(found, 4000), found, rtol=0, atol=0.02)


@pytest.mark.parametrize(("true", "rank"), [(LINE, 1), (PLANE, 2)], ids=["line", "plane"])
def test_zeros_of_symmetry_stay(true, rank):
    turn = rotation(3)
    found = turn @ samples(true, 8, 100) @ turn.T
    after = turn.T @ shrunk(found, 8) @ turn
    assert after[:, rank:, rank:].abs().max() < 1e-12
    if rank == 1:  # nothing to be round in
        torch.testing.assert_close(turn @ after @ turn.T, found, rtol=1e-10, atol=1e-12)
    else:
        assert not torch.allclose(turn @ after @ turn.T, found, rtol=1e-2, atol=1e-3)


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
    values = torch.linalg.eigvalsh(found)
    if ((values / values[:, -1:].clamp_min(1e-300)) - 1e-4).abs().min() > 1e-6:  # rank not in doubt
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
