"""Derivatives, sums of copies, permutations, dynamics, energy references and precision."""

import numpy as np
import pytest
import torch
from ase import units
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.md.verlet import VelocityVerlet

from blip_ft.testing.fake import FakeBackbone

from .around_fake import MODES, batch_of, evaluate, make, same, structures


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
