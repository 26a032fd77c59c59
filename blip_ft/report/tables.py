"""The comparison of models as a table: for the terminal and, by the same cells, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from blip_ft.uncertainty.metrics import FEW, basis, single_sets

#: {model: {set: {metric: value}}}, as in ``metrics.json``
AllMetrics = Mapping[str, Mapping[str, Mapping[str, Any]]]

#: behind numbers from few values, in the terminal, and their limit in words
FEW_MARK, FEW_WORD = "*", {5: "five"}[FEW]
#: models in the order in which they are compared, with their titles
MODELS = {"pretrained": "pretrained", "plain": "plain", "blip": "BLIP"}


@dataclass(frozen=True)
class Column:
    """One metric of the comparison.

    Attributes:
        key: its name in ``metrics.json``.
        title: heading.
        unit: unit, or what it is compared with.
        short: two lines of heading for a terminal of 80 columns.
        form: ``value`` (three significant digits), ``rank`` (two decimals) or ``share``.
        best: the lowest of the models is marked.
    """

    key: str
    title: str
    unit: str
    short: tuple[str, str] = ("", "")
    form: Literal["value", "rank", "share"] = "value"
    best: bool = False


COLUMNS = (
    Column("energy_mae_mev_per_atom", "Energy MAE", "meV/atom", ("E MAE", "meV/at"), best=True),
    Column("force_mae_mev_per_ang", "Force MAE", "meV/Å", ("F MAE", "meV/Å"), best=True),
    Column("force_crps_mev_per_ang", "Force CRPS", "meV/Å", ("F CRPS", "meV/Å"), best=True),
    Column("spearman_atom", "Spearman", "per atom", ("ρ atom", "std"), "rank"),
    Column("spearman_atom_null_force", "its null", "|force|", ("null", "|F|"), "rank"),
    Column("spearman_structure", "Spearman", "per structure", ("ρ str", "std"), "rank"),
    Column("spearman_structure_null_energy", "its null", "energy", ("null", "E"), "rank"),
    Column("coverage90", "Coverage", "of 90 %", ("cover", "90 %"), "share"),
)


@dataclass(frozen=True)
class Cell:
    """One formatted value; ``best`` marks the best of the models on this set.

    ``few`` is the number of values that it rests on where these are fewer than ``FEW``, else ``None``.
    """

    text: str
    best: bool = False
    few: int | None = None


@dataclass(frozen=True)
class Line:
    """One model on one set; ``first`` and ``size`` tell the lines of one set apart."""

    set_name: str
    model: str
    cells: tuple[Cell, ...]
    first: bool
    size: int


def format_value(value: Any, form: str = "value") -> str:
    """A number as text; a dash where it is missing or has no meaning."""
    if value is None:
        return "–"
    if form == "share":
        return f"{100 * value:.0f} %"
    if form == "rank":
        return f"{value:.2f}".replace("-", "−")
    magnitude = abs(value)
    digits = 0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2
    return f"{value:.{digits}f}".replace("-", "−")


def lines(metrics: AllMetrics, columns: tuple[Column, ...] = COLUMNS, *, pooled: bool = False) -> list[Line]:
    """The rows of the comparison: sets one after the other, in each set the models.

    Args:
        metrics: as in ``metrics.json``.
        columns: metrics to show.
        pooled: also show the pool of the unseen sets, where there are several.
    """
    models = [m for m in MODELS if m in metrics]
    names = list(dict.fromkeys(n for m in models for n in metrics[m]))
    order = single_sets(names)
    titles = {n: n for n in order}
    if pooled and len([n for n in order if n != "seen"]) > 1 and "unseen" in names:
        titles["unseen"] = "all unseen"
    out = []
    for name, title in titles.items():
        present = [m for m in models if name in metrics[m]]
        for i, model in enumerate(present):
            cells = []
            for column in columns:
                values = [metrics[m][name].get(column.key) for m in present]
                known = [v for v in values if v is not None]
                best = column.best and len(known) > 1 and values[i] == min(known)
                count = None if values[i] is None else basis(metrics[model][name], column.key)
                few = count if count is not None and count < FEW else None
                cells.append(Cell(format_value(values[i], column.form), best, few))
            out.append(Line(title, MODELS[model], tuple(cells), i == 0, len(present)))
    return out


def demo_table(metrics: AllMetrics, title: str = "") -> Table:
    """The comparison for the terminal.

    Args:
        metrics: ``{model: {set: metrics}}`` with the models ``pretrained``, ``plain``, ``blip``.
        title: printed above it.
    """
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=0,
    )
    table.add_column("set", overflow="fold")  # the only one to give way in a narrow terminal
    table.add_column("model", no_wrap=True)
    for column in COLUMNS:
        table.add_column("\n".join(column.short), justify="right", no_wrap=True)
    rows = lines(metrics)
    if any(c.few is not None for line in rows for c in line.cells):
        table.caption = Text(f"{FEW_MARK} from fewer than {FEW_WORD} values")
        table.caption_justify = "left"
    for i, line in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1].first
        cells = [
            Text(c.text + ("" if c.few is None else FEW_MARK), style="bold" if c.best else "")
            for c in line.cells
        ]
        # Text, not markup: names of sets come from the user
        table.add_row(Text(line.set_name if line.first else ""), Text(line.model), *cells, end_section=last)
    return table
