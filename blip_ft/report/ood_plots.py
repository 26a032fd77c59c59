"""The figure of the out-of-distribution score, beside error and error bar."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from blip_ft.potential.calibration import Calibration
from blip_ft.report import theme as t
from blip_ft.report.plots import Sets
from blip_ft.report.theme import LIGHT, Theme
from blip_ft.uncertainty.metrics import MIN_STD, binned_errors
from blip_ft.uncertainty.results import FloatArray


def ood_scores(sets: Sets, calibration: Calibration, theme: Theme = LIGHT) -> Figure:
    """Three panels: which share of the atoms is how far from the training set; error of structures
    against their largest score; error over total std of the force components of atoms in bins of the
    score, 1 where error bars are honest.

    Args:
        sets: by name; those without scores are left out.
        calibration: gives the total std.
        theme: colours.
    """
    fig, [axes] = t.figure(10.1, 3.7, 1, 3, theme)
    looks = t.style([name for name, p in sets.items() if p.ood_score is not None])
    for name, (colour, marker) in looks.items():
        p = sets[name]
        score = p.ood_score
        assert score is not None
        finite = np.sort(score[np.isfinite(score) & (score > 0)])
        share = np.arange(1, len(finite) + 1) / max(len(score), 1)
        axes[0].step(finite, share, where="post", color=colour, linewidth=1.6)
        error: FloatArray = np.linalg.norm(p.forces_error, axis=1)
        largest, mean_error = p.max_over_atoms(score), 1e3 * p.mean_over_atoms(error)
        known = np.isfinite(largest) & (largest > 0) & np.isfinite(mean_error) & (mean_error > 0)
        if known.any():
            axes[1].scatter(
                largest[known],
                mean_error[known],
                s=16,
                color=colour,
                marker=marker,
                alpha=0.8,
                linewidths=0,
                zorder=3,
            )
        total = calibration.total_std(p).get("forces")
        if total is None:
            continue
        z = p.forces_error / np.maximum(total, MIN_STD)
        inside = np.isfinite(z).all(axis=1) & np.isfinite(score) & (score > 0)
        if inside.any():
            at, ratio, _ = binned_errors(z[inside], np.broadcast_to(score[inside, None], z[inside].shape))
            at, ratio = at[ratio > 0], ratio[ratio > 0]
            axes[2].plot(at, ratio, color=colour, marker=marker, markersize=4.5, linewidth=1.3)
    axes[0].set(ylim=(0, 1.02))
    axes[0].yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
    for ax, both in zip(axes, (False, True, True), strict=True):
        ax.set_box_aspect(1)
        if not any(len(np.asarray(line.get_xdata())) for line in ax.lines) and not ax.collections:
            continue  # nothing is labelled, and an empty axis has no logarithm
        for axis in (ax.xaxis, ax.yaxis) if both else (ax.xaxis,):
            (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
            low, high = axis.get_view_interval()
            axis.set_minor_formatter("{x:g}" if high < 10 * low else "")
            axis.set_major_formatter("{x:g}")
        ax.axvline(1.0, color=theme.faint, linewidth=0.8, zorder=1)
    axes[2].axhline(1.0, color=theme.faint, linewidth=0.8, zorder=1)
    t.label(axes[0], theme, x="score of the atom", y="share of the atoms below", title="atoms")
    t.label(axes[1], theme, x="largest score", y="mean error norm (meV/Å)", title="structures")
    t.label(axes[2], theme, x="score of the atom", y="RMSE over total std", title="force components, binned")
    t.legend(fig, [t.key(n, c, marker=m) for n, (c, m) in looks.items()], theme)
    return fig
