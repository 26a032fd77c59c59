"""The pathwise posterior where its law is known: linear models, and curvature that pairs have to cancel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from blip_ft.backbones.protocol import Batch
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError
from blip_ft.families.base.linear import (
    PRIOR_SCALES,
    ClosedFormData,
    LinearizedModel,
    widest_as_good,
)
from blip_ft.families.base.spectrum import left_out_nll
from blip_ft.families.pathwise.posterior import PathwisePosterior
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.draws import evaluate_draws, moments_of_draws
from blip_ft.uncertainty.jacobian import all_components, output_gradients
from blip_ft.uncertainty.linearized import predict_linearized
from blip_ft.uncertainty.predict import predict_batch
from blip_ft.variational import Block, PretrainedPrior, Site

DOUBLE = torch.float64
P, RMS = 24, 1.7


def make(rank: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> PathwisePosterior:
    sites = {
        "a": Site("a", (14,), (Block(0, (14, 1), output_axis=1),)),
        "b": Site("b", (2, 5), (Block(0, (2, 5), output_axis=0),)),
    }
    weights = {n: torch.full(s.shape, RMS, dtype=dtype) for n, s in sites.items()}
    prior = PretrainedPrior(sites, weights, 0.3)
    return PathwisePosterior(list(sites.values()), prior, 0.01, rank=rank, seed=seed)


def problem(m: int, seed: int = 0, context: int = 0) -> tuple[LinearizedModel, np.ndarray]:
    """m labels that are linear in P weights; rows over their noise, and rows without a label."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m + context, P)) * 10.0 ** rng.uniform(-1, 1, (m + context, 1))
    y = x @ (0.4 * rng.normal(size=P)) + rng.normal(size=m + context)
    y[m:] = np.nan
    return LinearizedModel(
        torch.from_numpy(x), y, np.arange(m + context) % 3, np.ones(m + context, dtype=bool)
    ), x[:m]


def exact(x: np.ndarray, s: float, t: float) -> np.ndarray:
    return RMS**2 * np.linalg.inv(np.eye(P) / s**2 + x.T @ x / t)


def covariance(posterior: PathwisePosterior) -> np.ndarray:
    """Of the weights, from what ``sample`` does to unit vectors."""
    unit = torch.eye(posterior.rank, dtype=posterior.prior_std.dtype)
    flat = torch.cat([w.flatten(1) for w in posterior.sample(unit).values()], dim=1).double()
    return (flat.T @ flat).numpy()


@given(
    m=st.integers(1, 40),
    s=st.floats(0.05, 2.0),
    t=st.sampled_from([1.0, 7.0]),
    seed=st.integers(0, 1000),
    context=st.integers(0, 3),
)
def test_samples_of_the_exact_posterior_of_a_linear_model(
    m: int, s: float, t: float, seed: int, context: int
) -> None:
    """r samples estimate every entry with the error of a Wishart matrix, fewer labels than weights or more."""
    r = 2000
    rows, x = problem(m, seed, context)
    posterior = make(r)
    posterior.fit(ClosedFormData(rows, prior_scale=s, temperature=t))
    want = exact(x, s, t)
    error = np.sqrt((np.outer(want.diagonal(), want.diagonal()) + want**2) / r)
    assert (np.abs(covariance(posterior) - want) < 5.5 * error).all()


@pytest.mark.parametrize("m", [9, 30, 60])
def test_samples_are_the_plain_formula(m: int) -> None:
    """Equation (1) of the module with a solve of its own, in the space of outputs and in that of weights."""
    rows, x = problem(m)
    posterior = make(6)
    posterior.fit(ClosedFormData(rows, prior_scale=0.4, temperature=2.0))
    eps = torch.stack([posterior._normal("prior", k, P) for k in range(6)]).double().numpy()
    xi = torch.stack([posterior._normal("labels", k, m) for k in range(6)]).double().numpy()
    wrong = 0.4 * eps @ x.T + math.sqrt(2.0) * xi
    want = 0.4 * eps - 0.16 * np.linalg.solve(0.16 * x @ x.T + 2.0 * np.eye(m), wrong.T).T @ x
    np.testing.assert_allclose(posterior.directions.numpy() * math.sqrt(6), want, rtol=1e-8, atol=1e-12)


def test_outputs_that_the_labels_fix_survive_single_precision() -> None:
    """A label known a thousand times better than the prior: its std is a small difference."""
    rows, x = problem(8)
    x *= 1e3 / np.linalg.norm(x, axis=1, keepdims=True)
    rows.gradients = torch.from_numpy(x).float()
    posterior = make(4000, torch.float32)
    posterior.fit(ClosedFormData(rows, prior_scale=1.0))
    g = torch.from_numpy(x).float() / RMS
    parts = {"a": g[:, :14].reshape(-1, 14), "b": g[:, 14:].reshape(-1, 2, 5)}
    want = np.einsum("ip,pq,iq->i", x / RMS, exact(x, 1.0, 1.0), x / RMS)
    np.testing.assert_allclose(posterior.linear_variance(parts).double().numpy(), want, rtol=0.1)


def test_variance_and_std_are_those_of_the_samples() -> None:
    posterior = make(7)
    posterior.fit(ClosedFormData(problem(8)[0], prior_scale=0.4, temperature=2.0))
    g = torch.randn(5, P, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    parts = {"a": g[:, :14].reshape(-1, 14), "b": g[:, 14:].reshape(-1, 2, 5)}
    want = covariance(posterior)
    np.testing.assert_allclose(
        posterior.linear_variance(parts).numpy(),
        np.einsum("ip,pq,iq->i", g.numpy(), want, g.numpy()),
        rtol=1e-10,
    )
    std = torch.cat([v.flatten() for v in posterior.std().values()]).numpy()
    np.testing.assert_allclose(std, np.sqrt(want.diagonal()), rtol=1e-9)


@pytest.mark.parametrize("m", [3, 40])
def test_kl_against_torch(m: int) -> None:
    """Of the exact covariance, however few samples there are."""
    rows, x = problem(m)
    posterior = make(2)
    posterior.fit(ClosedFormData(rows, prior_scale=0.4))
    q = MultivariateNormal(torch.zeros(P, dtype=DOUBLE), torch.from_numpy(exact(x, 0.4, 1.0)))
    p = MultivariateNormal(torch.zeros(P, dtype=DOUBLE), (0.4 * RMS) ** 2 * torch.eye(P, dtype=DOUBLE))
    torch.testing.assert_close(posterior.kl(), kl_divergence(q, p), rtol=1e-8, atol=1e-8)


def test_scale_by_the_left_out_rule_and_a_seed_of_its_own() -> None:
    rows, x = problem(30, context=4)
    posterior = make(3)
    report = posterior.fit(ClosedFormData(rows))
    known = rows.is_train
    table = left_out_nll(
        x @ x.T, rows.targets[known], rows.groups[known], rows.scored[known], scales=PRIOR_SCALES
    )
    assert report["prior_scale"] == widest_as_good(table)
    mu = report["prior_scale"] ** 2 * np.linalg.eigvalsh(x @ x.T)[-P:]
    assert report["effective_parameters"] == pytest.approx(float((mu / (1 + mu)).sum()))
    again, other = make(3), make(3, seed=1)
    again.fit(ClosedFormData(rows))
    other.fit(ClosedFormData(rows))
    assert torch.equal(again.directions, posterior.directions)
    assert not torch.allclose(other.directions, posterior.directions)


def crystal_of(potential: BayesianPotential) -> Batch:
    crystal = bulk("SiO", "rocksalt", 4.6) * (2, 1, 1)
    crystal.rattle(0.1, seed=1)
    return potential.backbone.batch([crystal])


def fitted_potential(
    width: float = 0.4, amplitude: float = 0.03, noise: float | None = None
) -> BayesianPotential:
    """Noise on all weights of the fake backbone, known by what labels say.

    Args:
        width: s.
        amplitude: of the draws.
        noise: of labels of the crystal's energy and forces; by default twelve labels are of anything.
    """
    potential = BayesianPotential(
        FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(family="pathwise", rank=24),
        n_draws=8,
    )
    if noise is None:
        rows = torch.randn(12, 472, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    else:
        batch = crystal_of(potential)
        rows = torch.cat([g for _, g in output_gradients(potential, batch, all_components(batch))]) / noise
    nothing = np.zeros(len(rows))
    data = LinearizedModel(rows, nothing, np.arange(len(rows)) % 3, nothing == 0)
    potential.posterior.fit(ClosedFormData(data, prior_scale=width))
    potential.amplitude = amplitude
    return potential


def test_draws_come_in_pairs() -> None:
    potential = fitted_potential()
    latents = potential.draw_latents(6)
    assert torch.equal(latents[::2], -latents[1::2])
    assert not torch.allclose(latents[0], latents[2])
    assert torch.equal(potential.draw_latents(4), latents[:4]), "more draws add pairs to the same ones"
    with pytest.raises(BlipError, match="pairs") as caught:
        potential.draw_latents(7)
    assert caught.value.field == "n_draws"


def test_pairs_cancel_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where labels leave little, pairs have the spread of the linearised model; one-sided draws, and centred
    ones, do not.
    """
    potential = fitted_potential(width=0.7, noise=1e-3)
    batch = crystal_of(potential)
    n = 2 * potential.posterior.latent_numel
    # every unit vector, and its negative, times sqrt(r): the exact covariance, and centred too
    unit = math.sqrt(n / 2) * torch.eye(n // 2, dtype=DOUBLE)
    latents = torch.stack([unit, -unit], dim=1).flatten(0, 1)
    potential._draws = (n, potential.seed, potential.backbone.dtype), latents
    exact_ = predict_linearized(potential, batch, method="linear")
    pairs = moments_of_draws(potential, batch, n, stress=False)
    torch.testing.assert_close(pairs.energy_std, exact_.energy_std, rtol=0.1, atol=0)
    torch.testing.assert_close(pairs.forces_std, exact_.forces_std, rtol=0.05, atol=0)

    monkeypatch.setattr(PathwisePosterior, "paired", False)
    centred = moments_of_draws(potential, batch, n, stress=False)
    mean = predict_batch(potential, batch, n_draws=0).mean
    one_sided = evaluate_draws(potential, batch, n, stress=False)[::2]

    def spread(field: str) -> torch.Tensor:
        off = torch.stack([getattr(draw, field) - getattr(mean, field) for draw in one_sided])
        return off.square().mean(dim=0).sqrt() / potential.amplitude

    for energy, forces in ((centred.energy_std, centred.forces_std), (spread("energy"), spread("forces"))):
        assert (energy / exact_.energy_std).min() > 3
        assert (forces / exact_.forces_std).mean() > 1.7


def test_mean_and_energy_std_are_not_those_of_the_pairs() -> None:
    """Curvature shifts the mean of a pair: reported are the mean weights, and the std of their gradient."""
    potential = fitted_potential(width=0.7, noise=1e-3)
    batch = crystal_of(potential)
    reported, pairs = (
        predict_batch(potential, batch, n_draws=8),
        moments_of_draws(potential, batch, 8, stress=True),
    )
    mean, exact_ = predict_batch(potential, batch, n_draws=0).mean, predict_linearized(potential, batch)
    for name in ("energy", "forces", "stress", "node_energy"):
        assert torch.equal(getattr(reported.mean, name), getattr(mean, name))
        assert not torch.allclose(getattr(pairs.mean, name), getattr(mean, name), rtol=1e-6, atol=1e-9)
    assert torch.equal(reported.energy_std, exact_.energy_std)
    assert not torch.allclose(pairs.energy_std, exact_.energy_std, rtol=1e-3)


def test_narrower_pairs_agree_better() -> None:
    """What is left is of third order: nine times smaller at a third of the width."""
    crystal = bulk("SiO", "rocksalt", 4.6)
    crystal.rattle(0.1, seed=1)
    spreads = []
    for amplitude in (1e-3, 0.03, 0.09):
        potential = fitted_potential(amplitude=amplitude)
        spreads.append(predict_batch(potential, potential.backbone.batch([crystal])).forces_cov)
    near, far = ((s - spreads[0]).abs().max() for s in spreads[1:])
    assert near < 0.2 * far
