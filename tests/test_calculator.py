import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError, DataError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration, PropertyCalibration
from blip_ft.potential.distance import FeatureDistance
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.predict import predict_atoms
from blip_ft.uncertainty.shrinkage import shrunk
from blip_ft.variational.noise import Noise

DRAWS = 5


@pytest.fixture(scope="module")
def potential():
    """A trained one, with references but no calibration; tests must not change it."""
    out = BayesianPotential(
        FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(family="weight", prior_scale=0.3, init_std=0.1),
        n_draws=DRAWS,
    )
    with torch.no_grad():
        for i, delta in enumerate(out.mean_parameters):
            delta.fill_(0.01 * (i + 1))
    out.references = {14: -100.0, 8: 3.0, 6: -7.0, 1: 0.5}
    return out


def crystal():
    atoms = bulk("SiO", "rocksalt", 4.6)
    atoms.rattle(0.1, seed=1)
    atoms.set_cell(atoms.cell.array + 0.1 * np.random.default_rng(0).normal(size=(3, 3)), scale_atoms=True)
    return atoms


def methanol():
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=2)
    return atoms


def results(potential, atoms, **options):
    calculator = BlipCalculator(potential, **options)
    calculator.calculate(atoms, ["energy"])
    return calculator.results


def rotated(atoms, rotation):
    out = atoms.copy()
    out.positions = atoms.positions @ rotation.T
    out.cell = atoms.cell.array @ rotation.T
    return out


def random_rotation(seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


class TestResults:
    def test_keys_and_shapes(self, potential):
        found = {k: np.shape(v) for k, v in results(potential, crystal()).items()}
        assert found == {
            "energy": (),
            "free_energy": (),
            "energies": (2,),
            "forces": (2, 3),
            "stress": (6,),
            "energy_std": (),
            "energies_std": (2,),
            "forces_std": (2, 3),
            "forces_std_norm": (2,),
            "forces_cov": (2, 3, 3),
            "stress_std": (6,),
            "std_sampling_error": (),
        }
        assert found.keys() <= set(BlipCalculator(potential).implemented_properties)

    @pytest.mark.parametrize("options", [{}, {"n_draws": 0}, {"method": "energy"}])
    def test_out_of_distribution_score(self, potential, monkeypatch, options):
        """Distance of the features of the same call, whatever the error bars are made of."""
        atoms = crystal()
        assert not {"ood_score", "ood_score_max"} & results(potential, atoms, **options).keys()
        batch = potential.backbone.batch([atoms])
        training = np.random.default_rng(0).normal(size=(40, 8)), np.repeat([8, 14], 20), ["a", "b"] * 20
        distance = FeatureDistance.fit(*training)
        monkeypatch.setattr(potential, "ood", distance)
        found = results(potential, atoms, **options)
        modes = [("draw", k) for k in range(DRAWS)] if not options else [("off", None)]
        with torch.no_grad():
            features = [potential(batch, Noise(m, draw=k)).node_features for m, k in modes]
        expected = distance.score(torch.stack(features).mean(dim=0), batch.numbers)
        np.testing.assert_allclose(found["ood_score"], expected, rtol=1e-12)
        assert found["ood_score_max"] == found["ood_score"].max()
        assert {"ood_score", "ood_score_max"} <= set(BlipCalculator(potential).implemented_properties)

    def test_moments_of_the_draws(self, potential):
        atoms = crystal()
        batch = potential.backbone.batch([atoms])
        draws = [potential(batch, Noise("draw", draw=k), stress=True) for k in range(DRAWS)]
        energy = np.array([d.energy.item() for d in draws])
        forces = np.stack([d.forces.detach().numpy() for d in draws])
        stress = np.stack([d.stress[0].detach().numpy() for d in draws])
        r = results(potential, atoms)
        assert r["energy"] == pytest.approx(energy.mean(), rel=1e-14)
        assert r["energy_std"] == pytest.approx(energy.std(), rel=1e-9)
        np.testing.assert_allclose(r["forces"], forces.mean(0), rtol=1e-12, atol=1e-12)
        off = forces - forces.mean(0)
        covariance = shrunk(torch.from_numpy(np.einsum("kni,knj->nij", off, off) / len(off)), len(off) - 1)
        np.testing.assert_allclose(r["forces_cov"], covariance, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(r["stress"], stress.mean(0), rtol=1e-12)
        np.testing.assert_allclose(r["stress_std"], stress.std(0), rtol=1e-9)
        np.testing.assert_allclose(
            r["forces_std"], np.sqrt(np.diagonal(r["forces_cov"], axis1=1, axis2=2)), rtol=1e-12
        )
        np.testing.assert_allclose(r["forces_std_norm"], np.linalg.norm(r["forces_std"], axis=1), rtol=1e-12)
        assert min(r["energy_std"], r["forces_std"].min(), r["stress_std"].min()) > 0

    @pytest.mark.parametrize("make", [crystal, methanol])
    def test_energies_of_the_atoms_sum_to_the_energy(self, potential, make):
        for n_draws in (None, 0):
            r = results(potential, make(), n_draws=n_draws)
            assert r["energies"].sum() == pytest.approx(r["energy"], rel=1e-13)

    def test_mean_forces_and_stress_are_derivatives_of_the_mean_energy(self, potential):
        atoms, h = crystal(), 1e-4
        r = results(potential, atoms)
        rng = np.random.default_rng(3)
        for _ in range(3):
            direction = rng.normal(size=(2, 3))
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions += sign * h * direction
                energies.append(results(potential, moved)["energy"])
            slope = (energies[0] - energies[1]) / (2 * h)
            assert slope == pytest.approx(-(r["forces"] * direction).sum(), rel=1e-6)
        strain = rng.normal(size=(3, 3))
        strain += strain.T
        h = 2e-5
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ (np.eye(3) + sign * h * strain), scale_atoms=True)
            energies.append(results(potential, moved)["energy"])
        slope = (energies[0] - energies[1]) / (2 * h) / atoms.get_volume()
        voigt = strain[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] * [1, 1, 1, 2, 2, 2]
        assert slope == pytest.approx(r["stress"] @ voigt, rel=1e-5)

    def test_mean_weights_only(self, potential):
        r = results(potential, crystal(), n_draws=0)
        assert set(r) == {"energy", "free_energy", "energies", "forces", "stress"}
        batch = potential.backbone.batch([crystal()])
        assert r["energy"] == potential(batch).energy.item()

    def test_fewer_draws(self, potential):
        assert results(potential, crystal(), n_draws=3)["energy_std"] > 0
        with pytest.raises(BlipError, match="no spread"):
            results(potential, crystal(), n_draws=1)

    def test_an_atom_on_its_own_feels_nothing_but_is_uncertain(self, potential):
        r = results(potential, Atoms("Si"))
        assert (r["forces"] == 0).all()
        assert (r["forces_std"] == 0).all()
        assert r["energy_std"] > 0


class TestRotation:
    @pytest.mark.parametrize("make", [crystal, methanol])
    @pytest.mark.parametrize("seed", range(3))
    def test_covariances_rotate_and_invariants_stay(self, potential, make, seed):
        atoms, R = make(), random_rotation(seed)
        one, other = results(potential, atoms), results(potential, rotated(atoms, R))
        close = {"rtol": 1e-10, "atol": 1e-10}
        np.testing.assert_allclose(other["energy"], one["energy"], **close)
        np.testing.assert_allclose(other["energy_std"], one["energy_std"], **close)
        np.testing.assert_allclose(other["forces_std_norm"], one["forces_std_norm"], **close)
        np.testing.assert_allclose(other["forces"], one["forces"] @ R.T, **close)
        turned = R @ one["forces_cov"] @ R.T
        np.testing.assert_allclose(other["forces_cov"], turned, **close)
        components = np.sqrt(np.diagonal(turned, axis1=1, axis2=2))
        np.testing.assert_allclose(other["forces_std"], components, rtol=1e-9, atol=1e-10)
        # components alone are not invariant, nor do they rotate like a vector
        assert np.abs(other["forces_std"] - one["forces_std"]).max() > 1e-3

    def test_stress_rotates(self, potential):
        atoms, R = crystal(), random_rotation(0)
        one, other = results(potential, atoms)["stress"], results(potential, rotated(atoms, R))["stress"]
        full = one[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
        turned = (R @ full @ R.T)[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        np.testing.assert_allclose(other, turned, rtol=1e-9, atol=1e-12)


class TestAse:
    @pytest.mark.parametrize("pbc", [False, (True, True, False)])
    @pytest.mark.parametrize("n_draws", [None, 0])
    def test_no_stress_without_periodicity(self, potential, pbc, n_draws):
        atoms = crystal()
        atoms.pbc = pbc
        atoms.calc = BlipCalculator(potential, n_draws=n_draws)
        energy = atoms.get_potential_energy()
        with pytest.raises(PropertyNotImplementedError):
            atoms.get_stress()
        with pytest.raises(PropertyNotImplementedError):
            atoms.calc.get_property("stress_std", atoms)
        assert atoms.get_potential_energy() == energy
        assert "stress" not in atoms.calc.results

    def test_asking_for_stress_first(self, potential):
        atoms = methanol()
        atoms.calc = BlipCalculator(potential)
        with pytest.raises(PropertyNotImplementedError, match="no stress without periodicity"):
            atoms.get_stress()
        assert np.isfinite(atoms.get_potential_energy())

    def test_no_std_without_draws(self, potential):
        atoms = crystal()
        atoms.calc = BlipCalculator(potential, n_draws=0)
        with pytest.raises(PropertyNotImplementedError):
            atoms.calc.get_property("energy_std", atoms)
        assert atoms.get_forces().shape == (2, 3)

    def test_through_the_usual_methods(self, potential):
        atoms = crystal()
        atoms.calc = BlipCalculator(potential)
        r = results(potential, crystal())
        assert atoms.get_potential_energy() == r["energy"]
        assert np.array_equal(atoms.get_forces(), r["forces"])
        assert np.array_equal(atoms.get_stress(), r["stress"])
        assert np.array_equal(atoms.get_potential_energies(), r["energies"])
        assert atoms.get_potential_energy(force_consistent=True) == r["energy"]
        assert np.array_equal(atoms.calc.get_property("forces_cov", atoms), r["forces_cov"])

    def test_one_evaluation_serves_all_properties_until_atoms_move(self, potential, monkeypatch):
        calls = []
        forward = type(potential).forward
        monkeypatch.setattr(type(potential), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
        atoms = crystal()
        atoms.calc = BlipCalculator(potential)
        energy = atoms.get_potential_energy()
        assert calls == [1], "draws of a small structure are evaluated together"
        atoms.get_forces(), atoms.get_stress(), atoms.calc.get_property("energy_std", atoms)
        assert calls == [1]
        atoms.positions[0] += 0.1
        assert atoms.get_potential_energy() != energy
        assert calls == [1, 1]

    def test_input_is_untouched(self, potential):
        atoms = crystal()
        atoms.positions[1] += 3 * atoms.cell[0]  # far outside the cell
        atoms.info["note"] = {"a": [1, 2]}
        atoms.new_array("tag2", np.arange(2))
        atoms.set_constraint(FixAtoms([0]))
        before = atoms.copy()
        atoms.calc = BlipCalculator(potential)
        atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        assert atoms == before
        assert atoms.info == before.info
        assert atoms.arrays.keys() == before.arrays.keys()
        assert all(np.array_equal(atoms.arrays[k], before.arrays[k]) for k in before.arrays)
        assert len(atoms.constraints) == 1

    def test_wrapping_changes_nothing(self, potential):
        atoms = crystal()
        moved = atoms.copy()
        moved.positions[1] += atoms.cell[0] - 2 * atoms.cell[2]
        one, other = results(potential, atoms), results(potential, moved)
        assert other["energy"] == pytest.approx(one["energy"], rel=1e-12)
        assert other["energy_std"] == pytest.approx(one["energy_std"], rel=1e-9)

    def test_unknown_element(self, potential):
        with pytest.raises(DataError, match="element Au is unknown to the fake model"):
            results(potential, Atoms("Au"))


class TestCalibration:
    @pytest.fixture
    def calibrated(self, potential, monkeypatch):
        calibration = Calibration(
            energy=PropertyCalibration(aleatoric=0.002, scale=1.5),
            forces=PropertyCalibration(aleatoric=0.03, scale=2.0),
            stress=PropertyCalibration(aleatoric=0.004, scale=0.5),
        )
        monkeypatch.setattr(potential, "calibration", calibration)
        return potential

    def test_epistemic_is_scaled_and_total_adds_the_aleatoric_noise(self, calibrated, monkeypatch):
        r = results(calibrated, crystal())
        monkeypatch.setattr(calibrated, "calibration", None)
        raw = results(calibrated, crystal())
        n = 2  # atoms: the energy's aleatoric noise is per atom
        assert r["energy_std"] == pytest.approx(1.5 * raw["energy_std"])
        assert r["energy_std_aleatoric"] == pytest.approx(n * 0.002)
        assert r["energy_std_total"] == pytest.approx(np.hypot(n * 0.002, r["energy_std"]))
        for key, scale, noise in (("forces", 2.0, 0.03), ("stress", 0.5, 0.004)):
            np.testing.assert_allclose(r[f"{key}_std"], scale * raw[f"{key}_std"])
            assert r[f"{key}_std_aleatoric"] == noise
            np.testing.assert_allclose(r[f"{key}_std_total"], np.hypot(noise, r[f"{key}_std"]))
        np.testing.assert_allclose(r["forces_std_norm"], 2 * raw["forces_std_norm"])
        np.testing.assert_allclose(r["forces_cov"], 4 * raw["forces_cov"])
        for key in ("energy", "forces", "stress", "energies"):
            np.testing.assert_array_equal(r[key], raw[key])

    def test_what_no_label_says_is_absent(self, potential, calibrated, monkeypatch):
        """Without labels of a property its scatter is unknown: not 0, and no total."""
        monkeypatch.setattr(calibrated, "calibration", Calibration(forces=PropertyCalibration(0.03, 2.0)))
        r = results(calibrated, crystal())
        for key in ("energy", "stress"):
            assert r[f"{key}_std"] is not None
            assert {f"{key}_std_aleatoric", f"{key}_std_total"}.isdisjoint(r)
        assert r["forces_std_aleatoric"] == 0.03
        monkeypatch.setattr(potential, "calibration", None)
        assert not [key for key in results(potential, crystal()) if key.endswith(("_aleatoric", "_total"))]
        atoms = crystal()
        atoms.calc = calculator = BlipCalculator(potential)
        with pytest.raises(PropertyNotImplementedError, match="no calibration frame"):
            calculator.get_property("stress_std_total", atoms)


class TestPredictAtoms:
    def frames(self):
        return [crystal(), methanol(), Atoms("Si"), crystal(), molecule("H2O")]

    @pytest.mark.parametrize("batch_size", [1, 2, 16])
    def test_the_same_in_any_batch(self, potential, batch_size):
        done = []
        out = predict_atoms(potential, self.frames(), batch_size=batch_size, progress=done.append)
        assert sum(done) == len(out) == 5
        for item, atoms in zip(out, self.frames(), strict=True):
            for key, value in results(potential, atoms).items():
                if key != "free_energy":
                    np.testing.assert_allclose(item[key], value, rtol=1e-9, atol=1e-11, err_msg=key)
            assert (item["stress"] is None) == (not atoms.pbc.all())

    def test_nothing_to_predict(self, potential):
        assert predict_atoms(potential, []) == []

    def test_float32(self, potential):
        small = BayesianPotential(
            FakeBackbone(), potential.model_config, potential.posterior_config, n_draws=DRAWS
        )
        small.load_state_dict(potential.state_dict())
        small.to_dtype("float32").references = potential.references
        for mine, exact in zip(
            predict_atoms(small, self.frames()), predict_atoms(potential, self.frames()), strict=True
        ):
            assert mine["forces"].dtype == np.float64
            assert mine["energy"] == pytest.approx(exact["energy"], abs=1e-4)
            assert mine["energy_std"] == pytest.approx(exact["energy_std"], rel=1e-3)
            np.testing.assert_allclose(mine["forces_std"], exact["forces_std"], rtol=1e-2, atol=1e-5)
