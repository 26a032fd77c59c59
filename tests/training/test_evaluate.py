"""How a trained model is judged."""

from __future__ import annotations

import pytest

from blip_ft.config import load_recipe
from blip_ft.training.evaluate import draws_of


@pytest.mark.parametrize(
    ("name", "draws", "expected"),
    [("far", 16, 16), ("calibration", 16, 32), ("calibration", 128, 128), ("calibration", 0, 0)],
)
def test_more_draws_on_calibration_frames(name: str, draws: int, expected: int) -> None:
    """Never fewer than elsewhere, and none for the mean model."""
    assert draws_of(load_recipe("sio2_sevennet"), name, draws) == expected
