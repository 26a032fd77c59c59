"""Figures on real draws beside the linearised model (``blip_ft.uncertainty.linearity``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from blip_ft.report import theme as t
from blip_ft.report.theme import LIGHT, Theme

#: quantity -> title, unit of its std
QUANTITIES = {"forces": ("force components", "meV/Å"), "energy": ("energies of structures", "meV")}


def agreement_figure(result: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Std over draws against that of the linearised model: forces, energies.

    Where the linearised std is exact, the band is two standard deviations of the sampling error of
    that number of draws; else the linearised std is that of the same draws, without such an error.

    Args:
        result: of ``linearity.study``.
        theme: colours.
    """
    fig, [axes] = t.figure(8.2, 4.1, 1, 2, theme)
    looks = t.style(list(result["sets"]))
    for ax, (quantity, (title, unit)) in zip(axes, QUANTITIES.items(), strict=True):
        parts = {name: entry[quantity] for name, entry in result["sets"].items()}
        exact = all(p["exact"] is not None for p in parts.values())
        shown = [np.zeros(0)]
        for name, part in parts.items():
            x = 1e3 * np.array(part["exact" if exact else "same"])
            y = 1e3 * np.array(part["draws"])
            known = (x > 0) & (y > 0)
            colour, marker = looks[name]
            size = 16 if quantity == "forces" else 30
            ax.scatter(
                x[known], y[known], s=size, color=colour, marker=marker, alpha=0.7, linewidths=0, zorder=3
            )
            shown += [x[known], y[known]]
        _square(ax, np.concatenate(shown), 2 * result["sampling_error"] if exact else 0.0, theme)
        what = "exact" if exact else "same draws"
        t.label(ax, theme, x=f"linearised std, {what} ({unit})", y=f"std of draws ({unit})", title=title)
    t.legend(fig, [t.key(n, c, marker=m) for n, (c, m) in looks.items()], theme)
    return fig


def _square(ax: Axes, values: np.ndarray[Any, Any], band: float, theme: Theme) -> None:
    """Equal logarithmic axes with their diagonal and a band of relative half-width around it."""
    if not values.size:
        return
    # components that nearly vanish by symmetry would squeeze all others into a corner
    low = max(float(values.min()), 1e-2 * float(np.median(values)))
    span = np.array([low / 1.4, float(values.max()) * 1.4])
    ax.set(xscale="log", yscale="log", xlim=tuple(span), ylim=tuple(span))
    ax.plot(span, span, color=theme.faint, linewidth=0.8, zorder=1)
    if band:
        lower = np.maximum(span * (1 - band), span[0] * 1e-3)
        ax.fill_between(span, lower, span * (1 + band), color=theme.faint, alpha=0.15, linewidth=0, zorder=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter("{x:g}" if span[1] / span[0] < 12 else "")
        axis.set_major_formatter("{x:g}")
    ax.set_box_aspect(1)


def amplitude_figure(result: Mapping[str, Any], theme: Theme = LIGHT) -> Figure:
    """Against the amplitude of the draws: shift of their mean above, their std below.

    Dashed: a shift that does no harm; dotted: the amplitude in use.

    Args:
        result: of ``linearity.study``.
        theme: colours.
    """
    fig, axes = t.figure(8.2, 6.2, 2, 2, theme)
    looks = t.style(list(result["sets"]))
    for column, (quantity, (title, _)) in enumerate(QUANTITIES.items()):
        upper, lower = axes[0][column], axes[1][column]
        for name, entry in result["sets"].items():
            points = entry[quantity]["curve"]
            curve = {key: np.array([p[key] for p in points], dtype=float) for key in points[0]}
            colour, marker = looks[name]
            line: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4}
            upper.plot(curve["amplitude"], np.where(curve["shift"] > 0, curve["shift"], np.nan), **line)
            lower.plot(curve["amplitude"], curve["median"], **line)
            if quantity == "forces":
                lower.fill_between(
                    curve["amplitude"], curve["low"], curve["high"], color=colour, alpha=0.13, linewidth=0
                )
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter("{x:g}")
        upper.axhline(result["max_shift"], color=theme.ink, linewidth=0.9, linestyle="--", zorder=1)
        lower.axhline(1.0, color=theme.faint, linewidth=0.8, zorder=1)
        for ax in (upper, lower):
            ax.set_xlim(0, 1.03)
            ax.axvline(result["amplitude"], color=theme.ink, linewidth=0.9, linestyle=":", zorder=1)
        upper.tick_params(labelbottom=False)
        t.label(upper, theme, y="shift of the mean / spread" if column == 0 else "", title=title)
        t.label(
            lower,
            theme,
            x="amplitude, in units of the posterior's width",
            y="std of draws / linearised, same draws" if column == 0 else "",
        )
    keys = [t.key(n, c, marker=m, line="-") for n, (c, m) in looks.items()]
    thin: dict[str, Any] = {"color": theme.ink, "linewidth": 0.9}
    keys.append(
        Line2D([], [], linestyle="--", label=f"{100 * result['max_shift']:g} % of the spread", **thin)
    )
    keys.append(Line2D([], [], linestyle=":", label="amplitude in use", **thin))
    t.legend(fig, keys, theme)
    return fig
