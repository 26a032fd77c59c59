"""What all runs of these tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports make their figures but do not render them.

    Rendering takes most of a run on the fake backend; tests/report and tests/cli do it.
    """
    monkeypatch.setattr("blip_ft.report.html.to_svg", lambda figure, title: f"<svg><!-- {title} --></svg>")
