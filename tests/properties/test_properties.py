"""Propagated error bars against known answers: laws of scaling, linear toys, and the draws of a posterior."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones
from numpy.typing import NDArray
from rich.console import Console

from blip_ft import bayesian, load_backbone
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError, DataError
from blip_ft.families.base.linear import ClosedFormData, LinearizedModel
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.properties import (
    Members,
    barrier,
    elastic_constants,
    equation_of_state,
    members_of,
    phonons,
    reaction_energy,
    relax,
    vacancy_formation_energy,
)
from blip_ft.properties.crystal import birch_murnaghan, voigt_reuss_hill
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.draws import moments_of_draws

QUIET = Console(quiet=True)
#: width of the draws, posterior stds of ln epsilon and ln sigma, calibrated scale
AMPLITUDE, EPSILON, SIGMA, SCALE = 0.03, 0.2, 0.02, 2.0


def normal(n: int, seed: int) -> NDArray[np.float64]:
    """(n,) in pairs of opposite numbers."""
    half = np.random.default_rng(seed).normal(size=n // 2)
    return np.stack([half, -half], axis=1).ravel()


def lennard_jones(epsilon: float, sigma: float) -> LennardJones:
    """Everything scales with its two numbers, the cutoff too."""
    return LennardJones(epsilon=0.4 * epsilon, sigma=2.3 * sigma, rc=3 * 2.3 * sigma, smooth=True)


def copper_members(n: int = 4, *, epsilon: float = EPSILON, sigma: float = SIGMA) -> Members:
    a, b = normal(n, 0), normal(n, 1)
    return Members(
        lennard_jones(1, 1),
        [
            lennard_jones(np.exp(AMPLITUDE * epsilon * x), np.exp(AMPLITUDE * sigma * y))
            for x, y in zip(a, b, strict=True)
        ],
        AMPLITUDE,
        SCALE,
        source="toy",
    )


def expected(power_epsilon: float, power_sigma: float, n: int = 4) -> float:
    """Relative std of what is proportional to these powers."""
    off = power_epsilon * EPSILON * normal(n, 0) + power_sigma * SIGMA * normal(n, 1)
    return SCALE * float(np.sqrt(np.mean(off**2)))


def relative(estimate: Any) -> Any:
    return estimate.std / np.abs(estimate.mean)


def copper() -> Atoms:
    return bulk("Cu", a=3.5, cubic=True)


# ---- laws of scaling ---------------------------------------------------------------------


def test_relaxed_energy_and_cell_scale() -> None:
    found = relax(copper_members(), copper(), console=QUIET)
    assert relative(found.energy) == pytest.approx(expected(1, 0), rel=1e-3)
    assert relative(found.volume) == pytest.approx(expected(0, 3), rel=1e-3)
    assert relative(found.cell)[0, 0] == pytest.approx(expected(0, 1), rel=1e-3)
    assert found.cell_lengths_and_angles.std[3:] == pytest.approx(0, abs=1e-3)
    assert found.energy.draws.shape == (4,)
    assert found.energy.unit == "eV"
    np.testing.assert_allclose(found.energy.draws.mean(), found.energy.mean)
    assert found.atoms.calc is None


def test_equation_of_state_and_elastic_constants_scale() -> None:
    members = copper_members(2)
    state = equation_of_state(members, copper(), points=5, console=QUIET)
    assert relative(state.bulk_modulus) == pytest.approx(expected(1, -3, 2), rel=0.02)
    assert relative(state.volume) == pytest.approx(expected(0, 3, 2), rel=0.01)
    elastic = elastic_constants(members, copper(), console=QUIET)
    assert elastic.stiffness.mean.shape == (6, 6)
    assert relative(elastic.stiffness)[0, 0] == pytest.approx(expected(1, -3, 2), rel=0.01)
    assert relative(elastic.shear_modulus) == pytest.approx(expected(1, -3, 2), rel=0.01)
    # two ways to one number
    assert elastic.bulk_modulus.mean == pytest.approx(state.bulk_modulus.mean, rel=0.03)
    c = elastic.stiffness.mean
    assert elastic.bulk_modulus.mean == pytest.approx((c[0, 0] + 2 * c[0, 1]) / 3, rel=1e-3)


def test_birch_murnaghan_gives_back_what_it_was_made_of() -> None:
    v0, b0, slope, e0 = 40.0, 0.6, 4.7, -3.0
    v = np.linspace(36, 44, 9)
    x = (v0 / v) ** (2 / 3) - 1
    e = e0 + 9 * v0 * b0 / 16 * (x**3 * slope + x**2 * (6 - 4 * (x + 1)))
    assert birch_murnaghan(v, e) == pytest.approx((e0, v0, b0, slope), rel=1e-6)
    with pytest.raises(BlipError, match="no minimum"):
        birch_murnaghan(v, v)


def test_moduli_of_an_isotropic_solid() -> None:
    k, g = 100.0, 40.0
    c = np.zeros((6, 6))
    c[:3, :3] = k - 2 * g / 3
    c[range(3), range(3)] = k + 4 * g / 3
    c[range(3, 6), range(3, 6)] = g
    assert voigt_reuss_hill(c) == pytest.approx((k, g))


@pytest.mark.backend("phonopy")
def test_frequencies_scale() -> None:
    found = phonons(
        copper_members(2),
        bulk("Cu", a=3.5),
        supercell=(3, 3, 3),
        q_points=[(0, 0, 0), (0.5, 0.5, 0)],
        console=QUIET,
    )
    assert found.frequencies.mean.shape == (2, 3)
    assert found.frequencies.mean[0] == pytest.approx(0, abs=0.05)
    assert (found.frequencies.mean[1] > 1).all()
    assert relative(found.frequencies)[1] == pytest.approx(expected(0.5, -1, 2), rel=0.02)


def test_phonons_without_phonopy_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "phonopy", None)
    with pytest.raises(ImportError, match=r"blip-ft\[phonopy\]"):
        phonons(copper_members(2), copper())


def test_the_error_of_a_vacancy_is_that_of_a_difference() -> None:
    found = vacancy_formation_energy(
        copper_members(2), copper(), supercell=(2, 2, 2), fmax=5e-3, console=QUIET
    )
    assert found.energy.mean > 0
    assert relative(found.energy) == pytest.approx(expected(1, 0, 2), rel=0.02)
    assert found.energy.std < 0.1 * found.uncorrelated_std


# ---- linear toys -------------------------------------------------------------------------


class Toy(Calculator):
    """Energy ``offset`` per atom; two atoms are a spring (eV/Å^2, Å), one atom sees a double well in x.

    The well has its minima at ±1 Å, ``height`` eV between them, and springs in y and z.
    """

    implemented_properties = ["energy", "forces"]

    def __init__(self, offset: float = 0.0, bond: float = 0.0, height: float = 0.3) -> None:
        super().__init__()
        self.offset, self.bond, self.height = offset, bond, height

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        n, x = len(atoms), atoms.positions
        energy, forces = n * self.offset, np.zeros((n, 3))
        if n == 2:
            d = x[1] - x[0]
            r = np.linalg.norm(d)
            energy += 0.5 * 10.0 * (r - 0.8) ** 2 + self.bond
            forces[0] = 10.0 * (r - 0.8) * d / r
            forces[1] = -forces[0]
        elif n == 1:
            energy += self.height * (x[0, 0] ** 2 - 1) ** 2 + 0.5 * 5 * (x[0, 1:] ** 2).sum()
            forces[0, 0] = -4 * self.height * x[0, 0] * (x[0, 0] ** 2 - 1)
            forces[0, 1:] = -5 * x[0, 1:]
        self.results = {"energy": float(energy), "free_energy": float(energy), "forces": forces}


def toys(n: int = 6) -> tuple[Members, NDArray[np.float64]]:
    """Draws with an offset of 1 eV per atom and a bond and height that move by 0.1 and 0.05 eV; and z."""
    z = normal(n, 3)
    draws = [
        Toy(AMPLITUDE * 1.0 * w, AMPLITUDE * 0.1 * v, 0.3 + AMPLITUDE * 0.05 * v)
        for v, w in zip(z, normal(n, 4), strict=True)
    ]
    return Members(Toy(), draws, AMPLITUDE, SCALE, source="toy"), z


def test_a_reaction_keeps_the_correlation_of_its_parts() -> None:
    members, z = toys()
    atom, pair = Atoms("H", positions=[(1.0, 0, 0)]), Atoms("H2", positions=[(0, 0, 0), (0, 0, 0.7)])
    found = reaction_energy(members, [(2, atom)], [(1, pair)], console=QUIET)
    assert found.energy.std == pytest.approx(SCALE * 0.1 * np.sqrt(np.mean(z**2)), rel=1e-6)
    assert found.energy.std < 0.1 * found.uncorrelated_std
    assert set(found.parts) == {"reactant H", "product H2"}


def test_a_barrier_that_is_linear_in_the_weights_is_exact() -> None:
    members, z = toys()
    ends = [Atoms("H", positions=[(x, 0.02, 0)], cell=[9, 9, 9], pbc=True) for x in (-0.9, 0.95)]
    found = barrier(members, *ends, images=3, console=QUIET)
    assert found.forward.mean == pytest.approx(0.3, abs=1e-5)
    assert found.reverse.mean == pytest.approx(0.3, abs=1e-5)
    assert found.forward.std == pytest.approx(SCALE * 0.05 * np.sqrt(np.mean(z**2)), rel=1e-3)
    assert len(found.images) == 5
    assert found.path[2] == pytest.approx(found.forward.mean)
    assert found.path[0] == 0


def test_estimates_of_other_draws_are_not_mixed() -> None:
    members, _ = toys()
    one = relax(members, Atoms("H", positions=[(1, 0, 0)]), console=QUIET).energy
    assert (one - one).std == 0
    assert (2 * one).std == pytest.approx(2 * one.std)
    assert ((one + one) / 2).std == pytest.approx(one.std)
    assert "±" in str(one)
    other = Members(members.mean, members.draws, AMPLITUDE, SCALE, source="another")
    with pytest.raises(BlipError, match="different draws"):
        one - relax(other, Atoms("H", positions=[(1, 0, 0)]), console=QUIET).energy


def test_single_draws_have_their_mean() -> None:
    draws = [Toy(offset=x) for x in (0.0, 1.0, 2.0, 5.0)]
    members = Members(Toy(), draws, paired=False, source="toy")
    found = relax(members, Atoms("H", positions=[(1, 0, 0)]), console=QUIET).energy
    assert found.mean == pytest.approx(2.0)
    assert found.std == pytest.approx(np.std([0.0, 1.0, 2.0, 5.0]))


# ---- a posterior -------------------------------------------------------------------------


def pathwise() -> BayesianPotential:
    potential = BayesianPotential(
        FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(family="pathwise", rank=6, prior_scale=0.3),
        n_draws=4,
    )
    rows = torch.randn(20, 472, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nothing = np.zeros(20)
    potential.posterior.fit(
        ClosedFormData(LinearizedModel(rows, nothing, np.arange(20) % 3, nothing == 0), 0.3)
    )
    potential.amplitude = 0.03
    return potential


def test_without_forces_it_is_the_std_of_predictions() -> None:
    potential, crystal = pathwise(), bulk("Si")
    found = relax(potential, crystal, cell=False, n_draws=4, console=QUIET)
    moments = moments_of_draws(potential, potential.backbone.batch([crystal]), 4, stress=False)
    assert found.energy.std == pytest.approx(float(moments.energy_std[0]), rel=1e-6)
    assert found.energy.mean == pytest.approx(
        float(potential(potential.backbone.batch([crystal])).energy.detach()), abs=1e-9
    )
    doubled = members_of(potential, 4)
    assert doubled.source == members_of(potential, 4).source
    assert doubled.source != members_of(potential, 2).source


def test_at_a_minimum_the_energy_has_the_std_of_its_gradient() -> None:
    """To first order a minimum's energy moves as if the atoms stayed where they are."""
    potential, crystal = pathwise(), bulk("SiO", "rocksalt", 4.6)
    crystal.rattle(0.05, seed=0)
    found = relax(potential, crystal, cell=False, n_draws=4, console=QUIET)
    still = moments_of_draws(potential, potential.backbone.batch([found.atoms]), 4, stress=False)
    assert still.energy_std is not None
    assert found.energy.std == pytest.approx(float(still.energy_std[0]), rel=1e-2)
    assert np.abs(found.positions.std).max() > 1e-5


def test_a_model_in_single_precision_is_evaluated_in_double_and_left_as_it_is() -> None:
    potential = pathwise().to_dtype("float32")
    members = members_of(potential)
    assert potential.backbone.dtype == torch.float32
    assert members.mean.potential.backbone.dtype == torch.float64


# ---- bad input ---------------------------------------------------------------------------


def test_bad_input() -> None:
    members, crystal = members_of(pathwise()), bulk("Si")
    water = molecule("H2O")
    with pytest.raises(DataError, match="Au is unknown"):
        relax(members, bulk("Au"))
    with pytest.raises(DataError, match="bond length"):
        relax(members, Atoms("Si2", positions=[(0, 0, 0), (0, 0, 0.4)]))
    with pytest.raises(DataError, match="not periodic"):
        equation_of_state(members, water)
    with pytest.raises(DataError, match="not periodic"):
        relax(members, water, cell=True)
    with pytest.raises(BlipError, match="5 points"):
        equation_of_state(members, crystal, points=3)
    with pytest.raises(DataError, match="same atoms"):
        reaction_energy(members, [(1, water)], [(1, crystal)])
    with pytest.raises(DataError, match="no atom 7"):
        vacancy_formation_energy(members, crystal, 7)
    with pytest.raises(DataError, match="reservoir"):
        vacancy_formation_energy(members, bulk("SiO", "rocksalt", 4.6))
    with pytest.raises(DataError, match="same order"):
        barrier(members, water, molecule("NH3"))
    with pytest.raises(DataError, match="image between"):
        barrier(members, water, water, images=0)
    with pytest.raises(BlipError, match="in pairs"):
        members_of(pathwise(), 3)


def test_a_model_without_posterior_has_no_error_bars() -> None:
    plain = bayesian(load_backbone("fake", "tiny", dtype="float64"), family="pathwise")
    with pytest.raises(BlipError, match="no posterior"):
        relax(plain, bulk("Si"))


def test_a_minimum_that_is_not_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from blip_ft.properties import minima

    monkeypatch.setattr(minima, "STEPS", 1)
    with pytest.raises(BlipError, match="no minimum after 1 steps"):
        relax(copper_members(2), copper(), console=QUIET)
