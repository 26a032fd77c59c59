"""Pictures of observables with both of their errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blip_ft.report import theme as t
from blip_ft.report.theme import LIGHT, Theme

#: panels side by side
COLUMNS = 4
#: bands are so many stds wide on each side
WIDE = 2.0


def observables_figure(found: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Distribution functions, displacements, and the single numbers of each trajectory.

    Args:
        found: of :func:`blip_ft.simulate.observables.observables`.
        theme: colours.
    """
    numbers, curves = _numbers(found), [kind for kind in ("rdf", "msd") if kind in found]
    count = len(curves) + len(numbers)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    fig, grid = t.figure(3.4 * columns, 2.9 * rows, rows, columns, theme)
    axes = [ax for row in grid for ax in row]
    for ax, kind in zip(axes, curves, strict=False):
        _curves(ax, found[kind], kind, theme)
    for ax, (name, unit, tree, index) in zip(axes[len(curves) :], numbers, strict=False):
        _each(ax, name, unit, tree, index, theme)
    for ax in axes[count:]:
        ax.set_visible(False)
    keys = [
        t.key("total error (2 std)", t.COLOURS[7], line="-"),
        t.key("of it statistical", theme.ink, line="-"),
        t.key("one draw, statistical error", t.COLOURS[0], marker="o"),
    ]
    t.legend(fig, keys, theme)
    return fig


def _curves(ax: Axes, curves: Mapping[str, Any], kind: str, theme: Theme) -> None:
    for i, (name, tree) in enumerate(curves.items()):
        x = np.array(tree["r"]) if kind == "rdf" else np.array(tree["lag_fs"]) / 1000
        value, total = np.array(tree["value"]), np.array(tree["total_std"])
        colour = t.COLOURS[i % len(t.COLOURS)]
        ax.plot(x, value, color=colour, linewidth=1.2, label=name)
        ax.fill_between(x, value - WIDE * total, value + WIDE * total, color=colour, alpha=0.3, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    box = ax.legend(frameon=False, fontsize=t.FONT - 1, labelcolor=theme.ink)
    for text in box.get_texts():
        text.set_parse_math(False)
    if kind == "rdf":
        t.label(ax, theme, x="distance, Å", y="g(r)", title="radial distribution")
    else:
        t.label(ax, theme, x="time, ps", y="Å²", title="mean-square displacement")


def _numbers(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any], int | None]]:
    """Name, unit, estimate and component of the observables that are single numbers."""
    out: list[tuple[str, str, Mapping[str, Any], int | None]] = []
    if "density" in found:
        out.append(("density", "g/cm³", found["density"], None))
        names, stds = found["cell"]["names"], found["cell"]["total_std"]
        kinds = [("cell length", "Å")] * 3 + [("cell angle", "°")] * 3
        varied = [i for i, std in enumerate(stds) if std > 0]
        out += [(f"{kinds[i][0]} {names[i]}", kinds[i][1], found["cell"], i) for i in varied]
    out += [
        (f"diffusion of {s}", "Å²/ps", tree, None)
        for s, tree in found["diffusion"].items()
        if tree["diffusive"]
    ]
    return out


def _each(ax: Axes, name: str, unit: str, tree: Mapping[str, Any], index: int | None, theme: Theme) -> None:
    """The draws' values with their own errors, and the mean with both."""

    def get(key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        values = np.asarray(tree[key], dtype=np.float64)
        return values if index is None else values[..., index]

    each, stds = get("each"), get("each_std")
    value, total, statistical = float(get("value")), float(get("total_std")), float(get("statistical_std"))
    ax.axhspan(value - WIDE * total, value + WIDE * total, color=t.COLOURS[7], alpha=0.25, linewidth=0)
    ax.axhspan(
        value - WIDE * statistical, value + WIDE * statistical, color=theme.ink, alpha=0.35, linewidth=0
    )
    ax.errorbar(
        np.arange(len(each)),
        each,
        WIDE * stds,
        fmt="o",
        color=t.COLOURS[0],
        markersize=4,
        linewidth=1,
        capsize=2,
    )
    ax.ticklabel_format(axis="y", useOffset=False, style="plain", useLocale=False)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    t.label(ax, theme, x="draw", y=unit, title=name)
