"""The figure of the data report: what the set spans, and which labels stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blip_ft.data.check.label_faults import ENERGY_FLOOR, RATIO
from blip_ft.report import theme as t
from blip_ft.report.theme import LIGHT, Theme
from blip_ft.uncertainty.results import FloatArray

#: colour of a label that was found wrong
FAULT = "#d1495b"


def label_figure(frames: Mapping[str, Sequence[Any]], theme: Theme = LIGHT) -> Figure:
    """Three panels: energies and forces of the set, residuals of energies, residuals of forces.

    Args:
        frames: ``DataReport.frames``.
        theme: colours.
    """
    fig, [axes] = t.figure(10.1, 3.7, 1, 3, theme)
    roles = list(frames["role"])
    looks = t.style(list(dict.fromkeys(name.removeprefix("test/") for name in roles)))
    values = {k: np.array([np.nan if v is None else v for v in frames[k]]) for k in _COLUMNS}
    bad = np.array([bool(f) for f in frames["fault"]])
    number = np.arange(len(roles), dtype=float)
    energy = values["energy"] - np.nanmedian(values["energy"]) if len(roles) else values["energy"]
    residual = 1e3 * values["energy_residual"]
    for name, (colour, marker) in looks.items():
        members = np.array([r.removeprefix("test/") == name for r in roles]) & ~bad
        dots: dict[str, Any] = {
            "s": 12,
            "color": colour,
            "marker": marker,
            "alpha": 0.75,
            "linewidths": 0,
            "zorder": 3,
        }
        axes[0].scatter(energy[members], values["forces"][members], **dots)
        axes[1].scatter(number[members], residual[members], **dots)
        axes[2].scatter(
            1e3 * values["forces_usual"][members], 1e3 * values["forces_residual"][members], **dots
        )
    cross: dict[str, Any] = {"s": 26, "color": FAULT, "marker": "X", "linewidths": 0, "zorder": 4}
    axes[0].scatter(energy[bad], values["forces"][bad], **cross)
    energies = np.array(["energy" in f for f in frames["fault"]], dtype=bool)
    axes[1].scatter(number[energies], residual[energies], **cross)
    axes[1].scatter(number[bad & ~energies], residual[bad & ~energies], s=12, color=FAULT, linewidths=0)
    axes[2].scatter(1e3 * values["forces_usual"][bad], 1e3 * values["forces_residual"][bad], **cross)
    axes[1].axhspan(
        -1e3 * ENERGY_FLOOR, 1e3 * ENERGY_FLOOR, color=theme.grid, alpha=0.45, linewidth=0, zorder=0
    )
    axes[1].set_yscale("symlog", linthresh=2e3 * ENERGY_FLOOR)
    low, high = axes[1].get_ylim()
    axes[1].set_yticks([sign * v for v in (0, 25, 100, 1000, 10_000) for sign in (-1, 1)], minor=False)
    axes[1].set_ylim(low, high)
    axes[1].yaxis.set_major_formatter("{x:g}")
    _log(axes[2], values)
    titles = ("what the set spans", "energies beside the model", "forces beside the model")
    labels = (
        ("energy, less the median (eV/atom)", "rms force (eV/Å)"),
        ("frame, in the order of the roles", "left unexplained (meV/atom)"),
        ("usual for such a frame (meV/Å)", "left unexplained (meV/Å)"),
    )
    for ax, title, (x, y) in zip(axes, titles, labels, strict=True):
        t.label(ax, theme, x=x, y=y, title=title)
    keys = [t.key(name, colour, marker=marker) for name, (colour, marker) in looks.items()]
    if bad.any():
        keys.append(t.key("wrong label", FAULT, marker="X"))
    t.legend(fig, keys, theme)
    return fig


_COLUMNS = ("energy", "energy_residual", "forces", "forces_residual", "forces_usual")


def _log(ax: Axes, values: Mapping[str, FloatArray]) -> None:
    """Logarithmic axes with the lines of the usual residual and of the limit."""
    both = np.concatenate([values["forces_usual"], values["forces_residual"]])
    both = 1e3 * both[np.isfinite(both) & (both > 0)]
    if not both.size:
        return
    span = np.array([both.min() / 1.4, both.max() * 1.4])
    ax.set(xscale="log", yscale="log", xlim=(span[0], span[1]), ylim=(span[0], span[1]))
    ax.plot(span, span, color=ax.xaxis.label.get_color(), linewidth=0.6, alpha=0.5, zorder=1)
    ax.plot(
        span,
        RATIO * span,
        color=ax.xaxis.label.get_color(),
        linewidth=0.6,
        alpha=0.5,
        linestyle="--",
        zorder=1,
    )
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter("")
        axis.set_major_formatter("{x:g}")
