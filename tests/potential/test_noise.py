"""Draws, and the noise modes: what they depend on and what they leave alone."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.predict import predict_batch
from blip_ft.variational.noise import Noise

from .around_fake import batch_of, evaluate, make, same, structures


class TestDraws:
    @pytest.mark.parametrize("n", [2, 3, 16])
    def test_latent_numbers_are_centred_and_normal(self, n):
        z = make().draw_latents(n)
        assert z.shape == (n, 472)
        assert z.mean(dim=0).abs().max() < 1e-15
        # each draw is standard normal by itself; the mean square has the expectation 1
        assert all(kstest(row.numpy(), "norm").pvalue > 1e-3 for row in z)
        assert abs(z.square().mean() - 1) < 5 * (2 / (472 * (n - 1))) ** 0.5
        # any two of them correlate by -1/(n-1), as they must if all sum to zero
        cross = (z @ z.T / 472)[~torch.eye(n, dtype=torch.bool)]
        assert (cross + 1 / (n - 1)).abs().max() < 5 / 472**0.5

    def test_a_function_of_seed_and_number_of_draws(self):
        z = make(seed=3).draw_latents(4)
        potential = make(seed=3)
        potential.draw_latents(7)
        assert torch.equal(potential.draw_latents(4), z)
        assert not torch.isclose(make(seed=4).draw_latents(4), z).any()

    def test_draws_differ_and_are_reproducible(self):
        potential = make()
        first = [evaluate(potential, structures(), draw=k) for k in range(4)]
        again = [evaluate(make(), structures(), draw=k) for k in range(4)]
        for k in range(4):
            same(first[k], again[k])
            assert not torch.isclose(first[k].energy, first[k - 1].energy).any()

    @pytest.mark.parametrize("n", [1, -2])
    def test_one_draw_has_no_spread(self, n):
        with pytest.raises(BlipError, match="no spread"):
            make().draw_latents(n)

    def test_mean_over_draws_is_the_mean_model_where_outputs_are_linear(self):
        """Noise in the last layer only: energy, forces and stress are linear in it."""
        potential = make(noise=r"readout\.2", init_std=0.3)
        batch = batch_of(potential, structures())
        moments = predict_batch(potential, batch, n_draws=5)
        off = predict_batch(potential, batch, n_draws=0)
        same(moments.mean, off.mean, 1e-12)
        assert moments.energy_std.min() > 0.01
        # with noise everywhere it is not
        everywhere = make(init_std=0.3)
        off, moments = (predict_batch(everywhere, batch, n_draws=n) for n in (0, 5))
        assert (moments.mean.energy - off.mean.energy).abs().max() > 1e-3

    @pytest.mark.parametrize("family", ["weight", "channel", "subspace"])
    def test_spread_is_unbiased(self, family):
        """Linear outputs: variance = sum_k (dE/dw . w_k)^2 over unit latent vectors k, on average."""
        potential = make(family=family, noise=r"readout\.2", init_std=0.3)
        batch = batch_of(potential, [molecule("H2O"), Atoms("Si")])
        delta = potential.converted.deltas["readout.2"]
        unit = torch.eye(potential.posterior.latent_numel, dtype=torch.float64)
        columns = potential.posterior.sample(unit)["readout.2"].detach()  # (latent, 1, 16)
        energy = potential(batch).energy
        gradients = [torch.autograd.grad(e, delta, retain_graph=True)[0] for e in energy]
        exact = torch.stack([(columns * g).sum(dim=(1, 2)).square().sum() for g in gradients])
        variances = []
        for seed in range(60):
            potential.seed, potential._draws = seed, None
            variances.append(predict_batch(potential, batch, n_draws=3, stress=False).energy_std.square())
        ratio = torch.stack(variances) / exact
        assert ((ratio.mean(dim=0) - 1).abs() < 3 * ratio.std(dim=0) / 60**0.5).all()
        assert (ratio.std(dim=0) / 60**0.5 < 0.16).all()  # so that a divisor n - 1 (factor 1.5) would show


class TestModes:
    def test_untrained_and_off_is_the_stock_model_bit_for_bit(self):
        backbone = FakeBackbone()
        calculator = backbone.stock_calculator()
        potential = make(moved=False, backbone=backbone)
        for atoms in structures():
            out = evaluate(potential, [atoms], "off")
            calculator.calculate(atoms)
            assert out.energy.item() == calculator.results["energy"]
            assert np.array_equal(out.forces.numpy(force=True), calculator.results["forces"])
            assert np.array_equal(
                out.stress[0].numpy(force=True), calculator.results["stress"], equal_nan=True
            )

    @pytest.mark.parametrize("mode", ["local", "structure", "draw"])
    @pytest.mark.parametrize("family", ["weight", "channel"])
    def test_without_spread_every_mode_is_off(self, mode, family):
        """Bit for bit, but where every structure has a product of its own, which rounds by itself."""
        potential = make(family=family)
        with torch.no_grad():
            for p in potential.posterior.parameters():
                p.fill_(-torch.inf)
        rounding = 1e-14 if mode == "structure" else 0.0
        same(evaluate(potential, structures(), mode), evaluate(potential, structures(), "off"), rounding)

    @pytest.mark.parametrize("mode", ["local", "structure", "draw"])
    def test_no_noisy_module(self, mode):
        potential = make(noise="none")
        same(evaluate(potential, structures(), mode), evaluate(potential, structures(), "off"))
        assert potential.posterior.kl() == 0

    @pytest.mark.parametrize("mode", ["structure", "draw"])
    def test_a_subspace_that_was_never_fitted_has_no_noise(self, mode):
        potential = BayesianPotential(
            FakeBackbone(),
            ModelConfig(adapter="fake", checkpoint="tiny"),
            PosteriorConfig(family="subspace"),
        )
        same(evaluate(potential, structures(), mode), evaluate(potential, structures(), "off"))
        assert predict_batch(potential, batch_of(potential, structures())).energy_std is None

    @pytest.mark.parametrize("mode", ["local", "structure"])
    def test_epoch_and_seed_and_key_change_the_noise(self, mode):
        potential = make()
        first = evaluate(potential, structures(), mode).energy
        others = [
            evaluate(potential, structures(), mode, epoch=1),
            evaluate(make(seed=1), structures(), mode),
            evaluate(potential, structures(), mode, keys=[5, 6, 7, 8]),
        ]
        for other in others:
            assert ((other.energy - first).abs() > 1e-6).all()
        assert torch.equal(evaluate(potential, structures(), mode).energy, first)

    @settings(max_examples=10)
    @given(
        order=st.permutations(range(4)),
        kind=st.sampled_from([("weight", "local"), ("weight", "structure"), ("subspace", "structure")]),
    )
    def test_noise_belongs_to_the_structure_whatever_the_batch(self, order, kind):
        family, mode = kind
        potential, atoms = make(family=family), structures()
        together = evaluate(potential, atoms, mode, keys=[10, 11, 12, 13])
        forces = together.forces.split([len(a) for a in atoms])
        shuffled = evaluate(potential, [atoms[i] for i in order], mode, keys=[10 + i for i in order])
        parts = shuffled.forces.split([len(atoms[i]) for i in order])
        for place, i in enumerate(order):
            alone = evaluate(potential, [atoms[i]], mode, keys=[10 + i])
            for energy, force in ((shuffled.energy[place], parts[place]), (alone.energy[0], alone.forces)):
                torch.testing.assert_close(energy, together.energy[i], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(force, forces[i], rtol=1e-11, atol=1e-11)

    def test_structures_have_independent_noise_in_structure_mode(self):
        """The same molecule under many keys: energies are uncorrelated samples."""
        potential = make(init_std=0.02)
        n = 300
        out = evaluate(potential, [molecule("H2O")] * n, "structure", keys=list(range(n)), stress=False)
        off = evaluate(potential, [molecule("H2O")], "off").energy
        z = ((out.energy - off) / (out.energy - off).std()).detach()
        assert abs(torch.corrcoef(torch.stack([z[:-1], z[1:]]))[0, 1]) < 5 / n**0.5
        # and their spread is that of the draws
        draws = predict_batch(potential, batch_of(potential, [molecule("H2O")]), n_draws=100).energy_std
        assert (out.energy.std() / draws).log().abs() < 0.4

    @pytest.mark.parametrize("mode", ["local", "structure"])
    def test_keyed_noise_needs_keys(self, mode):
        potential = make()
        with pytest.raises(ValueError, match=r"set batch\.keys"):
            potential(potential.backbone.batch(structures()), Noise(mode))

    def test_noise_ends_with_the_call(self):
        potential = make()
        evaluate(potential, structures(), "structure")
        assert potential.converted.noise.mode == "off"
        with (
            pytest.raises(RuntimeError),
            potential.perturbed(Noise("draw"), batch_of(potential, structures())),
        ):
            raise RuntimeError
        assert potential.converted.noise.mode == "off"
        assert potential.converted.noise.weights == {}
