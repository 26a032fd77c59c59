"""The data report for the terminal, and its table for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blip_ft.data.findings import Finding
from blip_ft.uncertainty.metrics import FEW

#: frames of one finding that the terminal lists; ``--json`` has all
MAX_FRAMES = 40
_COLOURS = {"error": "red", "warning": "yellow", "info": "cyan"}


def summary_rows(
    summary: Mapping[str, Mapping[str, Any]], model: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, list[str]]]:
    """(quantity, one text per role); quantities that no role has are left out."""
    rows: list[tuple[str, list[str]]] = []

    def add(title: str, texts: Sequence[str]) -> None:
        if any(text not in ("", "–") for text in texts):
            rows.append((title, list(texts)))

    sets = list(summary.values())
    add("frames", [str(s["frames"]) for s in sets])
    add("atoms", [f"{s['atoms']:,}" for s in sets])
    add("atoms per frame", [_span(s["atoms_per_frame"], 0) for s in sets])
    add("elements", [" ".join(s["elements"]) for s in sets])
    add("compositions", [str(s["compositions"]) for s in sets])
    add("groups", [str(s["groups"]) if s["groups"] else "–" for s in sets])
    for label in ("energy", "forces", "stress"):
        add(f"with {label}", [f"{s['labels'][label]}" for s in sets])
    add("energy, eV/atom", [_span(s["energy_ev_per_atom"], 3) for s in sets])
    add("rms force, eV/Å", [_span(s["force_rms_ev_per_ang"], 2) for s in sets])
    add("largest force, eV/Å", [_span(s["largest_force_ev_per_ang"], 2) for s in sets])
    add("stress, GPa", [_span(s["stress_gpa"], 1) for s in sets])
    add("pressure, GPa", [_span(s["pressure_gpa"], 1) for s in sets])
    errors = [model.get(name, {}) for name in summary]
    for title, key, count in (
        ("model: energy MAE, meV/atom", "energy_mae_mev_per_atom", "energy_labels"),
        ("model: force MAE, meV/Å", "force_mae_mev_per_ang", "force_labels"),
        ("model: stress MAE, GPa", "stress_mae_gpa", "stress_labels"),
    ):
        add(title, [_number(e.get(key), e.get(count)) for e in errors])
    return rows


def _span(values: Sequence[float] | None, digits: int) -> str:
    """``smallest, median, largest`` or ``smallest to largest``."""
    if not values:
        return "–"
    low, high = f"{values[0]:.{digits}f}", f"{values[-1]:.{digits}f}"
    return (low if low == high else f"{low} to {high}").replace("-", "−")


def _number(value: float | None, count: int | None = None) -> str:
    """Three digits, with the number of values behind it where there are few."""
    if value is None:
        return "–"
    return f"{value:.3g}" + (f" (of {count})" if count is not None and count < FEW else "")


def print_report(
    console: Console,
    title: str,
    summary: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Mapping[str, Any]],
    findings: Sequence[Finding],
) -> None:
    """Table of the roles, then every finding with its frames."""
    if summary:
        table = Table(title=Text(title), title_justify="left", title_style="bold")
        table.add_column("")
        for role in summary:
            table.add_column(Text(role), justify="right", overflow="fold")
        for name, texts in summary_rows(summary, model):
            table.add_row(Text(name), *[Text(text) for text in texts])
        console.print(table)
        console.print("model: the pretrained one, energies after a shift per element", style="dim")
    if not findings:
        console.print("nothing to report", style="green")
    for finding in findings:
        console.print(
            Text.assemble(
                (f"{finding.severity}, {finding.kind}: ", _COLOURS[finding.severity]), finding.message
            ),
            soft_wrap=True,
        )
        for frame in finding.frames[:MAX_FRAMES]:
            console.print(Text(f"    {frame}"), soft_wrap=True)
        if len(finding.frames) > MAX_FRAMES:
            console.print(Text(f"    and {len(finding.frames) - MAX_FRAMES} more (--json lists all)"))
        if finding.remedy:
            console.print(Text(f"  What to do: {finding.remedy}"), soft_wrap=True)
