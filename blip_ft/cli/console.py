"""What the command line prints: tables and JSON on standard output. rich is imported when it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from blip_ft.errors import readable
from blip_ft.system.duration import duration
from blip_ft.system.ranks import is_rank_zero

if TYPE_CHECKING:
    from rich.table import Table

    from blip_ft.data.findings import Finding


def announce(text: str) -> None:
    """A line on standard error at once, before the imports and the files that it is about; none for an empty text.

    Nobody may be reading any more, and the log may be full: that stops no work.
    """
    if text and is_rank_zero():
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def new_table(*columns: str, title: str) -> Table:
    """A table without rows; long cells are folded."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def module_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """What becomes of each module: ``ConversionReport.rows``."""
    table = new_table("module", "type", "weights", "what happens", title=title)
    for row in rows:
        if row["action"] == "converted":
            roles = [word for word, on in (("trained", row["trained"]), ("noisy", row["noisy"])) if on]
            what = ", ".join(["converted", *roles])
        else:
            what = "left, trained" if row["trained"] else "left"
        shape = " x ".join(str(n) for n in row["shape"])
        note = f"{what}: {row['reason']}" if row["reason"] else what
        table.add_row(row["name"], row["type"], shape, note)
    return table


def metrics_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """Metrics of one set in their own units, which their names say; with the number of values behind them
    where it is small.
    """
    from blip_ft.uncertainty.metrics import FEW, basis

    table = new_table("metric", "value", title=title)
    for key, value in metrics.items():
        if isinstance(value, int):  # a size
            table.add_row(key, str(value))
            continue
        count = basis(metrics, key)
        few = f"  (of {count})" if value is not None and count is not None and count < FEW else ""
        table.add_row(key, readable(value, ".4g") + few)
    return table


def cost_table(cost: Mapping[str, Any]) -> Table:
    """What a run would take: ``Cost.to_json``."""
    table = new_table("stage", "time", title=f"what fit would take on {cost['device']}")
    for name, seconds in cost["stages"].items():
        table.add_row(name, duration(seconds))
    table.add_row("all", duration(cost["seconds"]), style="bold")
    table.add_row("memory at most", f"{cost['memory_bytes'] / 1e9:.1f} GB")
    table.add_row("disk", f"{cost['disk_bytes'] / 1e6:.0f} MB")
    for name, atoms in (cost["largest_atoms"] or {}).items():
        table.add_row(f"largest structure, {name}", f"{atoms:,} atoms")
    return table


def show(table: Table) -> None:
    """Print a table; one line per row where the output is a file or a pipe."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 240).print(table)


def show_json(tree: Mapping[str, Any]) -> None:
    """Print a mapping as JSON."""
    print(json.dumps(tree, indent=1))


def say(left_out: Sequence[str], findings: Sequence[Finding]) -> None:
    """Tell which frames were set aside, and which numbers nothing uses."""
    for place in left_out:
        print(f"left out: {place}", file=sys.stderr)
    for finding in findings:
        print(finding, file=sys.stderr)
