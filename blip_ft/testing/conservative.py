"""The contract of backbones whose forces and stress are derivatives of their energy."""

from __future__ import annotations

import copy
from typing import ClassVar

import numpy as np
import pytest
import torch

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.contract import AdapterContract
from blip_ft.testing.helpers import array, close, energies, evaluate, same, trainable
from blip_ft.uncertainty import linearized


class ConservativeContract(AdapterContract):
    """Derivatives, and the modes of autograd."""

    #: of finite differences, Å and strain; small for a model whose energy has kinks
    step: ClassVar[float] = 1e-4

    @pytest.mark.parametrize("name", ["quartz", "ethanol", "slab"])
    def test_forces_are_the_gradient_of_the_energy(self, backbone, structures, name):
        atoms, step = structures[name], self.step
        moves = [(0, 0), (0, 1), (1, 2), (len(atoms) - 1, 0)]
        frames = []
        for (atom, axis), sign in [(m, s) for m in moves for s in (1, -1)]:
            frames.append(atoms.copy())
            frames[-1].positions[atom, axis] += sign * step
        energy = array(energies(backbone, frames)).reshape(-1, 2)
        numeric = -(energy[:, 0] - energy[:, 1]) / (2 * step)
        analytic = array(evaluate(backbone, atoms).forces)[tuple(zip(*moves, strict=True))]
        np.testing.assert_allclose(analytic, numeric, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("name", ["quartz", "periodic_atom"])
    def test_stress_is_the_strain_derivative(self, backbone, structures, name):
        atoms, step = structures[name], self.step
        frames = []
        for i, j in [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]:
            for sign in (1, -1):
                strain = np.zeros((3, 3))
                strain[i, j] += sign * step / 2
                strain[j, i] += sign * step / 2
                frames.append(atoms.copy())
                frames[-1].set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        energy = array(energies(backbone, frames)).reshape(-1, 2)
        numeric = (energy[:, 0] - energy[:, 1]) / (2 * step) / atoms.cell.volume
        np.testing.assert_allclose(array(evaluate(backbone, atoms).stress[0]), numeric, rtol=0, atol=1e-6)

    def test_the_energy_can_be_differentiated_after_the_forces(self, backbone, quartz):
        prediction = backbone(backbone.batch([quartz]))
        assert not prediction.forces.requires_grad
        weights = trainable(backbone)
        grads = torch.autograd.grad(prediction.energy.sum(), weights, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in grads)

    def test_forces_can_be_differentiated_by_the_weights(self, backbone, quartz):
        model = copy.deepcopy(backbone)
        batch, generator = model.batch([quartz]), torch.Generator().manual_seed(0)
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trainable(model)]
        direction = [
            d * p.detach().std(correction=0) for d, p in zip(direction, trainable(model), strict=True)
        ]
        mask = torch.randn(len(quartz), 3, generator=generator, dtype=torch.float64)

        def projection(amount: float, **options: bool) -> torch.Tensor:
            with torch.no_grad():
                for p, d in zip(trainable(model), direction, strict=True):
                    p += amount * d
            prediction = model(batch, **options)
            stress = torch.nan_to_num(prediction.stress).sum() if prediction.stress is not None else 0.0
            return (prediction.forces * mask).sum() + stress

        value = projection(0.0, create_graph=True)
        grads = torch.autograd.grad(value, trainable(model), allow_unused=True)
        analytic = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None)
        step = 1e-5
        numeric = (projection(step) - projection(-2 * step)) / (2 * step)
        assert analytic.item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-6)

    def test_one_backward_call_gives_forces_and_weight_gradients(self, backbone, quartz):
        batch = backbone.batch([quartz])
        expected = backbone(batch)
        evaluation = backbone.energy_of(batch)
        leaves, weights = evaluation.leaves, trainable(backbone)
        grads = torch.autograd.grad(evaluation.energy.sum(), (*leaves, *weights), allow_unused=True)
        forces, stress = backbone.assemble(batch, grads[: len(leaves)])
        close(forces, expected.forces, 1e-12)
        close(stress, expected.stress, 1e-12)
        again = torch.autograd.grad(expected.energy.sum(), weights, allow_unused=True)
        for one, two in zip(grads[len(leaves) :], again, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("noise", ["all", "scalar"])
    def test_gradients_of_each_structure_come_with_the_forces(
        self, backbone, quartz, ethanol, noise, monkeypatch
    ):
        def second_evaluation(*args):
            raise AssertionError("a converted layer leaves no tap")

        options = ModelConfig(adapter=backbone.name, checkpoint="-", noise=noise)
        posterior = PosteriorConfig(family="channel", prior_scale=0.1)
        potential = BayesianPotential(copy.deepcopy(backbone), options, posterior)
        from_leaves = linearized._from_leaves
        monkeypatch.setattr(linearized, "_from_leaves", second_evaluation)
        batch = potential.backbone.batch([quartz, ethanol])
        batch.keys = [0, 1]
        prediction, gradients = linearized.energy_gradients(potential, batch)
        same(prediction, potential(batch, stress=True), 1e-10)
        for name, expected in from_leaves(potential, batch).items():
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(gradients[name], expected, rtol=1e-6, atol=1e-9 * scale)

    def test_forces_under_no_grad(self, backbone, quartz):
        with torch.no_grad():
            prediction = backbone(backbone.batch([quartz]))
        assert not any(v.requires_grad for v in vars(prediction).values() if v is not None)
        same(prediction, evaluate(backbone, quartz), 1e-12)

    def test_inference_mode_says_what_to_do(self, backbone, quartz):
        batch = backbone.batch([quartz])
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
            backbone(batch)

    def test_an_isolated_atom_with_frozen_weights(self, backbone, boxed_atom):
        model = copy.deepcopy(backbone).requires_grad_(False)
        same(evaluate(model, boxed_atom), evaluate(backbone, boxed_atom), 1e-12)

    def test_gradients_stay_finite_where_stress_is_missing(self, backbone, ethanol, quartz):
        model = copy.deepcopy(backbone)
        prediction = model(model.batch([ethanol, quartz]), create_graph=True)
        (prediction.stress[1].square().sum() + prediction.forces.square().sum()).backward()
        grads = [p.grad for p in trainable(model) if p.grad is not None]
        assert grads
        assert all(torch.isfinite(g).all() for g in grads)
