"""Logs of a training that never stop it, and that go on where a resumed run does."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

#: file of the metrics, and where its rows are while a resumed run writes it again
CSV, BEFORE = "metrics.csv", ".metrics-before.csv"


class _GivesUp:
    """A log that is given up with a warning when it cannot be written."""

    _given_up = False

    def _try(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self._given_up:
            return
        try:
            write(*args, **kwargs)
        except OSError as error:
            self._given_up = True
            kind = type(self).__name__
            warnings.warn(
                f"{kind} cannot be written and is given up: {error}; training goes on", stacklevel=3
            )


class CsvLog(_GivesUp, CSVLogger):
    """``metrics.csv``, a row as soon as it is known."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """One row."""
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        """Write what is not yet written."""
        self._try(super().save)

    def finalize(self, status: str) -> None:
        """The last rows."""
        self._try(super().finalize, status)


class TensorBoardLog(_GivesUp, TensorBoardLogger):
    """The log for TensorBoard."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """One step."""
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        """Write what is not yet written."""
        self._try(super().save)

    def finalize(self, status: str) -> None:
        """The last rows."""
        self._try(super().finalize, status)


def make_table(folder: Path, step: int = 0, last: Mapping[str, float] | None = None) -> CsvLog:
    """``metrics.csv``.

    Args:
        folder: for it.
        step: with which a resumed run goes on: rows before it stay.
        last: row that is written after the checkpoint that it goes on from, and that may be missing.
    """
    table = CsvLog(folder, name="", version="", flush_logs_every_n_steps=1)
    if step:
        _take_over(table, folder, step, last or {})
    return table


@rank_zero_only
def _take_over(table: CsvLog, folder: Path, step: int, last: Mapping[str, float]) -> None:
    """Write the rows before a step again: Lightning's writer removes the file that it finds."""
    path, before = folder / CSV, folder / BEFORE
    rows: list[dict[str, Any]] = []
    try:
        if not before.exists() and path.exists():
            path.rename(before)
        if before.exists():
            with before.open(newline="", encoding="utf-8") as file:
                rows = [r for r in csv.DictReader(file) if r["step"].isdecimal() and int(r["step"]) < step]
        if last and not any(int(r["step"]) == last["step"] and all(r.get(k) for k in last) for r in rows):
            rows.append(dict(last))
        with warnings.catch_warnings():  # the file that Lightning's writer warns of has been moved away
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")
            writer = table.experiment
        writer.metrics.extend({k: v for k, v in row.items() if v not in (None, "")} for row in rows)
        table.save()
        before.unlink(missing_ok=True)
    except (OSError, KeyError, ValueError, AttributeError) as error:  # the last three: lines that were cut
        warnings.warn(f"the first rows of {path} are lost: {error}", stacklevel=2)
