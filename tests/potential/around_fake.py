"""A potential around the fake backbone, and ways to evaluate it."""

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, molecule

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.families.registry import without_foreign_keys
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.variational.noise import Noise

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
        PosteriorConfig(
            **without_foreign_keys(
                {"family": family, "mode": mode, "prior_scale": prior_scale, "init_std": init_std, "rank": 12}
            )
        ),
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


#: options of the noise among those of a call
NOISE = ("epoch", "step", "sample", "draw", "latent")


def batch_of(potential, atoms, keys=None):
    batch = potential.backbone.batch(atoms)
    batch.keys = [1000 + i for i in range(len(atoms))] if keys is None else keys
    return batch


def evaluate(potential, atoms, mode="draw", keys=None, stress=True, **options):
    noise = Noise(mode, **{k: options.pop(k) for k in NOISE if k in options})
    return potential(batch_of(potential, atoms, keys), noise, stress=stress, **options)


def same(one, other, tolerance=0.0):
    for a, b in ((one.energy, other.energy), (one.forces, other.forces), (one.stress, other.stress)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
