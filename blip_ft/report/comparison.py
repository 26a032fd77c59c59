"""Tables of runs, and of two runs side by side, for the terminal and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blip_ft.files import whole_file
from blip_ft.report.compare_runs import Comparison, Difference, Figure
from blip_ft.report.run_folders import FIGURES, Run
from blip_ft.report.tables import COLUMNS, MODELS, format_value
from blip_ft.system.duration import duration

#: headings of a run's figures
_HEADINGS = {c.key: f"{c.title}, {c.unit}" for c in COLUMNS}
_FORMS = {c.key: c.form for c in COLUMNS}
_COLOURS = {"finished": "green", "running": "cyan", "unfinished": "yellow", "broken": "red"}


def runs_table(runs: Sequence[Run], title: str) -> Table:
    """One line per run."""
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for heading in ("name", "model", "frames", "state"):
        table.add_column(heading, overflow="fold")
    for key in FIGURES:
        table.add_column(_HEADINGS[key], justify="right")
    table.add_column("time", justify="right")
    table.add_column("last written")
    for run in runs:
        state = f"{run.state}: {run.problem}" if run.problem else run.state
        figures = [format_value(v, _FORMS[key]) for key, v in run.figures.items()]
        # Text, not markup: names come from the user
        table.add_row(
            Text(run.name),
            Text(run.model or "–"),
            Text(_frames(run.frames)),
            Text(state, style=_COLOURS[run.state]),
            *figures,
            duration(run.seconds),
            "–" if run.changed is None else f"{run.changed.astimezone():%Y-%m-%d %H:%M}",
        )
    return table


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Figures and differences of recipes, for the terminal."""
    names = [run.name for run in comparison.runs]
    table = Table(title="metrics", title_justify="left", title_style="bold")
    for heading in ("model", "set", "metric"):
        table.add_column(heading, overflow="fold")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    table.add_column("change", justify="right")
    for figure in comparison.figures:
        first, second, change = cells(figure)
        table.add_row(MODELS[figure.model], Text(figure.set_name), figure.metric, first, second, change)
    console.print(table)
    recipe = Table(title="recipes", title_justify="left", title_style="bold")
    recipe.add_column("key", overflow="fold")
    for name in names:
        recipe.add_column(Text(name), overflow="fold")
    for difference in comparison.recipe:
        recipe.add_row(Text(difference.key), *[Text(t) for t in values(difference)])
    console.print(recipe if comparison.recipe else "the recipes are the same")
    for note in comparison.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)


def write_comparison(path: str | Path, comparison: Comparison) -> Path:
    """The same as a page that loads nothing from anywhere.

    Raises:
        BlipError: it cannot be written.
    """
    from blip_ft.report.html import environment  # matplotlib, which no table needs

    text = (
        environment()
        .get_template("comparison.html")
        .render(
            runs=comparison.runs,
            models=MODELS,
            figures=[(f, *cells(f)) for f in comparison.figures],
            recipe=[(d.key, *values(d)) for d in comparison.recipe],
            notes=comparison.notes,
            duration=duration,
            frames=_frames,
        )
    )
    path = Path(path)
    with whole_file(path) as file:
        file.write(text)
    return path


def to_json(comparison: Comparison) -> Mapping[str, Any]:
    """JSON-serialisable."""
    return {
        "runs": [run.to_json() for run in comparison.runs],
        "metrics": [vars(f) | {"change": f.change} for f in comparison.figures],
        "recipe": [{"key": d.key, "values": [d.one, d.other]} for d in comparison.recipe],
        "notes": comparison.notes,
    }


def cells(figure: Figure) -> tuple[str, str, str]:
    """Both values and their relative difference as text; four digits, as small differences are what is looked for."""
    first, second = (_digits(v) for v in (figure.one, figure.other))
    if figure.one == figure.other:
        return first, second, ""
    change = figure.change
    return first, second, "–" if change is None else f"{100 * change:+.2g} %".replace("-", "−")


def values(difference: Difference) -> tuple[str, str]:
    """Both values of a key as a recipe would have them; a dash where it has no such key."""
    one, other = (
        "–" if i in difference.missing else value if isinstance(value, str) else json.dumps(value)
        for i, value in enumerate((difference.one, difference.other))
    )
    return one, other


def _digits(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}".replace("-", "−")


def _frames(frames: Mapping[str, int]) -> str:
    """``36 train, 15 validation, ...``, of all that there are."""
    return ", ".join(f"{n} {name}" for name, n in frames.items()) or "–"
