"""What the stages of a run share beside its recipe and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from blip_ft.system.signals import Interrupts
from blip_ft.training.pieces import Pieces


@dataclass(frozen=True)
class Run:
    """How a stage is kept and ended.

    Attributes:
        pieces: where it is kept, and what is there from an earlier start; ``None``: nowhere.
        interrupts: signals that end it.
        begun: called when everything has been tried, before the first step.
    """

    pieces: Pieces | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    begun: Callable[[], object] = lambda: None
