"""The self-contained report of a run: one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from ase import units
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from blip_ft.config import Recipe
from blip_ft.data.check.examine import DataReport
from blip_ft.errors import readable
from blip_ft.files import whole_file
from blip_ft.potential.calibration import PROPERTIES, Calibration
from blip_ft.report import data_tables, linear_plots, plots, tables
from blip_ft.report.data_plots import label_figure
from blip_ft.report.ood_plots import ood_scores
from blip_ft.report.plots import Sets
from blip_ft.report.theme import CSS, to_svg
from blip_ft.uncertainty.diagnostics import Diagnostic
from blip_ft.uncertainty.linearity import agreement
from blip_ft.uncertainty.metrics import FEW, single_sets
from blip_ft.verify.verdict import verdict_rows

#: receipt entries with more lines than this are folded
FOLD = 24
#: plain lists are cut after this many values
MAX_LIST = 60


class FindingLike(Protocol):
    """What a data check found, as far as the report reads it."""

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def severity(self) -> str: ...  # noqa: D102
    @property
    def frames(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def message(self) -> str: ...  # noqa: D102
    @property
    def remedy(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    title: str
    svg: Markup
    caption: str


def write_report(
    folder: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any],
    metrics: tables.AllMetrics,
    predictions: Mapping[str, Sets],
    calibration: Calibration,
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    receipt: Mapping[str, Any],
    findings: Sequence[FindingLike],
    signatures: Sequence[Diagnostic],
    data: Mapping[str, Any] | None = None,
    drift: Mapping[str, Mapping[str, float]] | None = None,
    linearity: Mapping[str, Any] | None = None,
    verdict: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.html``; it gets its name once it is complete.

    Args:
        folder: of the run; exists.
        recipe: with all defaults, or its dump.
        metrics: ``{model: {set: metrics}}`` as in ``metrics.json``; models ``pretrained``,
            ``plain``, ``blip``, any of which may be absent.
        predictions: ``{model: {set: SetPrediction}}``; sets without metrics are not drawn.
        calibration: of ``blip``.
        history: ``{model: [one mapping per epoch]}`` of ``plain`` and ``blip``, with the keys
            ``epoch`` and those of ``plots.CURVES`` that there are.
        receipt: JSON-like; every entry becomes a section, whatever its depth.
        findings: of the data checks.
        signatures: of failures, see ``blip_ft.uncertainty.diagnostics``.
        data: ``summary``, ``model`` and ``frames`` of the data report
            (``blip_ft.data.check.examine.DataReport``), where there is one.
        drift: ``{model: {...}}`` as in ``drift.json``, where the recipe names probe frames.
        linearity: real draws beside the linearised model, of ``blip_ft.uncertainty.linearity.study``.
        verdict: as in ``verify.json`` (``blip_ft.verify.verdict.Verdict.to_dict``).

    Returns:
        Path of the file.

    Raises:
        BlipError: it cannot be written.
    """
    page = environment().get_template("report.html")
    options = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else recipe
    tested = {m: {n: p for n, p in s.items() if n in metrics.get(m, {})} for m, s in predictions.items()}
    text = page.render(
        recipe=options,
        recipe_text=yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True),
        columns=tables.COLUMNS,
        lines=tables.lines(metrics, pooled=True),
        details=_detail_lines(metrics),
        detail_columns=DETAILS,
        sizes=_sizes(metrics),
        figures=_figures(tested, calibration, history),
        calibration=_calibration_rows(calibration),
        uncalibrated=[_SHOWN[n][0] for n in PROPERTIES if not getattr(calibration, n).measured],
        left_out=_left_out(calibration),
        receipt=[(key, value, _weight(value) <= FOLD) for key, value in receipt.items()],
        drift=[(tables.MODELS[name], values) for name, values in (drift or {}).items()],
        **_data_section(data, findings),
        signatures=sorted(signatures, key=lambda s: s.severity != "error"),
        linearity=_linearity(linearity),
        verdict=_verdict(verdict),
    )
    path = Path(folder) / "report.html"
    with whole_file(path) as file:
        file.write(text)
    return path


def write_data_report(path: str | Path, *, name: str, model: str, report: DataReport) -> Path:
    """Write the data section of a report as a page of its own.

    Args:
        path: of the file; replaced if it exists.
        name: of the recipe.
        model: the pretrained model that labels were compared with.
        report: what was found.

    Raises:
        BlipError: it cannot be written.
    """
    data = {"summary": report.summary, "model": report.model, "frames": report.frames}
    page = environment().get_template("check.html")
    text = page.render(name=name, model=model, **_data_section(data, report.findings))
    with whole_file(Path(path)) as file:
        file.write(text)
    return Path(path)


# ---- contents --------------------------------------------------------------------------------

#: further metrics, shown per set for the Bayesian model
DETAILS = (
    tables.Column("energy_rmse_mev_per_atom", "RMSE of energies", "meV/atom"),
    tables.Column("energy_crps_mev_per_atom", "CRPS of energies", "meV/atom"),
    tables.Column("coverage90_energy", "Coverage of energies", "of 90 %", form="share"),
    tables.Column("force_rmse_mev_per_ang", "RMSE of forces", "meV/Å"),
    tables.Column("force_nll", "NLL of forces", "in eV/Å"),
    tables.Column("stress_mae_gpa", "MAE of stress", "GPa"),
    tables.Column("zms", "Mean z²", "1 is right"),
    tables.Column("spread_skill", "Spread over RMSE", "1 is right"),
    tables.Column("ence", "ENCE", "0 is right"),
    tables.Column("miscalibration_area", "Miscalibration area", "0 is right"),
    tables.Column("spearman_atom_reference", "Spearman per atom, reference", "simulated", form="rank"),
    tables.Column(
        "spearman_structure_reference", "Spearman per structure, reference", "simulated", form="rank"
    ),
    tables.Column(
        "partial_spearman_structure", "Spearman per structure, partial", "given the energy", form="rank"
    ),
    tables.Column("ood_score_median", "Out-of-distribution score", "median, 1 is like training"),
    tables.Column("spearman_atom_ood", "Spearman per atom, score", "not the std", form="rank"),
    tables.Column("spearman_structure_ood", "Spearman per structure, score", "largest", form="rank"),
)


def _detail_lines(metrics: tables.AllMetrics) -> list[tables.Line]:
    return tables.lines({m: v for m, v in metrics.items() if m == "blip"}, DETAILS, pooled=True)


def _sizes(metrics: tables.AllMetrics) -> list[tuple[str, int, int]]:
    """(set, structures, atoms) of every test set."""
    sets = next(iter(metrics.values()), {})
    return [(n, sets[n].get("n_structures", 0), sets[n].get("n_atoms", 0)) for n in single_sets(sets)]


def _figures(
    predictions: Mapping[str, Sets],
    calibration: Calibration,
    history: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Picture]:
    out: list[Picture] = []

    def add(title: str, figure: Figure, caption: str) -> None:
        out.append(Picture(title, Markup(to_svg(figure, title)), caption))

    if any(predictions.values()):
        add(
            "Parity, energy per atom",
            plots.energy_parity(predictions, calibration, CSS),
            "Above: prediction against label. Below: prediction minus label, linear up to the "
            "typical error and logarithmic beyond; bars are one total std.",
        )
        add(
            "Parity, force components",
            plots.forces_parity(predictions, CSS),
            "As above; at most "
            f"{plots.MAX_POINTS} components per set are drawn. The worst set lies at the bottom.",
        )
    ours = predictions.get("blip", {})
    if ours:
        add(
            "Error against std",
            plots.error_against_std(ours, calibration, CSS),
            "Total std after calibration. Left: components in bins of equal counts; honest error "
            "bars follow the diagonal, points above it are too narrow. Middle: one point per "
            "structure, what Spearman per structure ranks. Right: single energies, which scatter "
            "below and around the diagonal when error bars are honest.",
        )
        add(
            "Calibration",
            plots.calibration_curves(ours, calibration, CSS),
            "Share of labels inside central Gaussian intervals. Before calibration: the spread of "
            "the posterior draws alone. After: total std.",
        )
    scored = {name: p for name, p in ours.items() if p.ood_score is not None}
    if scored:
        add(
            "Out-of-distribution score",
            ood_scores(scored, calibration, CSS),
            "How far atoms are from the training atoms in the model's own features; no part of the error bars. "
            "1: as far as training atoms are from other groups of the training set. Right: where the line "
            "rises above 1 with the score, error bars do not follow the distance.",
        )
    if any(history.values()):
        add(
            "Training",
            plots.training_curves(history, CSS),
            "One point per epoch; dotted: the epoch with the lowest validation CRPS, which was kept. "
            "Points past the last epoch are Gauss-Newton steps of the mean.",
        )
    return out


def _data_section(data: Mapping[str, Any] | None, findings: Sequence[FindingLike]) -> dict[str, Any]:
    """What ``data.html`` shows."""
    return {
        "findings": sorted(findings, key=lambda f: ["error", "warning", "info"].index(f.severity)),
        "data_roles": list(data["summary"]) if data else [],
        "data_rows": data_tables.summary_rows(data["summary"], data["model"]) if data else [],
        "data_figure": _data_figure(data),
    }


def _data_figure(data: Mapping[str, Any] | None) -> Picture | None:
    if not data or not data["frames"].get("role"):
        return None
    title = "Labels beside the pretrained model"
    return Picture(
        title,
        Markup(to_svg(label_figure(data["frames"], CSS), title)),
        "What composition and smooth functions of the structure do not explain of label minus model. "
        "Middle: inside the band no energy is called wrong. Right: rms of a frame's forces; on the line "
        "it is as large as usual for such a frame, above the dashed one the forces may be wrong.",
    )


def _linearity(result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Table and figures of the section on real draws."""
    if result is None or not result["sets"]:
        return None
    shift = f"{100 * result['max_shift']:g} %"
    agree = (
        f"Std over {result['n_draws']} real draws at the amplitude that the model uses, over that amplitude. "
        "Where the linearised std is exact, the band holds two standard deviations of the sampling error of "
        "that number of draws."
    )
    against = (
        "Dotted: the amplitude that the model uses. Above: root mean square shift of the mean over draws from the "
        f"mean model, over that of the full spread; dashed: {shift} of the spread. Below: medians, and quartiles of "
        "the forces. Where the lower curves leave 1 or the upper ones cross the dashed line, draws have left the "
        "linear regime."
    )
    figures = (
        ("Std of draws and of the linearised model", linear_plots.agreement_figure, agree),
        ("Against the amplitude", linear_plots.amplitude_figure, against),
    )
    return {
        "rows": agreement(result),
        "n_draws": result["n_draws"],
        "amplitude": result["amplitude"],
        "frames": sum(entry["n_frames"] for entry in result["sets"].values()),
        "exact": result["derivatives"] == "linear",
        "figures": [
            Picture(title, Markup(to_svg(draw(result, CSS), title)), text) for title, draw, text in figures
        ],
    }


def _verdict(stored: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the section on the verdict shows."""
    if stored is None:
        return None
    return {
        "result": stored["verdict"],
        "sentence": stored["sentence"],
        "notes": stored["notes"],
        "rows": verdict_rows(stored),
        "beside": [(name, tables.MODELS[name]) for name in stored["beside"]],
    }


#: properties in words, with a readable unit
_SHOWN = {
    "energy": ("energy per atom", "meV/atom", 1e3),
    "forces": ("force components", "meV/Å", 1e3),
    "stress": ("stress components", "GPa", 1 / units.GPa),
}


def _calibration_rows(calibration: Calibration) -> list[dict[str, Any]]:
    """One row per property that was calibrated, in readable units."""
    rows = []
    for name in PROPERTIES:
        item = getattr(calibration, name)
        if item.n_residuals:
            title, unit, factor = _SHOWN[name]
            rows.append(
                {
                    "title": title,
                    "unit": unit,
                    "aleatoric": factor * item.aleatoric,
                    "conformal90": _finite(item.conformal.get(0.9)),
                    "few": " (few: the scale stays 1)" if item.n_residuals < FEW else "",
                    "item": item,
                }
            )
    return rows


def _left_out(calibration: Calibration) -> list[str]:
    """Frames that took no part in a fit, one sentence for each property."""
    return [
        f"Left out of the {_SHOWN[name][0]}, as their labels are beyond doubt wrong: {', '.join(frames)}."
        for name in PROPERTIES
        if (frames := getattr(calibration, name).left_out)
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ---- rendering -------------------------------------------------------------------------------


def environment() -> Environment:
    """Templates of the pages, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("blip_ft.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": tables.format_value,
        "scalar": _scalar,
        "human": _human,
        "sentence": readable,
    }
    environment.tests["records"] = _is_records
    environment.globals |= {"max_list": MAX_LIST, "columns_of": _columns_of}
    return environment


def _scalar(value: Any) -> str:
    """A leaf of the receipt as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return readable(value, ".6g")
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return str(value)


def _human(key: str) -> str:
    """A key of the receipt as a heading."""
    words = str(key).replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def _is_records(value: Any) -> bool:
    """True for a list of mappings: shown as a table."""
    return isinstance(value, Sequence) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _weight(value: Any) -> int:
    """Number of lines that a receipt entry takes, about."""
    if isinstance(value, Mapping):
        return sum(_weight(v) for v in value.values())
    if _is_records(value):
        return len(value)
    return 1
