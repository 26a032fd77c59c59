"""Progress of work without epochs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from blip_ft.system import progress as module
from blip_ft.system.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_log(clock: list[float]) -> None:
    """A line after 30 seconds and no sooner, with what is left at the present speed; none at the end."""
    out = io.StringIO()
    with progress(Console(file=out, width=100), "predicting", 40) as advance:
        for clock[0], frames in ((10.0, 5), (40.0, 5), (60.0, 5), (75.0, 10), (120.0, 15)):
            advance(frames)
    assert out.getvalue().splitlines() == [
        "predicting: 10/40 frames  120 s left",
        "predicting: 25/40 frames  45 s left",
    ]


@pytest.mark.parametrize("bar", [True, False])
def test_bar_on_a_terminal(clock: list[float], *, bar: bool) -> None:
    """A bar, or lines where another bar is drawn already."""
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    with progress(console, "predicting", 4, bar=bar) as advance:
        clock[0] = 31.0
        advance(2)
    assert "predicting" in out.getvalue()
    assert ("2/4 frames" in out.getvalue()) is not bar
