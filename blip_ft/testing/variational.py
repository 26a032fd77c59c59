"""What must hold on every backbone once its weights are random variables."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation

from blip_ft.backbones.protocol import Backbone
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import save_model
from blip_ft.potential.distance import FeatureDistance
from blip_ft.potential.export import member
from blip_ft.system.side_by_side import side_by_side
from blip_ft.testing.helpers import array, close, evaluate, rotation_defect, same
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.predict import predict_atoms
from blip_ft.variational.convert import convert, unload
from blip_ft.variational.noise import Noise

#: relative size of the perturbation of all weights by a draw, and of the trained mean's change
SPREAD, MOVED = 0.03, 0.02
#: a defect of symmetry below this is rounding, whatever the stock model's happens to be
ROUNDING = 1e-11


def bayesian(backbone: Backbone, rank: int = 3) -> BayesianPotential:
    """A copy with all convertible weights trained and noisy, as if fitted: moved mean, known spread."""
    potential = BayesianPotential(
        copy.deepcopy(backbone),
        ModelConfig(adapter=backbone.name, checkpoint="-", dtype="float64"),
        PosteriorConfig(family="subspace", prior_scale=0.3, rank=rank),
        n_draws=3,
    )
    generator = torch.Generator().manual_seed(11)
    directions = potential.posterior.directions
    shape, n = directions.shape, directions.shape[1]
    rows = torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        directions.copy_(rows.half())
        potential.posterior.scale.copy_(SPREAD * (n / rank) ** 0.5 * torch.eye(rank, dtype=torch.float64))
        for name, delta in potential.converted.deltas.items():
            noise = torch.randn(delta.shape, generator=generator, dtype=torch.float64)
            delta.add_(MOVED * noise * potential.prior.rms(name))
    elements = sorted(backbone.elements & {8, 14}) or sorted(backbone.elements)[:2]
    potential.references = {z: 1.0 + 0.5 * z for z in elements}
    return potential.eval()


def distance_from(potential: BayesianPotential, atoms: Atoms) -> FeatureDistance:
    """A score fitted to rattled copies of a structure, each a group of its own."""
    frames = []
    for seed in range(5):
        frames.append(atoms.copy())
        frames[-1].rattle(0.05, seed=seed)
    if not potential.backbone.equivariant:  # as fit_distance does
        frames += [turned(a, 20 + i)[0] for i, a in enumerate(frames)]
    batch = potential.backbone.batch(frames)
    with torch.no_grad():
        features = potential(batch, forces=False).node_features
    assert features is not None, "the adapter gives no features"
    owners = [str(i % 5) for i in batch.structure.tolist()]
    return FeatureDistance.fit(array(features), array(batch.numbers), owners)


def turned(atoms: Atoms, seed: int) -> tuple[Atoms, np.ndarray]:
    """A rotated copy and the rotation."""
    turn = Rotation.random(random_state=seed).as_matrix()
    out = atoms.copy()
    out.set_cell(atoms.cell.array @ turn.T)
    out.set_positions(atoms.positions @ turn.T)
    return out, turn


class VariationalContract:
    """Conversion, noise, draws and files; see the module's text."""

    @pytest.fixture(scope="class")
    @classmethod
    def potential(cls, backbone: Backbone, quartz: Atoms) -> BayesianPotential:
        """With noise on all weights, in float64."""
        out = bayesian(backbone)
        out.ood = distance_from(out, quartz)
        return out

    # ---- conversion ----------------------------------------------------------------------
    def test_unloading_gives_the_original_bit_for_bit(self, native):
        model = copy.deepcopy(native)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        convert(model)
        assert model.state_dict().keys() != before.keys()
        unload(model, merge=False)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def test_the_converted_model_is_the_stock_model(self, backbone, stock, quartz, ethanol):
        model = copy.deepcopy(backbone)
        convert(model)
        for atoms in (quartz, ethanol):
            theirs = atoms.copy()
            theirs.calc = stock
            ours = evaluate(model, atoms)
            assert ours.energy.item() == pytest.approx(theirs.get_potential_energy(), abs=1e-9 * len(atoms))
            np.testing.assert_allclose(array(ours.forces), theirs.get_forces(), rtol=0, atol=1e-9)

    # ---- noise ---------------------------------------------------------------------------
    def test_several_threads_at_the_same_time(self, potential, quartz, ethanol):
        """As parts of a batch are evaluated: each thread has its noise and its gradients."""
        before = torch.get_num_threads()
        frames = [quartz.copy(), ethanol.copy(), quartz.copy(), ethanol.copy()]
        for n, atoms in enumerate(frames):
            atoms.rattle(0.02, seed=n)
        deltas = [d for d in potential.converted.deltas.values() if d.requires_grad]

        def values(n: int) -> list[torch.Tensor]:
            batch = potential.backbone.batch([frames[n]])
            batch.keys = [n]
            out = potential(batch, Noise("structure"), create_graph=True)
            loss = out.energy.sum() + out.forces.square().sum()
            grads = torch.autograd.grad(loss, deltas, allow_unused=True)
            return [out.energy, out.forces, *(g for g in grads if g is not None)]

        torch.set_num_threads(2)
        try:
            found = side_by_side(values, list(range(4)) * 2)
        finally:
            torch.set_num_threads(before)
        expected = [values(n) for n in range(4)]
        for ours, theirs in zip(found, expected * 2, strict=True):
            assert len(ours) == len(theirs) > 2
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.detach().abs().max() + 1))

    def test_four_calculators_of_one_potential_in_four_threads(self, potential, quartz, ethanol):
        """Energies, forces and stds are those of one thread; standard output is what it was."""
        frames = [quartz.copy(), ethanol.copy(), quartz.copy(), ethanol.copy()]
        for n, atoms in enumerate(frames):
            atoms.rattle(0.03, seed=10 + n)

        def values(n: int) -> dict[str, Any]:
            atoms = frames[n].copy()
            atoms.calc = BlipCalculator(potential, n_draws=2 if n == 3 else 3)
            for _ in range(2):  # steps, as of dynamics
                atoms.positions += 0.001
                atoms.get_forces()
            return {k: atoms.calc.results[k] for k in ("energy", "energy_std", "forces", "forces_std")}

        expected, output, dtype = [values(n) for n in range(4)], sys.stdout, torch.get_default_dtype()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(values, list(range(4)) * 2))
        assert sys.stdout is output
        assert torch.get_default_dtype() == dtype
        for ours, theirs in zip(found, expected * 2, strict=True):
            for key, value in theirs.items():
                np.testing.assert_allclose(ours[key], value, rtol=1e-6, atol=1e-9, err_msg=key)

    def test_a_draw_is_the_stock_model_with_other_weights(self, potential, quartz):
        batch = potential.backbone.batch([quartz])
        energies = []
        for draw in (None, 0, 2):
            plain = member(potential, draw, n_draws=3, amplitude=potential.amplitude)
            mode = "off" if draw is None else "draw"
            noisy = potential(batch, Noise(mode, draw=draw), stress=True)
            noisy.energy = noisy.energy - potential.reference_energy(batch)
            stock = evaluate(plain, quartz)
            stock.energy = stock.energy.double()
            if noisy.node_energy is not None:
                noisy.node_energy = noisy.node_energy - potential._atom_references(batch)
                stock.node_energy = stock.node_energy.double()
            same(noisy, stock, 1e-9)
            energies.append(noisy.energy.item())
        assert np.ptp(energies) > 1e-4, "the noise does nothing"

    def test_structure_noise_is_one_sample_of_all_weights_per_structure(
        self, potential, quartz, ethanol, boxed_atom
    ):
        frames, keys = [ethanol, quartz, boxed_atom], [7, 5, 6]
        batch = potential.backbone.batch(frames)
        batch.keys = keys
        noisy, start = potential(batch, Noise("structure", epoch=3), stress=False), 0
        for index, (atoms, key) in enumerate(zip(frames, keys, strict=True)):
            latent = potential.posterior.latent([("structure", 0, 3, key)], torch.float64)
            sample = {name: w[0] for name, w in potential.posterior.sample(latent).items()}
            plain = copy.deepcopy(potential.backbone)
            unload(plain, merge=True, perturbation=sample)
            stock, stop = evaluate(plain, atoms), start + len(atoms)
            shift = sum(potential.references.get(int(z), 0.0) for z in atoms.numbers)
            assert noisy.energy[index].item() == pytest.approx(stock.energy.item() + shift, abs=1e-9)
            close(noisy.forces[start:stop], stock.forces, 1e-9)
            start = stop

    # ---- symmetry ------------------------------------------------------------------------
    def test_mean_and_draws_are_as_equivariant_as_the_stock_model(self, backbone, potential, quartz):
        def defect(evaluated):
            worst = np.zeros(3)
            before = evaluated(quartz)
            for seed in (1, 2, 3):
                other, turn = turned(quartz, seed)
                after = evaluated(other)
                forces = array(after.forces) - array(before.forces) @ turn.T
                off = [abs(after.energy.item() - before.energy.item()), np.abs(forces).max(), 0.0]
                if before.stress is not None:
                    a, b = (_matrix(x.stress[0]) for x in (after, before))
                    off[2] = np.abs(a - turn @ b @ turn.T).max()
                worst = np.maximum(worst, off)
            return worst

        def drawn(draw):
            mode = "off" if draw is None else "draw"
            stress = backbone.has_stress
            return lambda a: potential(potential.backbone.batch([a]), Noise(mode, draw=draw), stress=stress)

        stock = defect(lambda a: evaluate(backbone, a))
        for draw in (None, 0, 1, 2):
            assert (defect(drawn(draw)) <= 2 * stock + ROUNDING).all(), (draw, defect(drawn(draw)), stock)

    def test_structure_noise_turns_with_the_structure(self, potential, quartz):
        other, turn = turned(quartz, 4)
        batch = potential.backbone.batch([quartz, other])
        batch.keys = [9, 9]  # the same noise
        out = potential(batch, Noise("structure"))
        n, size = len(quartz), float(out.forces.abs().max())
        tolerance = 100 * getattr(self, "invariance", 1e-9) * max(1.0, size)
        if not getattr(self, "equivariant", True):
            stock = rotation_defect(lambda a: evaluate(potential.backbone, a), quartz, other, turn)
            tolerance += 2 * float(stock[:2].max())
        assert out.energy[1].item() == pytest.approx(out.energy[0].item(), abs=tolerance)
        np.testing.assert_allclose(
            array(out.forces[n:]), array(out.forces[:n]) @ turn.T, rtol=0, atol=tolerance
        )

    def test_force_covariance_turns_with_the_structure(self, potential, quartz):
        other, turn = turned(quartz, 5)
        a, b = predict_atoms(potential, [quartz, other])
        scale = a["forces_cov"].max()
        tolerance = 1e4 * getattr(self, "invariance", 1e-9) * scale
        np.testing.assert_allclose(b["forces_cov"], turn @ a["forces_cov"] @ turn.T, rtol=0, atol=tolerance)
        np.testing.assert_allclose(a["forces_std_norm"], b["forces_std_norm"], rtol=1e-4)
        assert b["energy_std"] == pytest.approx(a["energy_std"], rel=1e-4)

    # ---- out-of-distribution score -------------------------------------------------------
    def test_the_score_does_not_depend_on_orientation_numbering_or_batch(self, potential, quartz, ethanol):
        assert potential.backbone.equivariant == getattr(self, "equivariant", True)
        other, _ = turned(quartz, 6)
        order = np.random.default_rng(1).permutation(len(quartz))
        frames = [quartz, ethanol, other, quartz[order]]
        for options in ({}, {"n_draws": 0}, {"method": "energy"}):
            together = predict_atoms(potential, frames, **options)
            alone = [predict_atoms(potential, [a], **options)[0] for a in frames]
            for one, two in zip(together, alone, strict=True):
                np.testing.assert_allclose(one["ood_score"], two["ood_score"], rtol=1e-6)
                assert one["ood_score_max"] == one["ood_score"].max()
            plain, _, rotated, permuted = (item["ood_score"] for item in together)
            assert plain.shape == (len(quartz),)
            np.testing.assert_allclose(permuted, plain[order], rtol=1e-6)
            if potential.backbone.equivariant:
                np.testing.assert_allclose(rotated, plain, rtol=1e-5)
            else:  # its features change; the training frames' did too
                assert 0.5 < np.median(rotated) / np.median(plain) < 2

    def test_the_score_tells_the_training_structure_from_others(self, potential, quartz, ethanol):
        """At the mean weights, whose features those of draws are to first order."""
        dense = quartz.copy()
        dense.set_cell(0.85 * dense.cell.array, scale_atoms=True)
        own, far, alien = predict_atoms(potential, [quartz, dense, ethanol], n_draws=0)
        assert own["ood_score_max"] < 3
        assert np.median(far["ood_score"]) > 2 * np.median(own["ood_score"])
        assert np.isinf(alien["ood_score"]).tolist() == [z not in (8, 14) for z in ethanol.numbers]
        assert alien["ood_score_max"] == np.inf

    # ---- references and files ------------------------------------------------------------
    def test_references_act_in_the_assembled_model(self, potential, quartz):
        batch = potential.backbone.batch([quartz])
        before = evaluate(member(potential, None), quartz).energy.item()
        shift = sum(potential.references[int(z)] for z in quartz.numbers)
        assert potential(batch).energy.item() == pytest.approx(before + shift, abs=1e-9)

    @pytest.fixture(scope="class")
    @classmethod
    def elsewhere(
        cls, potential: BayesianPotential, quartz: Atoms, tmp_path_factory: pytest.TempPathFactory
    ) -> dict[str, Any]:
        """What another process says of the saved model, and what it had imported with the adapter alone."""
        folder = tmp_path_factory.mktemp("elsewhere")
        save_model(potential, folder / "model")
        quartz.write(folder / "quartz.json")
        adapter = type(potential.backbone).__module__
        command = [
            sys.executable,
            "-c",
            ELSEWHERE,
            adapter,
            str(folder / "model"),
            str(folder / "quartz.json"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def test_save_and_load_in_another_process(self, potential, quartz, elsewhere):
        (here,) = predict_atoms(potential, [quartz])
        assert elsewhere["energy"] == pytest.approx(here["energy"], abs=1e-9)
        assert elsewhere["energy_std"] == pytest.approx(here["energy_std"], rel=1e-6)
        np.testing.assert_allclose(elsewhere["forces"], here["forces"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(elsewhere["ood_score"], here["ood_score"], rtol=1e-6)


ELSEWHERE = """
import importlib, json, sys
adapter, folder, structure = sys.argv[1:]
importlib.import_module(adapter)
imported = sorted({name.partition(".")[0] for name in sys.modules})
from ase.io import read
from blip_ft.potential.checkpoint import load_model
from blip_ft.uncertainty.predict import predict_atoms
(found,) = predict_atoms(load_model(folder), [read(structure)])
answer = {key: found[key] for key in ("energy", "energy_std")}
answer |= {key: found[key].tolist() for key in ("forces", "ood_score")}
print(json.dumps(answer | {"imported": imported}))
"""


def _matrix(voigt: torch.Tensor) -> np.ndarray:
    xx, yy, zz, yz, xz, xy = array(voigt).tolist()
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
