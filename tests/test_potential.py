import math

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError, ConversionError
from blip_ft.fake import FakeBackbone
from blip_ft.potential import BayesianPotential
from blip_ft.uncertainty.predict import predict_batch
from blip_ft.uncertainty.shrinkage import shrunk

MODES = ["off", "local", "structure", "draw"]


def make(
    *,
    family="weight",
    mode="structure",
    prior_scale=0.3,
    init_std=0.05,
    seed=0,
    n_draws=4,
    moved=True,
    backbone=None,
    **model,
):
    """A potential around the fake backbone, with a mean that has left the pretrained weights."""
    potential = BayesianPotential(
        backbone or FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny", **model),
        PosteriorConfig(family=family, mode=mode, prior_scale=prior_scale, init_std=init_std, rank=12),
        seed=seed,
        n_draws=n_draws,
    )
    if family == "subspace":  # as if fitted: orthonormal directions and a covariance
        shape = potential.posterior.directions.shape
        generator = torch.Generator().manual_seed(2)
        rows = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64).T).Q.T
        potential.posterior.directions.copy_(rows.half())
        potential.posterior.set_covariance(np.diag(np.arange(shape[0])), 5 * init_std, 1.0)
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in potential.mean_parameters:
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return potential


def structures():
    """A crystal, two molecules and an atom on its own (no edges)."""
    crystal = bulk("SiO", "rocksalt", 4.6) * (2, 1, 1)
    crystal.rattle(0.1, seed=1)
    return [crystal, molecule("CH3OH"), molecule("H2O"), Atoms("Si")]


def batch_of(potential, atoms, keys=None):
    batch = potential.backbone.batch(atoms)
    batch.keys = [1000 + i for i in range(len(atoms))] if keys is None else keys
    return batch


def evaluate(potential, atoms, mode="draw", keys=None, stress=True, **options):
    return potential(batch_of(potential, atoms, keys), mode=mode, stress=stress, **options)


def same(one, other, tolerance=0.0):
    for a, b in ((one.energy, other.energy), (one.forces, other.forces), (one.stress, other.stress)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


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
    def test_without_spread_every_mode_is_off_bit_for_bit(self, mode, family):
        potential = make(family=family)
        with torch.no_grad():
            for p in potential.posterior.parameters():
                p.fill_(-torch.inf)
        same(evaluate(potential, structures(), mode), evaluate(potential, structures(), "off"))

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

    @settings(deadline=None, max_examples=10)
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
            potential(potential.backbone.batch(structures()), mode=mode)

    def test_noise_ends_with_the_call(self):
        potential = make()
        evaluate(potential, structures(), "structure")
        assert potential.converted.noise.mode == "off"
        with pytest.raises(RuntimeError), potential.noise("draw", batch_of(potential, structures())):
            raise RuntimeError
        assert potential.converted.noise.mode == "off"
        assert potential.converted.noise.weights == {}


class TestPhysics:
    """What holds for an ordinary potential holds for the mean, a draw, and keyed noise."""

    @pytest.mark.parametrize("mode", MODES)
    def test_forces_and_stress_are_derivatives(self, mode):
        potential, atoms = make(init_std=0.1), structures()[0]
        out = evaluate(potential, [atoms], mode)

        def energy(changed):
            return evaluate(potential, [changed], mode, keys=[1000]).energy.item()

        h = 1e-4
        rng = np.random.default_rng(0)
        for _ in range(3):
            direction = rng.normal(size=(len(atoms), 3))
            pair = [atoms.copy(), atoms.copy()]
            for sign, a in zip((1, -1), pair, strict=True):
                a.positions += sign * h * direction
            slope = (energy(pair[0]) - energy(pair[1])) / (2 * h)
            force = float((out.forces * torch.as_tensor(direction)).sum())
            assert slope == pytest.approx(-force, rel=1e-6, abs=1e-8)
        strain = rng.normal(size=(3, 3))
        strain = (strain + strain.T) / 2
        values = []
        for sign in (1, -1):
            a = atoms.copy()
            a.set_cell(a.cell.array @ (np.eye(3) + sign * h * strain), scale_atoms=True)
            values.append(energy(a))
        slope = (values[0] - values[1]) / (2 * h) / atoms.get_volume()
        voigt = strain[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] * [1, 1, 1, 2, 2, 2]
        assert slope == pytest.approx(float(out.stress[0].detach().numpy() @ voigt), rel=1e-6)

    @pytest.mark.parametrize("mode", ["off", "structure", "draw"])
    def test_two_copies_far_apart_are_the_sum(self, mode):
        """Extensive: one weight sample serves the whole structure."""
        potential, one = make(init_std=0.1), molecule("CH3OH")
        both = one.copy()
        shifted = one.copy()
        shifted.positions += [50.0, 0, 0]
        both += shifted
        single, double = (evaluate(potential, [a], mode, keys=[1]) for a in (one, both))
        torch.testing.assert_close(double.energy, 2 * single.energy, rtol=1e-13, atol=0)
        torch.testing.assert_close(double.forces, single.forces.repeat(2, 1), rtol=1e-11, atol=1e-11)

    def test_row_noise_is_another_model(self):
        """In ``local`` mode the two copies have their own noise: the sum does not hold."""
        potential, one = make(init_std=0.1), molecule("CH3OH")
        both = one.copy()
        shifted = one.copy()
        shifted.positions += [50.0, 0, 0]
        both += shifted
        single, double = (evaluate(potential, [a], "local", keys=[1]).energy for a in (one, both))
        assert (double - 2 * single).abs() > 1e-3

    @pytest.mark.parametrize("mode", ["off", "structure", "draw"])
    def test_permutation_of_atoms(self, mode):
        potential, atoms = make(init_std=0.1), structures()[1]
        order = np.random.default_rng(0).permutation(len(atoms))
        one, other = (evaluate(potential, [a], mode, keys=[1]) for a in (atoms, atoms[order]))
        torch.testing.assert_close(other.energy, one.energy, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.forces, one.forces[order], rtol=1e-11, atol=1e-11)

    def test_a_draw_conserves_energy_like_the_base_model(self):
        """120 steps of NVE; the error of the total energy is that of the integrator."""
        backbone = FakeBackbone()
        base = backbone.stock_calculator()
        potential = make(init_std=0.1, backbone=backbone, n_draws=2)

        class OneDraw(Calculator):
            implemented_properties = ["energy", "forces"]

            def calculate(self, atoms=None, properties=None, system_changes=all_changes):
                super().calculate(atoms, properties, system_changes)
                out = evaluate(potential, [self.atoms], "draw", draw=1, stress=False)
                self.results = {"energy": out.energy.item(), "forces": out.forces.detach().numpy()}

        drift, path = {}, {}
        for name, calculator in (("base", base), ("draw", OneDraw())):
            atoms = molecule("CH3OH")
            atoms.calc = calculator
            thermal = np.sqrt(atoms.get_masses()[:, None] * units.kB * 600)
            atoms.set_momenta(thermal * np.random.default_rng(0).normal(size=(len(atoms), 3)))
            md = VelocityVerlet(atoms, timestep=0.5 * units.fs)
            energies, kinetic = [], []
            for _ in md.irun(120):
                energies.append(atoms.get_total_energy())
                kinetic.append(atoms.get_kinetic_energy())
            drift[name], path[name] = np.ptp(energies), np.array(kinetic)
            assert np.ptp(kinetic) > 100 * drift[name]  # it moved
        assert drift["draw"] < 3 * drift["base"]
        assert np.abs(path["draw"] - path["base"]).max() > 0.01  # another potential


class TestReferences:
    references = {14: -400.123456789, 8: -2000.987654321, 1: -13.6, 6: -1030.5}

    def numbers(self, potential):
        return [sum(self.references[z] for z in a.numbers) for a in structures()]

    def test_added_per_element(self):
        potential = make()
        before = evaluate(potential, structures())
        potential.references = dict(self.references)
        after = evaluate(potential, structures())
        expected = torch.tensor(self.numbers(potential), dtype=torch.float64)
        torch.testing.assert_close(
            potential.reference_energy(batch_of(potential, structures())), expected, rtol=1e-15, atol=0
        )
        torch.testing.assert_close(after.energy - before.energy, expected, rtol=1e-12, atol=0)
        assert torch.equal(after.forces, before.forces)
        # per atom too
        sums = [part.sum() for part in after.node_energy.split([len(a) for a in structures()])]
        torch.testing.assert_close(torch.stack(sums), after.energy, rtol=1e-13, atol=0)

    def test_elements_without_one_are_left(self):
        potential = make()
        before = evaluate(potential, structures()).energy
        potential.references = {14: 1.5}
        after = evaluate(potential, structures()).energy
        silicon = torch.tensor([(a.numbers == 14).sum() for a in structures()])
        torch.testing.assert_close(after - before, 1.5 * silicon.double())

    def test_do_not_cost_digits_in_float32(self):
        potential = make().to_dtype("float32")
        small = evaluate(potential, structures()).energy
        potential.references = dict(self.references)
        large = evaluate(potential, structures()).energy
        assert large.dtype == torch.float64
        restored = large - torch.tensor(self.numbers(potential), dtype=torch.float64)
        torch.testing.assert_close(restored, small, rtol=0, atol=1e-10)  # a float32 sum loses 1e-3


class TestPrecision:
    @pytest.mark.parametrize(
        ("family", "mode"), [*(("weight", m) for m in MODES), ("subspace", "structure"), ("subspace", "draw")]
    )
    def test_float32_is_the_same_potential_rounded(self, family, mode):
        exact = evaluate(make(family=family, init_std=0.2), structures(), mode)
        rounded = evaluate(make(family=family, init_std=0.2).to_dtype("float32"), structures(), mode)
        assert rounded.forces.dtype == torch.float32
        torch.testing.assert_close(rounded.energy, exact.energy, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rounded.forces.double(), exact.forces, rtol=1e-4, atol=1e-4)

    def test_there_and_back(self):
        potential = make()
        before = evaluate(potential, structures())
        potential.to_dtype("float32").to_dtype("float64")
        same(evaluate(potential, structures()), before, 1e-4)


class TestTraining:
    @pytest.mark.parametrize("mode", ["local", "structure", "draw"])
    def test_gradient_of_a_force_loss(self, mode):
        """Second derivatives through the whole model, against finite differences."""
        potential = make(init_std=0.2, train="rest")
        parameters = [*potential.mean_parameters, *potential.posterior.parameters()]
        batch = batch_of(potential, structures())

        def loss():
            out = potential(batch, mode=mode, stress=True, create_graph=True)
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

    def test_row_noise_needs_independent_weights(self):
        with pytest.raises(ConversionError, match="independent weights"):
            make(family="subspace", mode="local")


class TestMoments:
    def test_against_a_loop_over_draws(self):
        potential = make(init_std=0.2)
        potential.references = {8: -100.0}
        batch = batch_of(potential, structures())
        draws = [potential(batch, mode="draw", draw=k, stress=True) for k in range(4)]
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
