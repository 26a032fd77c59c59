"""One look for all figures, on light and on dark paper.

A figure is drawn with placeholder colours for ink and grid. :func:`to_svg` turns them into the
CSS variables ``--ink`` and ``--grid`` of the page around it, so that one file serves both
schemes; :func:`to_png` draws with the fixed colours of light paper. No global state of
matplotlib is touched: figures are plain ``Figure`` objects, never known to ``pyplot``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


@dataclass(frozen=True)
class Theme:
    """Colours of what is not data."""

    ink: str
    faint: str
    grid: str


LIGHT = Theme(ink="#1f2328", faint="#6a737d", grid="#e3e6ea")
#: colours that occur nowhere else, replaced by CSS variables in the SVG text
CSS = Theme(ink="#010203", faint="#020304", grid="#030405")
_VARIABLES = {CSS.ink: "var(--ink)", CSS.faint: "var(--faint)", CSS.grid: "var(--grid)"}

#: mid-tones that are told apart on white and on near-black, also with colour blindness when
#: taken together with the markers
COLOURS = ("#3a86c8", "#e07b26", "#2a9d6f", "#b35bb0", "#c9a227", "#d1495b", "#35a7b5", "#8d7b68")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: models, in the order in which they are compared
MODELS = {"pretrained": "pretrained", "plain": "plain fine-tuning", "blip": "BLIP"}
MODEL_COLOURS = {"pretrained": "#8d7b68", "plain": "#e07b26", "blip": "#3a86c8"}

FONT = 9.0


def style(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) per set; ``seen`` always comes first."""
    ordered = sorted(names, key=lambda n: n != "seen")
    pick = {n: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(ordered)}
    return {n: pick[n] for n in names}


def figure(
    width: float, height: float, rows: int, columns: int, theme: Theme
) -> tuple[Figure, list[list[Axes]]]:
    """A transparent figure of dressed axes; size in inches."""
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.patch.set_alpha(0.0)
    axes = fig.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        dress(ax, theme)
    return fig, [list(row) for row in axes]


def dress(ax: Axes, theme: Theme) -> None:
    """Ink, grid and fonts of one pair of axes."""
    ax.patch.set_alpha(0.0)
    ax.grid(True, color=theme.grid, linewidth=0.6)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
        spine.set_linewidth(0.8)
    ax.tick_params(which="both", colors=theme.ink, labelsize=FONT - 1, width=0.6, length=3)
    ax.tick_params(which="minor", length=1.5)


def label(ax: Axes, theme: Theme, *, x: str = "", y: str = "", title: str = "") -> None:
    """Axis labels and a title, flush left. The texts may come from users: no mathtext."""
    for text in (
        ax.set_xlabel(x, color=theme.ink, fontsize=FONT),
        ax.set_ylabel(y, color=theme.ink, fontsize=FONT),
        ax.set_title(title, color=theme.ink, fontsize=FONT + 0.5, loc="left", fontweight="bold"),
    ):
        text.set_parse_math(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_offset_text().set(color=theme.ink, fontsize=FONT - 1)


def legend(fig: Figure, handles: Sequence[Line2D], theme: Theme) -> None:
    """One row of keys below the whole figure."""
    box = fig.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=max(1, min(len(handles), 7)),
        frameon=False,
        fontsize=FONT,
        labelcolor=theme.ink,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    for text in box.get_texts():
        text.set_parse_math(False)


def key(text: str, colour: str, *, marker: str = "", line: Literal["-", "none"] = "none") -> Line2D:
    """An entry of :func:`legend`."""
    return Line2D(
        [], [], color=colour, marker=marker, linestyle=line, markersize=6, linewidth=1.6, label=text
    )


def to_svg(fig: Figure, description: str) -> str:
    """The figure as an ``<svg>`` element to be placed inline; colours follow the page."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    fig.savefig(buffer, format="svg", dpi=160, transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # comments hold the texts of the figure, which readers of the page do not need
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    escaped = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    # the page decides the size; the view box keeps the shape
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def to_png(fig: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG with a white background."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
