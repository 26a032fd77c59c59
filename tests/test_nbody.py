"""The N-body benchmark: its physics, its networks, and every method through a few steps."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.nbody import data, run
from benchmarks.nbody.data import Samples, energy, force, simulate, start
from benchmarks.nbody.models import MODELS, ROWS, rows_of
from blip_ft.variational.convert import matches


def few(count: int = 6) -> Samples:
    position, velocity, charge = start(count, 5)
    parts = (position, velocity, charge, position + velocity)
    return Samples(*(torch.from_numpy(p).float() for p in parts))


def options() -> argparse.Namespace:
    return argparse.Namespace(kl=1e-4, dropout=0.1, rate=1e-3)


def test_two_charges_attract_and_repel_by_coulombs_law():
    position = np.zeros((1, 5, 3))
    position[0, :, 0] = [0.0, 2.0, 1e6, 2e6, 3e6]
    for sign in (1.0, -1.0):
        charge = np.array([[1.0, sign, 1.0, 1.0, 1.0]])
        assert force(position, charge)[0, 0] == pytest.approx([-sign / 4, 0, 0], abs=1e-10)


def test_energy_and_momentum_are_conserved(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "FIRST", 100)
    monkeypatch.setattr(data, "LAST", 200)
    position, velocity, charge = start(4, 0)
    made = simulate(4, 0)
    after = energy(made.position.numpy(), made.velocity.numpy(), charge)
    assert after == pytest.approx(energy(position, velocity, charge), rel=0.02, abs=0.02)
    assert made.velocity.sum(dim=1).numpy() == pytest.approx(velocity.sum(axis=1), abs=1e-4)


def test_a_sample_does_not_depend_on_how_many_there_are():
    for few_ones, many in zip(start(2, 3), start(7, 3), strict=True):
        assert np.array_equal(few_ones, many[:2])


def test_egnn_turns_with_its_input():
    model, batch = MODELS["egnn"]().double(), few()
    batch = Samples(*(part.double() for part in vars(batch).values()))
    turn = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    turned = Samples(batch.position @ turn + 1, batch.velocity @ turn, batch.charge, batch.target)
    torch.testing.assert_close(model(turned), model(batch) @ turn + 1)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_knows_what_its_rows_are(name: str):
    linear = [n for n, m in MODELS[name]().named_modules() if isinstance(m, torch.nn.Linear)]
    for layer in linear:
        assert sum(matches([pattern], layer) for pattern in ROWS.values()) == 1, layer


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("name", run.METHODS)
def test_every_method_trains_and_has_a_spread(name: str, architecture: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "SAMPLES", 4)
    batch: Any = few()
    method = run.METHODS[name](architecture, 0, options())
    untrained = MODELS[architecture]
    torch.manual_seed(0)
    torch.testing.assert_close(method.mean(batch), untrained()(batch))  # step 0 is the network
    run.train(method, batch, batch, 2)
    drawn = run.predict([method], batch)
    assert drawn.shape[1:] == batch.target.shape
    assert (len(drawn) > 1) == method.bayesian
    found = run.scores(drawn, drawn, batch, batch)
    assert np.isfinite([found["mse_x10"], found["nll"], found["crps"]]).all()
    if method.bayesian:
        assert (drawn.std(dim=0) > 0).all()


def test_the_factor_makes_a_known_spread_honest():
    random = torch.Generator().manual_seed(0)
    many = Samples(
        torch.zeros(400, 5, 3),
        torch.randn(400, 5, 3, generator=random),
        torch.ones(400, 5),
        torch.zeros(400, 5, 3),
    )
    target = Samples(many.position, many.velocity, many.charge, torch.randn(400, 5, 3, generator=random))
    drawn = 0.5 * torch.randn(200, 400, 5, 3, generator=random)  # half as wide as the labels scatter
    found = run.scores(drawn, drawn, target, target)
    assert found["factor"] == pytest.approx(2.0, rel=0.03)
    assert found["coverage90"] == pytest.approx(0.9, abs=0.02)
    assert found["crps"] == pytest.approx(1 / np.sqrt(np.pi), rel=0.05)
    assert rows_of(3)["edge"].bincount().tolist() == [20, 20, 20]
