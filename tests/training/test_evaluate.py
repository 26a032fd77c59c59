"""How a trained model is judged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from blip_ft.config import UncertaintyConfig
from blip_ft.training.evaluate import draws_of


@pytest.mark.parametrize(
    ("name", "draws", "expected"),
    [("far", 16, 16), ("calibration", 16, 64), ("calibration", 128, 128), ("calibration", 0, 0)],
)
def test_more_draws_on_calibration_frames(name: str, draws: int, expected: int) -> None:
    """Never fewer than elsewhere, and none for the mean model."""
    recipe = SimpleNamespace(uncertainty=UncertaintyConfig())
    assert draws_of(recipe, name, draws) == expected  # type: ignore[arg-type]
