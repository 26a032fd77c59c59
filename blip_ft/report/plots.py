"""The figures of the report. Each function draws one ``matplotlib`` figure and returns it.

Predictions come as ``{model: {set: SetPrediction}}`` with the models ``pretrained``, ``plain``
and ``blip`` (any of them may be absent); errors are prediction minus label, as a reader of a
parity plot expects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blip_ft.potential.calibration import Calibration
from blip_ft.report import theme as t
from blip_ft.report.theme import LIGHT, Theme
from blip_ft.uncertainty.metrics import binned_errors, coverage_curve
from blip_ft.uncertainty.results import FloatArray, SetPrediction

Sets = Mapping[str, SetPrediction]
#: points drawn per set and panel; more only make the file larger
MAX_POINTS = 6000


# ---- parity ----------------------------------------------------------------------------------


def energy_parity(
    predictions: Mapping[str, Sets], calibration: Calibration | None = None, theme: Theme = LIGHT
) -> Figure:
    """Energy per atom: parity above, error below; one column per model.

    Args:
        predictions: by model and set.
        calibration: of ``blip``; draws its total std as error bars.
        theme: colours.
    """
    labels = np.concatenate(
        [p.energy_label / p.n_atoms for sets in predictions.values() for p in sets.values()] or [np.zeros(0)]
    )
    known = labels[np.isfinite(labels)]
    centre = float(known.mean()) if known.size else 0.0

    def values(p: SetPrediction) -> tuple[FloatArray, FloatArray]:
        return p.energy_label / p.n_atoms - centre, -1e3 * p.energy_error

    def bars(p: SetPrediction) -> FloatArray | None:
        if calibration is None or not calibration.energy.measured:
            return None
        std = calibration.total_std(p).get("energy")
        return None if std is None else 1e3 * std / p.n_atoms

    quantity = f"label, less {centre:.3f}".replace("-", "−")
    return _parity(predictions, values, bars, ("eV/atom", "meV/atom", quantity), theme)


def forces_parity(predictions: Mapping[str, Sets], theme: Theme = LIGHT) -> Figure:
    """Force components: parity above, error below; one column per model."""

    def values(p: SetPrediction) -> tuple[FloatArray, FloatArray]:
        return p.forces_label.reshape(-1), -1e3 * p.forces_error.reshape(-1)

    return _parity(predictions, values, lambda p: None, ("eV/Å", "meV/Å", "label of a component"), theme)


def _parity(
    predictions: Mapping[str, Sets],
    values: Callable[[SetPrediction], tuple[FloatArray, FloatArray]],
    bars: Callable[[SetPrediction], FloatArray | None],
    text: tuple[str, str, str],
    theme: Theme,
) -> Figure:
    """``values`` gives label and error (in thousandths); ``text``: unit, error unit, quantity."""
    models = _models(predictions)
    unit, error_unit, quantity = text
    columns = max(len(models), 1)
    fig, axes = t.figure(1.4 + 2.9 * columns, 5.4, 2, columns, theme)
    looks = t.style(_set_names(predictions))
    everything = [values(p) for m in models for p in predictions[m].values()]
    x_range = _range(np.concatenate([x for x, _ in everything] or [np.zeros(0)]))
    errors = np.abs(np.concatenate([e for _, e in everything] or [np.zeros(0)]))
    errors = errors[np.isfinite(errors) & (errors > 0)]
    # linear up to about the typical error, logarithmic beyond: good and bad sets in one picture
    linear = 10.0 ** round(math.log10(float(np.median(errors)))) if errors.size else 1.0
    limit = max(1.3 * float(errors.max()), 2 * linear) if errors.size else 1.0
    for column, model in enumerate(models):
        upper, lower = axes[0][column], axes[1][column]
        upper.axline((0, 0), slope=1, color=theme.faint, linewidth=0.8, zorder=1)
        lower.axhline(0, color=theme.faint, linewidth=0.8, zorder=1)
        # the worst set first, so that it does not hide the others
        for name, p in sorted(predictions[model].items(), key=lambda item: -_mean_size(values(item[1])[1])):
            colour, marker = looks[name]
            x, error = values(p)
            keep = _subsample(np.isfinite(x) & np.isfinite(error))
            dots: dict[str, Any] = {
                "s": 14 if keep.size < 500 else 5,
                "alpha": 0.85 if keep.size < 500 else 0.45,
                "color": colour,
                "marker": marker,
                "linewidths": 0,
                "rasterized": keep.size > 500,
                "zorder": 3,
            }
            upper.scatter(x[keep], x[keep] + 1e-3 * error[keep], **dots)
            lower.scatter(x[keep], error[keep], **dots)
            std = bars(p) if model == "blip" else None
            if std is not None:
                lower.errorbar(
                    x[keep],
                    error[keep],
                    std[keep],
                    fmt="none",
                    ecolor=colour,
                    elinewidth=0.7,
                    alpha=0.5,
                    zorder=2,
                )
        upper.set(xlim=x_range, ylim=x_range)
        lower.set_yscale("symlog", linthresh=linear, linscale=1.0)
        lower.set(xlim=x_range, ylim=(-limit, limit))
        lower.yaxis.set_major_formatter("{x:g}")
        t.label(
            upper, theme, y=f"predicted ({unit})" if column == 0 else "", title=t.MODELS.get(model, model)
        )
        t.label(lower, theme, x=f"{quantity} ({unit})", y=f"error ({error_unit})" if column == 0 else "")
        upper.tick_params(labelbottom=False)
        for ax in (upper, lower):
            ax.tick_params(labelleft=column == 0)
    t.legend(fig, _set_keys(looks), theme)
    return fig


# ---- error against std -----------------------------------------------------------------------


def error_against_std(sets: Sets, calibration: Calibration, theme: Theme = LIGHT) -> Figure:
    """Three panels: force components in bins, structures, energies; on honest error bars the
    first follows its diagonal, the others scatter below and around it.
    """
    fig, [axes] = t.figure(10.1, 3.7, 1, 3, theme)
    looks = t.style(list(sets))
    shown: list[list[FloatArray]] = [[], [], []]
    for name, p in sets.items():
        colour, marker = looks[name]
        total = calibration.total_std(p)
        if "forces" in total:
            known = np.isfinite(p.forces_error)
            rmv, rmse, count = binned_errors(p.forces_error[known], total["forces"][known])
            if count.sum() > 0:
                line: dict[str, Any] = {
                    "color": colour,
                    "marker": marker,
                    "markersize": 4.5,
                    "linewidth": 1.3,
                }
                axes[0].plot(1e3 * rmv, 1e3 * rmse, **line)
                shown[0] += [1e3 * rmv, 1e3 * rmse]
            norm_std = p.mean_over_atoms(np.sqrt((total["forces"] ** 2).sum(axis=1)))
            error = p.mean_over_atoms(np.linalg.norm(p.forces_error, axis=1))
            shown[1] += _dots(axes[1], 1e3 * norm_std, 1e3 * error, colour, marker)
        if "energy" in total:
            shown[2] += _dots(
                axes[2], 1e3 * total["energy"] / p.n_atoms, 1e3 * np.abs(p.energy_error), colour, marker
            )
    titles = ["force components, binned", "structures", "energies"]
    for i, item in enumerate((calibration.forces, calibration.forces, calibration.energy)):
        if not item.measured:
            titles[i] += ", not calibrated"
    labels = (
        ("root mean variance (meV/Å)", "RMSE (meV/Å)"),
        ("mean total std of the atoms (meV/Å)", "mean error norm (meV/Å)"),
        ("total std (meV/atom)", "|error| (meV/atom)"),
    )
    for i, ax in enumerate(axes):
        _log_square(ax, shown[i], theme, floor=1e-2 if i == 2 else 0.0)
        t.label(ax, theme, x=labels[i][0], y=labels[i][1], title=titles[i])
    t.legend(fig, _set_keys(looks), theme)
    return fig


def _dots(ax: Axes, x: FloatArray, y: FloatArray, colour: str, marker: str) -> list[FloatArray]:
    known = np.isfinite(x) & np.isfinite(y)
    ax.scatter(x[known], y[known], s=16, color=colour, marker=marker, alpha=0.8, linewidths=0, zorder=3)
    return [x[known], y[known]]


def _log_square(ax: Axes, shown: Sequence[FloatArray], theme: Theme, *, floor: float) -> None:
    """Equal logarithmic axes around the data with their diagonal.

    ``floor`` is a share of the median std below which errors leave the picture: single errors
    come arbitrarily close to zero.
    """
    values = np.concatenate(shown or [np.zeros(0)])
    values = values[values > 0]
    if values.size == 0:
        return
    low = max(float(values.min()), floor * float(np.median(values)))
    span = (low / 1.5, float(values.max()) * 1.5)
    ax.set(xscale="log", yscale="log", xlim=span, ylim=span)
    ax.plot(span, span, color=theme.faint, linewidth=0.8, zorder=1)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter("")
        axis.set_major_formatter("{x:g}")
    ax.set_box_aspect(1)


# ---- calibration -----------------------------------------------------------------------------


def calibration_curves(sets: Sets, calibration: Calibration, theme: Theme = LIGHT) -> Figure:
    """Observed against expected coverage of central intervals, before and after calibration."""
    fig, [axes] = t.figure(10.1, 3.7, 1, 3, theme)
    looks = t.style(list(sets))
    levels = np.linspace(0, 1, 101)
    for name, p in sets.items():
        panels = [
            (axes[0], "forces", Calibration.identity()),
            (axes[1], "forces", calibration),
            (axes[2], "energy", calibration),
        ]
        for ax, prop, used in panels:
            std = used.total_std(p).get(prop)
            error = p.forces_error if prop == "forces" else p.energy_error * p.n_atoms
            known = np.isfinite(error)
            if std is not None and known.any():
                ax.plot(
                    levels,
                    coverage_curve(error[known], std[known], levels),
                    color=looks[name][0],
                    linewidth=1.6,
                )
    # what no calibration frame had a label of is as the posterior has it
    after = {
        p: "after calibration" if getattr(calibration, p).measured else "not calibrated"
        for p in ("forces", "energy")
    }
    titles = ("forces, before calibration", f"forces, {after['forces']}", f"energies, {after['energy']}")
    for i, ax in enumerate(axes):
        ax.plot([0, 1], [0, 1], color=theme.faint, linewidth=0.8, zorder=1)
        ax.fill_between([0, 1], [0, 1], [1, 1], color=theme.grid, alpha=0.35, linewidth=0, zorder=0)
        ax.set(xlim=(0, 1), ylim=(0, 1))
        ax.set_box_aspect(1)
        for x, y, words, align in ((0.04, 0.94, "too wide", "left"), (0.96, 0.05, "too narrow", "right")):
            ax.text(x, y, words, color=theme.faint, fontsize=t.FONT - 1, ha=align, va="center")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        t.label(ax, theme, x="expected coverage", y="observed coverage" if i == 0 else "", title=titles[i])
    t.legend(fig, [t.key(n, c, line="-") for n, (c, _) in looks.items()], theme)
    return fig


# ---- training --------------------------------------------------------------------------------

#: panels of the training figure: title, unit, name in the history, logarithmic axis
CURVES: tuple[tuple[str, str, str, bool], ...] = (
    ("training loss", "per structure", "train_loss", False),
    ("negative log-likelihood", "per structure", "train_nll", False),
    ("KL divergence", "nats", "train_kl", True),
    ("validation force CRPS", "meV/Å", "val_crps", True),
    ("validation force MAE", "meV/Å", "val_force_mae", True),
    ("posterior std", "of the prior's", "posterior_std_mean", True),
)


def training_curves(history: Mapping[str, Sequence[Mapping[str, Any]]], theme: Theme = LIGHT) -> Figure:
    """The history of the training, by model; the dotted line is the epoch that was kept.

    Args:
        history: by model (``plain``, ``blip``), one mapping per epoch; names as in ``CURVES``.
        theme: colours.
    """
    panels = [c for c in CURVES if any(_column(rows, c[2])[1].any() for rows in history.values())]
    columns = min(3, max(1, len(panels)))
    rows_of_panels = max(1, math.ceil(len(panels) / columns))
    fig, axes = t.figure(10.1 * columns / 3, 0.5 + 2.5 * rows_of_panels, rows_of_panels, columns, theme)
    flat = [ax for row in axes for ax in row]
    used = [m for m in _models(history) if history[m]]
    for ax, (title, unit, name, log) in zip(flat, panels, strict=False):
        positive = True
        for model in used:
            colour = t.MODEL_COLOURS.get(model, theme.ink)
            epoch, value = _column(history[model], name)
            if value.any():  # a column of zeros is a term that the model does not have
                positive &= bool((value > 0).all())
                marker = "o" if value.size <= 30 else ""
                ax.plot(epoch, value, color=colour, linewidth=1.5, marker=marker, markersize=2.5)
            epoch, score = _column(history[model], "val_crps")
            if not score.size:  # no forces: energies have chosen, among the epochs
                trained = [row for row in history[model] if "train_loss" in row]
                epoch, score = _column(trained, "val_energy_mae")
            if score.size and value.any():
                ax.axvline(epoch[score.argmin()], color=colour, linewidth=0.9, linestyle=":", zorder=1)
        if log and positive:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}" if _decades(ax) < 1 else "")
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        t.label(ax, theme, x="epoch", y=unit, title=title)
    for ax in flat[len(panels) :]:
        ax.set_visible(False)
    t.legend(
        fig, [t.key(t.MODELS.get(m, m), t.MODEL_COLOURS.get(m, theme.ink), line="-") for m in used], theme
    )
    return fig


def _decades(ax: Axes) -> float:
    low, high = ax.get_ylim()
    return math.log10(high / low) if low > 0 else math.inf


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[FloatArray, FloatArray]:
    """Epochs and finite values of one name."""
    pairs = [(float(r.get("epoch", i)), r.get(name)) for i, r in enumerate(rows)]
    known = [(e, float(v)) for e, v in pairs if v is not None and math.isfinite(v)]
    return np.array([e for e, _ in known]), np.array([v for _, v in known])


# ---- shared ----------------------------------------------------------------------------------


def _models(by_model: Mapping[str, object]) -> list[str]:
    """Known models first, in their order."""
    return [m for m in t.MODELS if m in by_model] + [m for m in by_model if m not in t.MODELS]


def _set_names(predictions: Mapping[str, Sets]) -> list[str]:
    return list(dict.fromkeys(name for sets in predictions.values() for name in sets))


def _set_keys(looks: Mapping[str, tuple[str, str]]) -> list[Any]:
    return [t.key(name, colour, marker=marker) for name, (colour, marker) in looks.items()]


def _subsample(known: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of at most ``MAX_POINTS`` known values, the same at every call."""
    index = np.flatnonzero(known)
    if index.size > MAX_POINTS:
        index = np.sort(np.random.default_rng(0).choice(index, MAX_POINTS, replace=False))
    return index


def _mean_size(values: FloatArray) -> float:
    """Mean absolute value of what is finite."""
    known = values[np.isfinite(values)]
    return float(np.abs(known).mean()) if known.size else 0.0


def _range(values: FloatArray) -> tuple[float, float]:
    """Limits around finite values with a margin."""
    known = values[np.isfinite(values)]
    if known.size == 0:
        return (-1.0, 1.0)
    margin = 0.06 * float(np.ptp(known)) or 1.0
    return float(known.min()) - margin, float(known.max()) + margin
