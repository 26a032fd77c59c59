"""When a simulation has left what its model knows.

One number per atom is watched: the total std of its force, or its ``ood_score``. Above a first threshold a frame is
saved, to be labelled; above a second one, for a patience of several error bars in a row, the run ends; above
:data:`AT_ONCE` times the second it ends at once. Thresholds are numbers, or multiples of the level of the
calibration frames (``potential.levels``).

Error bars come every so many steps. The score comes with every evaluation, for nothing: where the largest one is above
twice its level and has grown by half since the last error bars, these are due at once (:meth:`Guard.due`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from blip_ft.errors import BlipError
from blip_ft.potential.levels import Levels

Signal = Literal["forces_std", "ood_score"]
#: in words, and units
WORDS = {"forces_std": ("total std of the force", " eV/Å"), "ood_score": ("ood_score", "")}
#: default thresholds, in levels of the calibration frames (docs/decisions.md)
SAVE, STOP = 2.0, 3.0
#: error bars above the threshold in a row that end a run
PATIENCE = 3
#: multiple of the threshold that ends a run at once
AT_ONCE = 2.0
#: scores above so many levels, and grown so much, ask for error bars
SUSPECT, GROWN = 2.0, 1.5


@dataclass(frozen=True)
class Threshold:
    """A number, or a multiple of the calibration frames' level."""

    value: float
    multiple: bool = False

    @classmethod
    def parse(cls, text: str, name: str) -> Threshold | None:
        """``0.3``, ``3x``, or ``off`` for none.

        Args:
            text: as the user wrote it.
            name: of the option.

        Raises:
            BlipError: none of these.
        """
        text = text.strip().lower()
        if text == "off":
            return None
        multiple = text.endswith("x")
        try:
            value = float(text[:-1] if multiple else text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise BlipError(
                f"'{text}' is no threshold",
                field=name,
                remedy="a number above 0 (eV/Å), a multiple of what calibration frames show (3x), or off",
            )
        return cls(value, multiple)


@dataclass(frozen=True)
class Limits:
    """Thresholds in the unit of the signal; ``None`` for none.

    Attributes:
        signal: what is watched.
        save: above it frames are saved.
        stop: above it the run ends.
        patience: error bars in a row.
        level: of the calibration frames, where known.
        suspect: score above which error bars may be due; infinite where its level is not known.
    """

    signal: Signal = "forces_std"
    save: float | None = None
    stop: float | None = None
    patience: int = PATIENCE
    level: float | None = None
    suspect: float = math.inf

    @classmethod
    def of(
        cls,
        levels: Levels | None,
        *,
        signal: Signal = "forces_std",
        save: str | None = None,
        stop: str | None = None,
        patience: int | None = None,
        available: bool = True,
    ) -> Limits:
        """Limits for a model.

        Args:
            levels: of its calibration frames.
            signal: what to watch.
            save: threshold as the user wrote it (:meth:`Threshold.parse`), ``None`` for the default.
            stop: likewise.
            patience: error bars in a row, ``None`` for the default.
            available: whether the run will have the signal.

        Raises:
            BlipError: a threshold that is none; a multiple of a level that is not known; thresholds in the wrong
                order; thresholds for a signal that there is not.
        """
        if patience is not None and patience < 1:
            raise BlipError(
                f"{patience} error bars in a row are none", field="--patience", remedy="1 or more"
            )
        if not available:
            if any(text not in (None, "off") for text in (save, stop)):
                raise BlipError(
                    f"a run of this model without error bars has no {signal} to watch",
                    field="--signal",
                    remedy="--draws 2 or more, --signal ood_score, or leave the thresholds out",
                )
            return cls(signal)
        level = None if levels is None else getattr(levels, signal)
        numbers: list[float | None] = []
        for name, text, default in (("--save-above", save, SAVE), ("--stop-above", stop, STOP)):
            threshold = Threshold(default, True) if text is None else Threshold.parse(text, name)
            if threshold is None or not threshold.multiple:
                numbers.append(None if threshold is None else threshold.value)
                continue
            if level is None:
                raise BlipError(
                    f"the model does not say which {signal} its calibration frames have: {threshold.value:g} times "
                    "that is unknown",
                    field=name,
                    remedy=f"give a number{' in eV/Å' if signal == 'forces_std' else ''}, or off; models of today's "
                    "fit say it",
                )
            numbers.append(threshold.value * level)
        low, high = numbers
        if low is not None and high is not None and low > high:
            raise BlipError(
                f"frames would be saved above {low:.3g}, but the run has ended above {high:.3g}",
                field="--save-above",
                remedy="give a smaller threshold for saving than for stopping",
            )
        score = None if levels is None else levels.ood_score
        suspect = math.inf if score is None else SUSPECT * score
        return cls(signal, low, high, PATIENCE if patience is None else patience, level, suspect)

    def describe(self) -> str:
        """For people."""
        words, unit = WORDS[self.signal]
        parts = [
            f"{what} above {value:.3g}{unit}"
            + (f" ({value / self.level:.3g} x calibration frames)" if self.level else "")
            for what, value in (("saves frames", self.save), ("stops", self.stop))
            if value is not None
        ]
        return f"guard: {words} of an atom; {', '.join(parts)}" if parts else "guard: off"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)


@dataclass
class Guard:
    """The guard of one run.

    Attributes:
        limits: thresholds.
        above: error bars in a row above the stopping threshold.
        since_saved: error bars since a frame was saved.
        suspicion: largest score at the last error bars.
        largest_std: largest total force std so far, eV/Å, and its atom.
        saved: frames saved so far.
        reason: why the run has ended, empty while it goes on.
        event: what the last error bars have led to: nothing, ``save`` or ``stop``.
        now: the least certain atom at the last error bars and its total force std, eV/Å.
    """

    limits: Limits
    above: int = 0
    since_saved: int | None = None
    suspicion: float = 0.0
    largest_std: float = 0.0
    worst_atom: int | None = None
    saved: int = 0
    reason: str = ""
    event: str = ""
    now: tuple[int, float] | None = None

    def due(self, scores: NDArray[np.float64] | None) -> bool:
        """Whether error bars are due though it is not their turn.

        Args:
            scores: (n,) ``ood_score`` of the atoms in this step.
        """
        if scores is None or not len(scores):
            return False
        worst = float(scores.max())
        return worst > self.limits.suspect and worst > GROWN * self.suspicion

    def see(
        self,
        step: int,
        numbers: NDArray[np.int64],
        forces_total: NDArray[np.float64] | None,
        scores: NDArray[np.float64] | None,
    ) -> None:
        """Look at error bars.

        Args:
            step: of the run.
            numbers: (n,) atomic numbers.
            forces_total: (n,) total stds of forces, eV/Å.
            scores: (n,) ``ood_score``.
        """
        self.event = ""
        if scores is not None and len(scores):
            self.suspicion = float(scores.max())
        if forces_total is not None:
            worst = int(np.argmax(forces_total))
            self.now = worst, float(forces_total[worst])
            if self.worst_atom is None or forces_total[worst] > self.largest_std:
                self.largest_std, self.worst_atom = float(forces_total[worst]), worst
        values = forces_total if self.limits.signal == "forces_std" else scores
        if values is None:
            return
        atom = int(np.argmax(values))
        value, limits = float(values[atom]), self.limits
        if self.since_saved is not None:
            self.since_saved += 1
        rested = self.since_saved is None or self.since_saved >= limits.patience
        if limits.save is not None and value > limits.save and rested:
            self.event, self.since_saved = "save", 0
            self.saved += 1
        self.above = self.above + 1 if limits.stop is not None and value > limits.stop else 0
        if limits.stop is not None and (self.above >= limits.patience or value > AT_ONCE * limits.stop):
            self.event = "stop"
            words, unit = WORDS[limits.signal]
            how = (
                f"{self.above} error bars in a row"
                if self.above >= limits.patience
                else "one error bar, and far"
            )
            self.reason = (
                f"step {step}: {words} of atom {atom} ({chemical_symbols[numbers[atom]]}) is {value:.3g}{unit}, "
                f"above {limits.stop:.3g}{unit} in {how}"
            )

    def to_dict(self) -> dict[str, Any]:
        """What it remembers, JSON-serialisable."""
        tree = asdict(self)
        del tree["limits"], tree["event"], tree["now"]
        return tree
