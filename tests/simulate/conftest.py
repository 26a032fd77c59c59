"""The model of the module's tests."""

from __future__ import annotations

import pytest

from blip_ft.potential.bayesian import BayesianPotential

from .systems import model


@pytest.fixture(scope="session")
def potential() -> BayesianPotential:
    return model()
