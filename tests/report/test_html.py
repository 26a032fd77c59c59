import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib
import numpy as np
import pytest

from blip_ft.errors import BlipError
from blip_ft.potential.calibration import Calibration, PropertyCalibration
from blip_ft.report import write_report
from blip_ft.report.tables import format_value, lines
from blip_ft.uncertainty.diagnostics import Diagnostic, exploding_variance
from blip_ft.uncertainty.metrics import metrics_table

from .conftest import make_linearity, make_recipe, make_run

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects links, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def render(folder, run) -> str:
    return write_report(folder, **run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict[str, Any], str]:
    """A run and its page, rendered once; not to be changed."""
    run = make_run()
    before, had_pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    folder = tmp_path_factory.mktemp("run")
    html = render(folder, run)
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    # no global state of matplotlib is touched
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot
    return run, html


@pytest.fixture
def plain_run(run) -> dict[str, Any]:
    """A run without figures, which take most of the time."""
    return run | {"predictions": {}, "history": {}}


def test_page_is_whole_and_loads_nothing(whole):
    _, html = whole
    page = Page(html)
    assert "script" not in page.tags
    assert page.links
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,")), link[:80]
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html


def test_page_says_everything(whole):
    run, html = whole
    text = Page(html).text
    assert html.count('<svg role="img"') == 5
    metrics = run["metrics"]
    for expected in (
        "demo",
        format_value(metrics["blip"]["seen"]["force_mae_mev_per_ang"]),
        format_value(metrics["plain"]["dense"]["force_mae_mev_per_ang"]),
        format_value(metrics["pretrained"]["unseen"]["energy_mae_mev_per_atom"]),
        "all unseen",
        "None of the known failures",
        "forces look small",
        "x.xyz#3",
        "1.25e-07",
        "-110.25",
        "layer39",
        "2.13.0",
        "prior_scale: auto",
        "energy per atom",
    ):
        assert expected in text, expected
    # long sections are folded, short ones open
    folds = {name: bool(is_open) for is_open, name in re.findall(r"<details( open)?><summary>([^<]*)", html)}
    assert folds["Step zero"]
    assert not folds["Conversion"]


def test_both_schemes(whole):
    _, html = whole
    assert "prefers-color-scheme: dark" in html
    assert "var(--ink)" in html[html.index("<svg") :]
    for placeholder in ("#010203", "#020304", "#030405"):
        assert placeholder not in html


def test_signatures_by_severity(tmp_path, plain_run):
    plain_run["signatures"] = [
        Diagnostic("sigma_stuck", "warning", "it never left", "raise the rate"),
        Diagnostic("exploding_variance", "error", "it grew", "lower the rate"),
    ]
    html = render(tmp_path, plain_run)
    assert "None of the known failures" not in html
    assert html.index("Exploding variance") < html.index("Sigma stuck")
    assert "raise the rate" in html
    assert 'class="notice error"' in html


def test_hostile_names_are_text(tmp_path, run):
    name = '<b onload="x">$\\frac{$</b> & --> "quote"'
    for model in run["predictions"]:
        run["predictions"][model][name] = replace(run["predictions"][model].pop("hot"), name=name)
        run["metrics"][model][name] = run["metrics"][model].pop("hot")
    run["receipt"]["file"] = "<script>alert(1)</script>"
    html = render(tmp_path, run)
    page = Page(html)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "alert(1)" in page.text


def test_written_again_and_unwritable(tmp_path, plain_run):
    assert "second" not in render(tmp_path, plain_run)
    plain_run["recipe"] = make_recipe("second").model_dump(mode="json")  # a dump serves as well
    assert "second" in render(tmp_path, plain_run)
    with pytest.raises(BlipError, match=r"report\.html"):
        write_report(tmp_path / "absent", **plain_run)


def test_a_run_without_test_frames_or_calibration(tmp_path, run):
    run |= {
        "metrics": {"blip": {}},
        "predictions": {"blip": {}},
        "calibration": Calibration.identity(),
        "history": {},
        "receipt": {},
        "findings": [],
        "signatures": [],
    }
    text = Page(render(tmp_path, run)).text
    assert "No test frames were given" in text
    assert "There is nothing to draw" in text
    assert "no labels to calibrate on" in text


def test_sets_without_metrics_are_not_drawn(tmp_path, run):
    """Validation and calibration frames may be among the predictions."""
    run |= {"metrics": {m: {} for m in run["metrics"]}, "history": {}}
    assert "There is nothing to draw" in render(tmp_path, run)


def test_sets_without_labels(tmp_path, run):
    """One set has no energies, one no forces, one nothing: the others are drawn as ever."""
    for sets in run["predictions"].values():
        sets["seen"].energy_label[:] = np.nan
        sets["hot"].forces_label[:] = np.nan
        sets["dense"].energy_label[:] = np.nan
        sets["dense"].forces_label[:] = np.nan
    html = render(tmp_path, run)
    Page(html)
    assert html.count('<svg role="img"') == 5


def test_drift_on_the_probe_frames(tmp_path, run):
    assert 'id="drift"' not in render(tmp_path, run)
    drift = {"blip": {"energy_mev_per_atom": 1.234, "forces_mev_per_ang": 56.78, "n_structures": 12.0}}
    page = Page(render(tmp_path, run | {"drift": drift}))
    assert "BLIP 1.23 56.8 12" in page.text
    assert "#drift" in page.links


def test_scores_have_a_figure_and_columns(tmp_path, run):
    for i, p in enumerate(run["predictions"]["blip"].values()):
        p.ood_score = np.full(len(p.numbers), 1.5 + 4 * i) + np.linalg.norm(p.forces_error, axis=1)
    run["metrics"]["blip"] = metrics_table(run["predictions"]["blip"], run["calibration"])
    html = render(tmp_path, run)
    assert html.count('<svg role="img"') == 6
    text = Page(html).text
    assert "Out-of-distribution score" in text
    for key in ("ood_score_median", "spearman_atom_ood"):
        form = "rank" if "spearman" in key else "value"
        assert format_value(run["metrics"]["blip"]["hot"][key], form) in text


def test_real_draws_beside_the_linearised_model(tmp_path, plain_run):
    html = render(tmp_path, plain_run | {"linearity": make_linearity()})
    text = Page(html).text
    assert html.count('<svg role="img"') == 2
    assert "8 draws on 4 test frames" in text
    assert "0.6 of the posterior's width" in text
    assert "± 27 %" in text
    assert "5 % of the spread" in text
    assert 'href="#draws"' in html
    for empty in (None, make_linearity(())):
        page = render(tmp_path, plain_run | {"linearity": empty})
        assert 'id="draws"' not in page
        assert 'href="#draws"' not in page


def test_numbers_from_few_values_say_so(tmp_path, run):
    """Three energies in a set, and forces of all its atoms."""
    run |= {"predictions": {}, "history": {}}
    for model, sets in make_run()["predictions"].items():
        sets["hot"].energy_label[3:] = np.nan
        constant = Calibration.constant(energy=0.01, forces=0.1)
        run["metrics"][model] = metrics_table(sets, run["calibration"] if model == "blip" else constant)
    rows = {(r.set_name, r.model): r.cells for r in lines(run["metrics"])}
    few = rows["hot", "BLIP"][0]
    assert few.few == 3
    assert [c.few for c in rows["hot", "BLIP"][1:]] == [None] * 7
    assert all(c.few is None for c in rows["seen", "BLIP"])
    text = Page(render(tmp_path, run)).text
    assert f"{few.text} of 3" in text
    assert "A number from fewer than five values has their count behind it" in text


def test_what_was_not_calibrated_is_never_shown_as_calibrated(tmp_path, plain_run):
    calibration = replace(plain_run["calibration"], energy=PropertyCalibration())
    plain_run["calibration"] = calibration
    text = Page(render(tmp_path, plain_run)).text
    assert "Not calibrated: energy per atom. No calibration frame has a label" in text
    assert "Not calibrated: stress components" in text
    assert "Not calibrated: force" not in text
    table = text[text.index("Excess kurtosis") : text.index("Not calibrated")]
    assert "force components" in table
    assert "energy per atom" not in table


def test_left_out_frames_are_named_and_few_residuals_too(tmp_path, plain_run):
    forces = replace(plain_run["calibration"].forces, left_out=("cal.xyz#3",), n_residuals=4)
    plain_run["calibration"] = replace(plain_run["calibration"], forces=forces)
    text = Page(render(tmp_path, plain_run)).text
    assert "Left out of the force components, as their labels are beyond doubt wrong: cal.xyz#3." in text
    assert "4 (few: the scale stays 1)" in text


def test_no_nan_in_any_sentence(tmp_path, plain_run):
    nan = float("nan")
    plain_run["receipt"]["step_zero"] = {"energy": nan, "forces": float("inf")}
    plain_run["drift"] = {
        "blip": {"energy_mev_per_atom": nan, "forces_mev_per_ang": 1.0, "n_structures": 2.0}
    }
    plain_run["signatures"] = exploding_variance([{"epoch": 3, "train_loss": nan}])
    text = Page(render(tmp_path, plain_run)).text
    assert not re.search(r"\b(nan|NaN|inf)\b", text)
    assert "train loss is not a number at epoch 3" in text
    assert "2 (few)" in text
