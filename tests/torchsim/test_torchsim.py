"""A potential in TorchSim, on the fake backbone: against our ASE calculator, ASE's dynamics, and laws."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.geometry import find_mic
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.calibration import Calibration
from blip_ft.potential.distance import FeatureDistance
from blip_ft.testing.fake import FakeBackbone
from blip_ft.torchsim import TorchSimModel
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.predict import predict_atoms

pytestmark = pytest.mark.backend("torchsim")


@pytest.fixture(scope="module")
def ts() -> Any:
    import torch_sim

    return torch_sim


def potential_of(size: str = "tiny") -> BayesianPotential:
    """The fake backbone with four draws, an out-of-distribution score and a calibration that shows."""
    out = BayesianPotential(
        FakeBackbone.load(size),
        ModelConfig(adapter="fake", checkpoint=size, dtype="float64"),
        PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.1),
        n_draws=4,
    )
    training = np.random.default_rng(0).normal(size=(40, 8)), np.repeat([8, 14], 20), ["a", "b"] * 20
    out.ood = FeatureDistance.fit(*training)
    none = Calibration.identity()
    out.calibration = replace(
        none, energy=replace(none.energy, scale=2.0), forces=replace(none.forces, scale=3.0)
    )
    return out


@pytest.fixture(scope="module")
def potential() -> BayesianPotential:
    return potential_of()


def crystals() -> list[Atoms]:
    """Three structures of different sizes, elements and cells; one is triclinic, and its cell is not symmetric."""
    sio = Atoms(
        "SiO",
        scaled_positions=[[0, 0, 0], [0.45, 0.5, 0.55]],
        cell=[[4.4, 0, 0], [0.5, 4.6, 0], [-0.3, 0.4, 4.8]],
        pbc=True,
    )
    out = [sio.repeat(2), bulk("Si", cubic=True), sio.repeat((2, 2, 1))]
    for seed, atoms in enumerate(out):
        atoms.rattle(0.1, seed=seed)
    out[0].positions[0] += 3 * out[0].cell[0]  # nothing says that atoms lie in their cell
    return out


def molecules() -> list[Atoms]:
    return [molecule("H2O"), molecule("CH4"), molecule("NH3")]


@pytest.mark.parametrize(
    ("method", "n_draws"), [("draws", None), ("draws", 2), ("energy", None), ("linear", None), ("draws", 0)]
)
@pytest.mark.parametrize("make", [crystals, molecules])
def test_a_state_gives_what_the_calculator_gives(
    potential: BayesianPotential, make: Any, method: Any, n_draws: int | None
):
    """Energies, forces, stresses and error bars of structures together are those of each alone."""
    model, structures = TorchSimModel(potential, method=method, n_draws=n_draws), make()
    out = model(model.state(structures))
    assert {value.dtype for value in out.values()} == {torch.float64}
    start = 0
    for number, atoms in enumerate(structures):
        atoms.calc = BlipCalculator(potential, method=method, n_draws=n_draws)
        atoms.get_potential_energy()
        expected, these = atoms.calc.results, slice(start, start + len(atoms))
        start += len(atoms)
        same = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
        same(out["energy"][number], expected["energy"])
        same(out["forces"][these], expected["forces"])
        same(out["ood_score"][these], expected["ood_score"])
        for name, where in (("energy_std", number), ("forces_std_norm", these)):
            assert (name in out) == (name in expected)
            if name in out:
                same(out[name][where], expected[name])
        assert ("stress" in out) == ("stress" in expected) == bool(atoms.pbc.all())
        if "stress" in out:
            same(out["stress"][number], voigt_6_to_full_3x3_stress(expected["stress"]))


def test_all_structures_are_one_call_of_the_model(potential: BayesianPotential, monkeypatch: Any):
    calls = []
    evaluate = type(potential.backbone).forward

    def counted(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(batch.n_structures)
        return evaluate(self, batch, *args, **kwargs)

    monkeypatch.setattr(type(potential.backbone), "forward", counted)
    model = TorchSimModel(potential, n_draws=0)
    model(model.state(20 * [bulk("Si")]))
    assert calls == [20]


def test_it_is_a_model_of_torch_sim_by_its_own_check(ts: Any, monkeypatch: pytest.MonkeyPatch):
    """The check has silicon and iron; the fake backbone knows carbon."""
    monkeypatch.setattr(
        "ase.build.bulk", lambda symbol, *args, **more: bulk(symbol.replace("Fe", "C"), *args, **more)
    )
    potential = potential_of()
    potential.ood = None  # has seen no carbon
    for dtype in (torch.float64, torch.float32):
        model = TorchSimModel(potential, dtype=dtype)
        assert isinstance(model, ts.models.interface.ModelInterface)
        assert isinstance(model, TorchSimModel)
        ts.models.interface.validate_model_outputs(model, model.device, dtype)
        assert {value.dtype for value in model.results.values()} == {dtype}
        model.compute_stress = model.compute_forces = False
        ts.models.interface.validate_model_outputs(model, model.device, dtype)
        assert model.compute_stress
        assert model.compute_forces


def test_stress_is_the_slope_of_the_energy_in_torch_sims_own_cells(potential: BayesianPotential):
    """TorchSim strains a state as cell -> (1 + e) cell, positions likewise; all nine numbers of a triclinic cell."""
    model = TorchSimModel(potential, n_draws=0)
    state = model.state(crystals()[:1])
    stress, volume, h = model(state)["stress"][0], torch.linalg.det(state.cell[0]).abs(), 1e-5
    for i in range(3):
        for j in range(3):
            energies = []
            for sign in (1, -1):
                strain = torch.eye(3, dtype=torch.float64)
                strain[i, j] += sign * h
                other = state.clone()
                other.positions, other.cell = state.positions @ strain.T, strain @ state.cell
                energies.append(model(other)["energy"][0])
            assert float((energies[0] - energies[1]) / (2 * h) / volume - stress[i, j]) == pytest.approx(
                0, abs=1e-8
            )


@pytest.mark.parametrize("make", [crystals, molecules])
def test_nve_is_that_of_ase_and_conserves_energy(ts: Any, potential: BayesianPotential, make: Any):
    model, structures, fs = TorchSimModel(potential, n_draws=0), make(), 0.25
    step = fs * 1e-3 * ts.units.MetalUnits.time
    double = partial(torch.tensor, dtype=torch.float64)
    start, update = ts.nve(
        model=model, dt=double(step), kT=double(300 * ts.units.MetalUnits.temperature), seed=0
    )
    state = start(model.state(structures))
    velocities = (state.momenta / state.masses[:, None]).numpy()
    kinetic = partial(ts.calc_kinetic_energy, system_idx=state.system_idx)
    total = state.energy + kinetic(momenta=state.momenta, masses=state.masses)
    for _ in range(40):
        state = update(state)
    after = state.energy + kinetic(momenta=state.momenta, masses=state.masses)
    assert float((after - total).abs().max()) < 2e-3 * float(
        kinetic(momenta=state.momenta, masses=state.masses).max()
    )
    first = 0
    for atoms in structures:
        these = slice(first, first := first + len(atoms))
        atoms.set_velocities(velocities[these])
        atoms.calc = BlipCalculator(potential, n_draws=0)
        VelocityVerlet(atoms, timestep=step).run(40)
        apart = state.positions[these].numpy() - atoms.positions
        if atoms.pbc.all():  # TorchSim puts atoms back into their cells
            apart = find_mic(apart, atoms.cell)[0]
        assert np.abs(apart).max() < 1e-10
    # TorchSim's constants are those of CODATA 2014, as ASE's by default
    assert step == pytest.approx(fs * units.fs, rel=1e-9)


def test_nvt_of_several_structures_with_error_bars_in_every_step(ts: Any, potential: BayesianPotential):
    model = TorchSimModel(potential, method="energy")
    state = model.state(crystals())
    steps = []
    model.register_forward_hook(lambda *_: steps.append(model.results["energy_std"]))
    final = ts.integrate(
        state, model, integrator=ts.nvt_langevin, n_steps=10, temperature=300, timestep=0.0005
    )
    assert final.n_systems == 3
    assert len(steps) == 11
    expected = TorchSimModel(potential, method="energy")(final)["energy_std"]
    np.testing.assert_allclose(model.results["energy_std"], expected)
    assert bool((steps[-1] != steps[0]).all())


def test_a_reporter_writes_error_bars_of_every_structure(
    ts: Any, potential: BayesianPotential, tmp_path: Path
):
    """Dynamics on the mean weights, error bars on every fifth step, one trajectory per structure."""
    model, bars = TorchSimModel(potential, n_draws=0), TorchSimModel(potential, n_draws=4)
    structures = crystals()
    files = [tmp_path / f"{i}.h5" for i in range(3)]
    reporter = ts.TrajectoryReporter(
        files,
        state_frequency=5,
        prop_calculators={5: {"forces_std_norm": lambda state: bars(state)["forces_std_norm"]}},
    )
    final = ts.integrate(
        model.state(structures),
        model,
        integrator=ts.nve,
        n_steps=10,
        temperature=300,
        timestep=0.0005,
        trajectory_reporter=reporter,
    )
    expected = bars(final)["forces_std_norm"]
    start = 0
    for file, atoms in zip(files, structures, strict=True):
        with ts.TorchSimTrajectory(file, mode="r") as trajectory:
            written = trajectory.get_array("forces_std_norm")
        assert written.shape == (2, len(atoms))
        np.testing.assert_allclose(written[-1], expected[start : start + len(atoms)], rtol=1e-5)
        start += len(atoms)


@pytest.mark.parametrize("cell", [False, True])
def test_fire_relaxes_structures_together(ts: Any, potential: BayesianPotential, cell: bool):
    """To minima of our own calculator, under a pressure that is given in eV/Å^3 where cells relax too."""
    model, pressure = TorchSimModel(potential, n_draws=0), 0.002 if cell else 0.0
    optimizer = (
        partial(ts.optimizers.frechet_cell_fire, scalar_pressure=pressure) if cell else ts.optimizers.fire
    )
    final = ts.optimize(
        model.state(crystals()[1:]),
        model,
        optimizer=optimizer,
        convergence_fn=ts.generate_force_convergence_fn(0.01, include_cell_forces=cell),
        max_steps=400,
    )
    for atoms in ts.io.state_to_atoms(final):
        atoms.calc = BlipCalculator(potential, n_draws=0)
        assert np.abs(atoms.get_forces()).max() < 0.0101
        if cell:
            left = atoms.get_stress(voigt=False) + pressure * np.eye(3)
            assert np.abs(left).max() * atoms.get_volume() < 0.0101 * len(atoms)


def test_cells_of_molecules_do_not_relax(ts: Any, potential: BayesianPotential):
    model = TorchSimModel(potential, n_draws=0)
    start, _ = ts.optimizers.unit_cell_fire(model)
    with pytest.raises(BlipError, match="no stress") as raised:
        start(model.state(molecules()))
    assert "fixed cells" in raised.value.remedy
    assert model(model.state(molecules())).get("stress") is None
    with pytest.raises(KeyError, match="charges"):
        model.results["charges"]


def test_slabs_are_refused_not_taken_for_molecules(potential: BayesianPotential):
    model, slab = TorchSimModel(potential), bulk("Si", cubic=True)
    slab.pbc = [True, True, False]
    with pytest.raises(BlipError, match="2 of 3") as raised:
        model.state([molecule("H2O"), slab])
    assert (raised.value.frame, raised.value.field) == (1, "pbc")
    with pytest.raises(BlipError, match="in one state"):
        model.state([molecule("H2O"), bulk("Si")])
    with pytest.raises(BlipError, match="no structure"):
        model.state([])


def test_a_state_of_later_versions_may_be_periodic_in_two_directions(potential: BayesianPotential):
    """There ``pbc`` is a tensor of three."""
    model, atoms = TorchSimModel(potential), bulk("Si", cubic=True)
    state = model.state(atoms)
    fields = {name: getattr(state, name) for name in ("positions", "atomic_numbers", "cell")}
    out = model(fields | {"pbc": torch.tensor([True, True, False])})
    atoms.pbc = [True, True, False]
    (expected,) = predict_atoms(potential, [atoms])
    assert float(out["energy"][0]) == pytest.approx(expected["energy"], abs=1e-12)
    assert "stress" not in out


def test_what_the_model_cannot_describe_is_named(potential: BayesianPotential):
    model = TorchSimModel(potential)
    with pytest.raises(BlipError, match="Fe") as raised:
        model(model.state([bulk("Si"), bulk("Fe")]))
    assert raised.value.frame == 1
    close = bulk("Si", cubic=True)
    close.positions[1] = close.positions[0] + 0.1
    with pytest.raises(BlipError, match="overlap"):
        model(model.state(close))
    model(model.state(bulk("Si")))
    broken = model.state(bulk("Si"))
    broken.positions[0, 0] = torch.nan
    with pytest.raises(BlipError):
        model(broken)


def test_a_prediction_that_is_not_finite_names_its_structure():
    potential = potential_of()
    model = TorchSimModel(potential, n_draws=0)
    state = model.state([bulk("Si"), bulk("C"), bulk("Si")])
    with torch.no_grad():
        potential.backbone.model.references[1] = torch.nan  # of carbon
    with pytest.raises(BlipError, match="not finite") as raised:
        model(state)
    assert (raised.value.frame, raised.value.field) == (1, "energy")


def test_charge_and_spin_are_of_all_structures():
    potential = potential_of("charged")
    one, other = (TorchSimModel(potential, n_draws=0, charge=charge) for charge in (0, 1))
    state = one.state(molecules())
    (expected, *_) = predict_atoms(potential, [_with_charge(molecules()[0])], n_draws=0)
    assert float(other(state)["energy"][0]) == pytest.approx(expected["energy"], abs=1e-12)
    assert bool((one(state)["energy"] != other(state)["energy"]).all())
    with pytest.raises(BlipError, match="takes no charge"):
        TorchSimModel(potential_of(), charge=1)


def _with_charge(atoms: Atoms) -> Atoms:
    atoms.info["charge"] = 1
    return atoms


def test_weights_in_float32_run_in_float64():
    """Energies are then those of the calculator, not rounded to seven digits."""
    potential = potential_of().float()
    model = TorchSimModel(potential, n_draws=0, dtype=torch.float64)
    assert (potential.backbone.dtype, model.dtype) == (torch.float32, torch.float64)
    assert TorchSimModel(potential).dtype == torch.float32
    atoms = crystals()[0]
    out = model(model.state(atoms))
    atoms.calc = BlipCalculator(potential, n_draws=0)
    assert out["energy"][0] == atoms.get_potential_energy()
    np.testing.assert_array_equal(out["forces"], atoms.get_forces())
