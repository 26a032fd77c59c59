"""Every posterior family as a potential: physics, keyed noise, files, calculator, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from pydantic import ValidationError

import blip_ft
from blip_ft.backbones.protocol import Prediction
from blip_ft.config import ModelConfig, PosteriorConfig, parse_recipe
from blip_ft.errors import BlipError, ConversionError, RecipeError
from blip_ft.families.base.linear import ClosedFormData, LinearizedModel
from blip_ft.families.pathwise.posterior import PathwisePosterior
from blip_ft.families.posthoc_laplace.posterior import LaplacePosterior
from blip_ft.families.registry import without_foreign_keys
from blip_ft.families.sketch.posterior import SketchPosterior
from blip_ft.families.subspace.posterior import SubspacePosterior
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import save_model
from blip_ft.potential.export import export_native
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.predict import predict_atoms, predict_batch
from blip_ft.variational.layers import VariationalLayer
from blip_ft.variational.noise import Noise

DOUBLE = torch.float64
#: std of a subspace's latent numbers: 472 weights in 6 directions move as much as with the others
SUBSPACE_SCALE = 1.0
#: (family, options): what draws weights, and what makes their size depend on the input
CASES: dict[str, dict[str, Any]] = {
    "channel": {"family": "channel"},
    "weight, dropout": {"family": "weight", "prior": "dropout"},
    "weight, empirical Bayes": {"family": "weight", "empirical_bayes": True},
    "adaptive": {"family": "adaptive"},
    "adaptive, dropout": {"family": "adaptive", "prior": "dropout"},
    "posthoc_laplace": {"family": "posthoc_laplace"},
    "subspace": {"family": "subspace", "rank": 6},
    "pathwise": {"family": "pathwise", "rank": 6},
    "sketch": {"family": "sketch", "rank": 6, "buckets": 128},
}


def modes(case: str, *, row_noise: bool = True) -> list[str]:
    """The noise that a family can have."""
    if case in ("pathwise", "posthoc_laplace", "sketch", "subspace"):
        return ["structure", "draw"]
    return ["structure", *(["local"] if row_noise else []), "flipout", "draw"]


def make(case: str = "adaptive", *, backbone: FakeBackbone | None = None, seed: int = 0) -> BayesianPotential:
    """A potential whose mean and spread have left their start."""
    options = PosteriorConfig(
        **without_foreign_keys(dict(prior_scale=0.3, init_std=0.1, max_std=0.4, **CASES[case]))
    )
    potential = BayesianPotential(
        backbone or FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        options,
        seed=seed,
        n_draws=4,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in potential.mean_parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=DOUBLE))
        for p in potential.posterior.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=DOUBLE))
    if isinstance(potential.posterior, LaplacePosterior):  # as if fitted
        q = torch.linalg.qr(torch.randn(472, 20, generator=generator, dtype=DOUBLE)).Q
        potential.posterior._all, potential.posterior._eigenvalues = q.T, np.logspace(6, 1, 20)
        potential.posterior.set_covariance(0.1, 1.0)
    if isinstance(potential.posterior, SubspacePosterior):
        shape = potential.posterior.directions.shape
        rows = torch.linalg.qr(torch.randn(*shape[::-1], generator=generator, dtype=DOUBLE)).Q.T
        potential.posterior.directions.copy_(rows.half())  # what a file holds
        potential.posterior.scale.copy_(torch.eye(shape[0], dtype=DOUBLE) * SUBSPACE_SCALE)
    if isinstance(potential.posterior, PathwisePosterior | SketchPosterior):
        rows = torch.randn(20, 472, generator=generator, dtype=DOUBLE)
        nothing = np.zeros(20)
        data = LinearizedModel(rows, nothing, np.arange(20) % 3, nothing == 0)
        potential.posterior.fit(ClosedFormData(data, prior_scale=0.1))
    if options.scale_of_each_path:
        potential.prior.update(potential.converted.deltas, potential.posterior.std())
    return potential


def structures() -> list[Atoms]:
    """A crystal, two molecules and an atom on its own (no edges)."""
    crystal = bulk("SiO", "rocksalt", 4.6) * (2, 1, 1)
    crystal.rattle(0.1, seed=1)
    return [crystal, molecule("CH3OH"), molecule("H2O"), Atoms("Si")]


def evaluate(
    potential: BayesianPotential, atoms: list[Atoms], mode: str, keys: list[int] | None = None, **options: Any
) -> Prediction:
    batch = potential.backbone.batch(atoms)
    batch.keys = list(range(10, 10 + len(atoms))) if keys is None else keys
    return potential(batch, Noise(mode, **options), stress=True)


@pytest.mark.parametrize("case", CASES)
class TestNoise:
    def test_forces_and_stress_are_derivatives(self, case: str) -> None:
        """Also where the spread depends on the positions."""
        for mode in modes(case):
            self.check_derivatives(make(case), mode)

    def check_derivatives(self, potential: BayesianPotential, mode: str) -> None:
        atoms = structures()[0]
        out = evaluate(potential, [atoms], mode)
        rng, h = np.random.default_rng(0), 1e-4

        def energy(changed: Atoms) -> float:
            return evaluate(potential, [changed], mode).energy.item()

        direction = rng.normal(size=(len(atoms), 3))
        strain = rng.normal(size=(3, 3))
        strain = (strain + strain.T) / 2
        moved, strained = [], []
        for sign in (1, -1):
            a = atoms.copy()
            a.positions += sign * h * direction
            moved.append(energy(a))
            a = atoms.copy()
            a.set_cell(a.cell.array @ (np.eye(3) + sign * h * strain), scale_atoms=True)
            strained.append(energy(a))
        force = float((out.forces * torch.as_tensor(direction)).sum())
        assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(-force, rel=1e-6, abs=1e-8)
        voigt = strain[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] * [1, 1, 1, 2, 2, 2]
        slope = (strained[0] - strained[1]) / (2 * h) / atoms.get_volume()
        assert slope == pytest.approx(float(out.stress[0].detach().numpy() @ voigt), rel=1e-6)

    def test_belongs_to_the_structure_whatever_the_batch(self, case: str) -> None:
        for mode in modes(case):
            if mode != "draw":
                self.check_keys(make(case), mode)

    def check_keys(self, potential: BayesianPotential, mode: str) -> None:
        atoms = structures()
        together = evaluate(potential, atoms, mode)
        own = potential.structure_kl
        order = [2, 0, 3, 1]
        shuffled = evaluate(potential, [atoms[i] for i in order], mode, keys=[10 + i for i in order])
        torch.testing.assert_close(shuffled.energy, together.energy[order], rtol=1e-12, atol=1e-12)
        if own is not None:
            torch.testing.assert_close(potential.structure_kl, own[order], rtol=1e-12, atol=1e-12)
            assert own[3] < own[0]  # the lone atom has no edges, whose layers then add nothing
        for change in ({"epoch": 1}, {"sample": 1}, {"keys": [1, 2, 3, 4]}):
            other = evaluate(potential, atoms, mode, **change)
            assert ((other.energy - together.energy).abs() > 1e-6).all()

    def test_rotation(self, case: str) -> None:
        potential, atoms = make(case), structures()[1]
        turned = atoms.copy()
        turned.rotate(40, (1, 2, 3))
        rotation = np.linalg.lstsq(atoms.positions, turned.positions, rcond=None)[0]
        for mode in modes(case):
            a, b = (evaluate(potential, [s], mode) for s in (atoms, turned))
            torch.testing.assert_close(a.energy, b.energy, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(a.forces @ torch.as_tensor(rotation), b.forces, rtol=1e-9, atol=1e-9)

    def test_two_copies_far_apart_are_the_sum(self, case: str) -> None:
        """Extensive: one weight sample, and one law of its size, serves the whole structure."""
        potential, one = make(case), molecule("CH3OH")
        far = one.copy()
        far.positions += [50.0, 0, 0]
        for mode in modes(case, row_noise=False):
            single, double = (evaluate(potential, [a], mode, keys=[1]) for a in (one, one + far))
            torch.testing.assert_close(double.energy, 2 * single.energy, rtol=1e-13, atol=0)
            torch.testing.assert_close(double.forces, single.forces.repeat(2, 1), rtol=1e-11, atol=1e-11)

    def test_without_spread_it_is_the_mean(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        potential = make(case)
        if CASES[case]["family"] == "adaptive":
            posterior = potential.posterior
            monkeypatch.setattr(posterior, "_centre", -float("inf"))
        elif case == "posthoc_laplace":
            monkeypatch.setattr(LaplacePosterior, "ready", True)
            potential.posterior.prior_std.zero_()
        elif case == "pathwise":
            potential.posterior.directions.zero_()
            monkeypatch.setattr(PathwisePosterior, "ready", True)
        elif case == "sketch":
            potential.posterior.samples.zero_()
            monkeypatch.setattr(SketchPosterior, "ready", True)
        elif case == "subspace":
            potential.posterior.scale.zero_()
            monkeypatch.setattr(SubspacePosterior, "ready", True)
        else:
            with torch.no_grad():
                for p in potential.posterior.parameters():
                    p.fill_(-torch.inf)
        off = evaluate(potential, structures(), "off")
        for mode in modes(case):
            noisy = evaluate(potential, structures(), mode)
            for name in ("energy", "forces", "stress"):
                found, expected = (torch.nan_to_num(getattr(o, name)) for o in (noisy, off))
                # bit for bit, but where every structure has a product of its own, which rounds by itself
                close = 1e-14 if mode == "structure" else 0.0
                torch.testing.assert_close(found, expected, rtol=100 * close, atol=close, msg=mode)

    def test_saved_and_loaded(self, case: str, tmp_path: Any) -> None:
        potential = make(case)
        save_model(potential, tmp_path / "model")
        again = blip_ft.load(tmp_path)
        for before, after in zip(
            predict_atoms(potential, structures()), predict_atoms(again, structures()), strict=True
        ):
            for key, value in before.items():
                if value is not None:
                    np.testing.assert_array_equal(after[key], value)
        assert again.kl().item() == potential.kl().item()

    def test_calculator(self, case: str) -> None:
        atoms = structures()[0]
        atoms.calc = BlipCalculator(make(case))
        std = atoms.calc.get_property("forces_std", atoms)
        assert atoms.calc.get_property("energy_std", atoms) > 0
        assert (std > 0).all()
        # mean forces are the gradient of the mean energy
        h, moved = 1e-4, []
        for sign in (1, -1):
            a = atoms.copy()
            a.positions[1, 2] += sign * h
            a.calc = atoms.calc
            moved.append(a.get_potential_energy())
        assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(-atoms.get_forces()[1, 2], rel=1e-5)

    def test_float32(self, case: str) -> None:
        exact, rounded = (
            evaluate(p, structures(), "draw", draw=1) for p in (make(case), make(case).to_dtype("float32"))
        )
        torch.testing.assert_close(rounded.energy, exact.energy, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(rounded.forces.double(), exact.forces, rtol=1e-3, atol=1e-3)


def nve(potential: BayesianPotential, mode: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Total and kinetic energy (eV) along a trajectory of water, velocity Verlet at 0.5 fs.

    Edges join all pairs, near or not: beyond the cutoff they add nothing, so the list never changes.
    """
    atoms = molecule("H2O")
    batch = potential.backbone.batch([atoms])
    pairs = torch.tensor([[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]])
    batch.graph["edge_index"], batch.rows["edge"] = pairs, torch.zeros(6, dtype=torch.int64)
    masses = torch.as_tensor(atoms.get_masses())[:, None]
    velocity = torch.as_tensor(np.random.default_rng(0).normal(size=(3, 3)))
    velocity = velocity * (units.kB * 600 / masses).sqrt()
    x, dt = torch.as_tensor(atoms.positions), 0.5 * units.fs

    def evaluate_at(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        batch.graph["edge_vec"] = x[pairs[1]] - x[pairs[0]]
        with torch.no_grad():
            out = potential(batch, Noise(mode, draw=1 if mode == "draw" else None))
        assert out.forces is not None
        return out.energy.item(), out.forces

    total, kinetic = [], []
    energy, force = evaluate_at(x)
    for _ in range(steps):
        velocity = velocity + 0.5 * dt * force / masses
        x = x + dt * velocity
        energy, force = evaluate_at(x)
        velocity = velocity + 0.5 * dt * force / masses
        kinetic.append(float(0.5 * (masses * velocity.square()).sum()))
        total.append(energy + kinetic[-1])
    return np.array(total), np.array(kinetic)


@pytest.fixture(scope="module")
def base_path() -> tuple[np.ndarray, np.ndarray]:
    """Energies of the base model along 2000 steps."""
    options = ModelConfig(adapter="fake", checkpoint="tiny")
    return nve(BayesianPotential(FakeBackbone(), options, PosteriorConfig()), "off", 2000)


@pytest.mark.default
@pytest.mark.parametrize(
    "case", ["channel", "weight, dropout", "adaptive", "pathwise", "sketch", "subspace", "posthoc_laplace"]
)
def test_a_draw_conserves_energy_like_the_base_model(
    case: str, base_path: tuple[np.ndarray, np.ndarray]
) -> None:
    """2000 steps of NVE; the error of the total energy is that of the integrator, without drift.

    ``adaptive`` is the hard case: its draw is no set of weights, and alpha moves with the atoms.
    """
    base, base_kinetic = base_path
    draw, kinetic = nve(make(case), "draw", 2000)
    for path, moved in ((base, base_kinetic), (draw, kinetic)):
        assert np.ptp(moved) > 30 * np.ptp(path)
        drift = abs(path[1000:].mean() - path[:1000].mean())
        assert drift < 0.1 * np.ptp(path)
    assert np.ptp(draw) < 3 * np.ptp(base)
    assert np.abs(kinetic - base_kinetic).max() > 0.01  # another potential


class TestFlipout:
    @pytest.mark.parametrize("family", ["pathwise", "sketch", "subspace"])
    def test_refused_for_correlated_weights(self, family: str) -> None:
        with pytest.raises(ValidationError, match="mode"):
            PosteriorConfig(family=family, mode="flipout")

    def test_refused_for_layers_without_channels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(VariationalLayer, "channels", lambda self: None)
        for options in ({"family": "weight", "mode": "flipout"}, {"family": "adaptive"}):
            with pytest.raises(ConversionError, match=r"embedding"):
                BayesianPotential(
                    FakeBackbone(),
                    ModelConfig(adapter="fake", checkpoint="tiny"),
                    PosteriorConfig(prior_scale=0.1, **options),
                )


def test_draws_that_are_no_weights_are_not_exported(tmp_path: Any) -> None:
    with pytest.raises(BlipError, match="depend on each layer's input"):
        export_native(make("adaptive"), tmp_path / "export", draws=2)


def test_moments_are_those_of_the_draws() -> None:
    potential = make("adaptive")
    batch = potential.backbone.batch(structures())
    draws = torch.stack([potential(batch, Noise("draw", draw=k)).energy.detach() for k in range(4)])
    moments = predict_batch(potential, batch)
    torch.testing.assert_close(moments.mean.energy, draws.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.energy_std, draws.std(dim=0, correction=0))


REFUSED = {
    f"{option} with {family}": ([f"posterior.family={family}", option], option.partition("=")[0])
    for family in ("pathwise", "sketch", "subspace")
    for option in (
        "posterior.mode=flipout",
        "posterior.prior=dropout",
        "posterior.empirical_bayes=true",
        "objective.kind=crps",
    )
} | {
    "empirical Bayes of adaptive": (
        ["posterior.family=adaptive", "posterior.prior_scale=0.1", "posterior.empirical_bayes=true"],
        "posterior.empirical_bayes",
    ),
    "one draw for the CRPS": (
        ["posterior.family=weight", "objective.kind=crps", "objective.draws=1"],
        "objective.draws",
    ),
    "learned noise with the CRPS": (
        ["posterior.family=weight", "objective.kind=elbo+crps", "objective.learn_noise=true"],
        "objective.learn_noise",
    ),
    "replay without its objective": (["objective.frames=x.extxyz"], "objective.frames"),
    "nothing to compare on": (
        ["objective.kind=function_kl", "posterior.perturbed_share=0"],
        "objective.frames",
    ),
    "adaptive without a scale": (["posterior.family=adaptive"], "posterior.prior_scale"),
    "adaptive that starts outside its clamp": (
        ["posterior.family=adaptive", "posterior.prior_scale=0.1", "posterior.init_std=0.5"],
        "posterior.init_std",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_combinations_that_make_no_sense(case: str) -> None:
    from blip_ft.config import apply_override

    overrides, field = REFUSED[case]
    tree: dict[str, Any] = {
        "name": "x",
        "data": {"train": "frames.extxyz"},
        "model": {"adapter": "fake", "checkpoint": "tiny"},
    }
    for override in overrides:
        apply_override(tree, override)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree)
    assert caught.value.field == field
    assert caught.value.remedy
