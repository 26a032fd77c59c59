"""Linearised error bars against finite differences and against the definition."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError
from blip_ft.families.registry import without_foreign_keys
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty import linearized
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.draws import moments_of_draws
from blip_ft.uncertainty.jacobian import output_gradients
from blip_ft.uncertainty.linearized import energy_gradients, predict_linearized, relative_error
from blip_ft.uncertainty.predict import predict_batch

RANK = 12


def make(family="subspace", std=1e-4):
    potential = BayesianPotential(
        FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(
            **without_foreign_keys({"family": family, "prior_scale": 0.3, "init_std": std, "rank": RANK})
        ),
        n_draws=4,
    )
    generator = torch.Generator().manual_seed(2)
    if family == "subspace":
        shape = potential.posterior.directions.shape
        rows = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64).T).Q.T
        potential.posterior.directions.copy_(rows.half())
        # correlated latent numbers of very different widths
        square = np.random.default_rng(0).normal(size=(RANK, RANK))
        potential.posterior.set_covariance(square @ square.T * 10, std, 1.0)
    if family == "pathwise":  # samples of nothing in particular
        shape = potential.posterior.directions.shape
        potential.posterior.directions.copy_(
            std * torch.randn(shape, generator=generator, dtype=torch.float64)
        )
    with torch.no_grad():
        for p in potential.mean_parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    potential.references = {8: -3.0, 14: 7.0}
    return potential


def structures():
    crystal = bulk("SiO", "rocksalt", 4.6) * (2, 1, 1)
    crystal.rattle(0.1, seed=1)
    return [crystal, molecule("CH3OH"), molecule("H2O"), Atoms("Si")]


def batch_of(potential, atoms):
    batch = potential.backbone.batch(atoms)
    batch.keys = list(range(len(atoms)))
    return batch


def derivative(potential, batch, latent):
    """d(energy, forces, stress)/dz along one latent vector, by central differences."""
    out = []
    state = potential.converted.noise
    for sign in (1.0, -1.0):
        state.clear()
        sampled = potential.posterior.sample(sign * latent[None])
        state.mode, state.weights = "draw", {n: w[0] for n, w in sampled.items()}
        out.append(potential.backbone(batch))
        state.clear()
    return [(getattr(out[0], k) - getattr(out[1], k)) / 2 for k in ("energy", "forces", "stress")]


@pytest.mark.parametrize("atoms", [structures(), structures()[:1]], ids=["batch", "one"])
@pytest.mark.parametrize("family", ["pathwise", "subspace", "channel", "weight"])
def test_energy_std_is_that_of_the_gradient(family, atoms):
    potential = make(family)
    batch = batch_of(potential, atoms)
    moments = predict_linearized(potential, batch)
    _, rows = next(iter(output_gradients(potential, batch, [])))
    std = torch.cat([(s / potential.prior.rms(n)).reshape(-1) for n, s in potential.posterior.std().items()])
    if family == "subspace":
        posterior = potential.posterior
        expected = (rows @ posterior.directions.T @ posterior.scale).norm(dim=1)
    elif family == "pathwise":
        expected = (rows @ potential.posterior.directions.T).norm(dim=1)
    else:
        expected = (rows * std).norm(dim=1)
    torch.testing.assert_close(moments.energy_std, expected, rtol=1e-9, atol=1e-15)
    assert moments.forces_cov is None


def test_mean_is_the_mean_model():
    potential = make()
    batch = batch_of(potential, structures())
    moments, mean = (
        predict_linearized(potential, batch, method="linear"),
        predict_batch(potential, batch, n_draws=0),
    )
    for key in ("energy", "forces", "stress", "node_energy"):
        torch.testing.assert_close(
            getattr(moments.mean, key), getattr(mean.mean, key), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("family", ["pathwise", "channel", "weight"])
def test_the_gradient_from_leaves_is_the_same(family):
    potential = make(family)
    batch = batch_of(potential, structures())
    _, taps = energy_gradients(potential, batch)
    leaves = linearized._from_leaves(potential, batch)
    assert taps.keys() == leaves.keys()
    for name in taps:
        torch.testing.assert_close(taps[name], leaves[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["pathwise", "subspace"])
def test_covariance_is_the_sum_over_latent_directions(family):
    potential = make(family)
    batch = batch_of(potential, structures())
    moments = predict_linearized(potential, batch, method="linear")
    columns = [derivative(potential, batch, e) for e in torch.eye(RANK, dtype=torch.float64)]
    energy = sum(e.square() for e, _, _ in columns).sqrt()
    forces = sum(torch.einsum("ni,nj->nij", f, f) for _, f, _ in columns)
    stress = sum(s.square() for _, _, s in columns).sqrt()
    torch.testing.assert_close(moments.energy_std, energy, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(moments.forces_cov, forces, rtol=1e-4, atol=1e-9 * float(forces.max()))
    torch.testing.assert_close(moments.stress_std, stress, rtol=1e-4, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("family", ["pathwise", "subspace"])
def test_draws_agree_where_the_model_is_linear(family):
    potential = make(family, std=1e-5)
    batch = batch_of(potential, structures()[:3])
    exact = predict_linearized(potential, batch, method="linear")
    # 256 draws, or pairs, know a std to 1/sqrt(2 * 256) = 4.4 %
    drawn = moments_of_draws(potential, batch, 512 if family == "pathwise" else 256, stress=True)
    torch.testing.assert_close(drawn.energy_std, exact.energy_std, rtol=0.2, atol=0)
    ratio = drawn.forces_std_norm / exact.forces_std_norm
    assert abs(float(ratio.mean()) - 1) < 0.05
    assert float((ratio - 1).abs().max()) < 0.25


@pytest.mark.parametrize("family", ["pathwise", "subspace"])
def test_covariance_rotates_with_the_structure(family):
    potential = make(family)
    rotation = Rotation.random(random_state=3).as_matrix()
    crystal = structures()[0]
    turned = crystal.copy()
    turned.set_cell(crystal.cell.array @ rotation.T, scale_atoms=True)
    one = predict_linearized(potential, batch_of(potential, [crystal]), method="linear")
    other = predict_linearized(potential, batch_of(potential, [turned]), method="linear")
    r = torch.from_numpy(rotation)
    torch.testing.assert_close(other.forces_cov, r @ one.forces_cov @ r.T, rtol=1e-8, atol=1e-18)
    torch.testing.assert_close(other.energy_std, one.energy_std, rtol=1e-9, atol=0)


@settings(max_examples=8)
@given(k=st.integers(1, RANK), seed=st.integers(0, 2**31))
def test_random_directions_are_unbiased_and_as_exact_as_stated(k, seed):
    rng = np.random.default_rng(seed)
    directions = [linearized._directions(RANK, k, int(s)).numpy() for s in rng.integers(0, 2**62, 400)]
    # a force that one latent direction moves, the worst case: variance is (u . e)^2 summed
    estimates = np.array([(d[:, 0] ** 2).sum() for d in directions])
    assert abs(estimates.mean() - 1) < 5 * max(2 * relative_error(k, RANK), 1e-12) / 20
    if k < RANK:
        assert estimates.std() / 2 == pytest.approx(relative_error(k, RANK), rel=0.35)


def test_fewer_directions_estimate_the_same():
    potential = make()
    batch = batch_of(potential, structures()[:2])
    exact = predict_linearized(potential, batch, method="linear").forces_std_norm
    rough = predict_linearized(potential, batch, method="linear", n_directions=8).forces_std_norm
    assert not torch.equal(rough, exact)
    assert abs(float(rough.square().sum() / exact.square().sum()) - 1) < 4 * relative_error(8, RANK)
    full = predict_linearized(potential, batch, method="linear", n_directions=RANK).forces_std_norm
    torch.testing.assert_close(full, exact)


def test_too_many_latent_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(linearized, "MAX_DIRECTIONS", 100)
    potential = make("weight")
    batch = batch_of(potential, structures()[:2])
    with pytest.raises(BlipError, match="n_directions"):
        predict_linearized(potential, batch, method="linear")
    moments = predict_linearized(potential, batch, method="linear", n_directions=4)
    assert bool((moments.forces_std_norm > 0).all())


@pytest.mark.parametrize("family", ["pathwise", "subspace"])
def test_no_posterior_no_std(family):
    potential = make(family)
    potential.posterior.directions.zero_()
    moments = predict_linearized(potential, batch_of(potential, structures()), method="linear")
    assert moments.energy_std is None
    assert moments.forces_cov is None


@pytest.mark.parametrize("method", ["energy", "linear"])
def test_calculator(method):
    potential = make()
    atoms = structures()[0]
    atoms.calc = BlipCalculator(potential, method=method)
    mean = atoms.copy()
    mean.calc = BlipCalculator(potential, n_draws=0)
    assert atoms.get_potential_energy() == mean.get_potential_energy()
    assert atoms.calc.results["energy_std"] > 0
    assert ("forces_std" in atoms.calc.results) == (method == "linear")
    assert ("stress_std" in atoms.calc.results) == (method == "linear")
