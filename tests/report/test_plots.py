import io

import numpy as np
import pytest
from PIL import Image

from blip_ft.potential.calibration import Calibration
from blip_ft.report import linear_plots, ood_plots, plots, theme

from .conftest import make_linearity, make_prediction


@pytest.fixture
def honest():
    return {
        "seen": make_prediction("seen", frames=200),
        "hot": make_prediction("hot", frames=200, seed=1, error=0.2),
    }


def curves(ax):
    """Data lines of an axes: those with more points than a guide line has."""
    return [line.get_xydata() for line in ax.lines if len(line.get_xdata()) > 2]


def test_every_figure_can_be_drawn_in_both_formats(run):
    predictions, calibration = run["predictions"], run["calibration"]
    figures = [
        plots.energy_parity(predictions, calibration),
        plots.forces_parity(predictions),
        plots.error_against_std(predictions["blip"], calibration),
        plots.calibration_curves(predictions["blip"], calibration),
        plots.training_curves(run["history"]),
        linear_plots.agreement_figure(make_linearity()),
        linear_plots.amplitude_figure(make_linearity()),
    ]
    for figure in figures:
        image = np.asarray(Image.open(io.BytesIO(theme.to_png(figure, dpi=40))).convert("L"))
        assert image.min() < 100  # ink
        assert image.max() > 200  # paper
        svg = theme.to_svg(figure, 'a "figure" of <x>')
        assert svg.startswith('<svg role="img" aria-label="a &quot;figure&quot; of &lt;x>"')
        assert svg.rstrip().endswith("</svg>")


def test_parity_has_a_column_per_model_in_order(run):
    figure = plots.forces_parity(run["predictions"])
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["pretrained", "plain fine-tuning", "BLIP"]
    upper, lower = figure.axes[2], figure.axes[5]
    p = run["predictions"]["blip"]["seen"]
    offsets = np.concatenate([c.get_offsets() for c in upper.collections])
    drawn = {tuple(row) for row in np.round(offsets, 9)}
    expected = np.stack([p.forces_label.ravel(), p.forces.ravel()], axis=1)
    assert {tuple(row) for row in np.round(expected, 9)} <= drawn
    # the error is prediction minus label, in thousandths
    worst = np.concatenate([c.get_offsets() for c in lower.collections])[:, 1]
    all_errors = np.concatenate([q.forces_error.ravel() for q in run["predictions"]["blip"].values()])
    assert worst.max() == pytest.approx(-1e3 * all_errors.min())


def test_many_points_are_thinned_alike_every_time(monkeypatch, honest):
    monkeypatch.setattr(plots, "MAX_POINTS", 50)
    drawn = [
        [c.get_offsets() for c in plots.forces_parity({"blip": honest}).axes[0].collections] for _ in range(2)
    ]
    assert [len(o) for o in drawn[0]] == [50, 50]
    np.testing.assert_array_equal(drawn[0], drawn[1])


def test_honest_error_bars_follow_the_diagonals(honest):
    figure = plots.error_against_std(honest, Calibration.identity())
    binned = curves(figure.axes[0])
    assert len(binned) == 2
    for xy in binned:
        np.testing.assert_allclose(xy[:, 1], xy[:, 0], rtol=0.2)
    figure = plots.calibration_curves(honest, Calibration.identity())
    for ax, tolerance in zip(figure.axes, (0.03, 0.03, 0.12), strict=True):
        assert len(curves(ax)) == 2
        for xy in curves(ax):
            np.testing.assert_allclose(xy[:, 1], xy[:, 0], atol=tolerance)


def test_before_and_after_calibration_differ(honest):
    tight = Calibration.constant(forces=1e-3, energy=1e-3)
    figure = plots.calibration_curves(honest, tight)
    before, after = curves(figure.axes[0])[0], curves(figure.axes[1])[0]
    assert after[50, 1] < before[50, 1] - 0.3


def test_training_curves_show_what_was_logged_and_the_kept_epoch(run):
    figure = plots.training_curves(run["history"])
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_visible()]
    assert titles == [
        "training loss",
        "KL divergence",
        "validation force CRPS",
        "validation force MAE",
        "posterior std",
    ]
    crps = figure.axes[2]
    assert [len(line.get_xdata()) for line in crps.lines] == [6, 2, 6, 2]
    assert crps.lines[1].get_xdata()[0] == 5.0


def test_training_curves_leave_out_what_is_not_finite():
    history = {"blip": [{"epoch": i, "train_loss": v} for i, v in enumerate([1.0, float("nan"), None, 2.0])]}
    (line,) = plots.training_curves(history).axes[0].lines
    assert line.get_xdata().tolist() == [0, 3]
    # plain fine-tuning has no KL term: a column of zeros is not a curve
    zeros = {"plain": [{"epoch": 0, "train_kl": 0.0}], "blip": [{"epoch": 0, "train_kl": 3.0}]}
    (kl,) = plots.training_curves(zeros).axes
    assert (len(kl.lines), kl.get_yscale()) == (1, "log")
    assert plots.training_curves({"blip": [{"epoch": 0, "train_kl": -1.0}]}).axes[0].get_yscale() == "linear"


def test_set_colours_do_not_depend_on_order():
    looks = theme.style(["hot", "seen", "cold"])
    assert looks["seen"] == (theme.COLOURS[0], theme.MARKERS[0])
    assert len(set(looks.values())) == 3
    assert theme.style(["seen", "hot", "cold"])["hot"] == looks["hot"]


def test_score_against_error_and_error_bar(honest):
    """Error bars that know nothing of the score: its right panel rises where errors do."""
    for p in honest.values():
        p.ood_score = 20 * np.linalg.norm(p.forces_error, axis=1)
        p.ood_score[0] = np.inf  # an unknown element cannot be drawn
    figure = ood_plots.ood_scores(honest, Calibration.identity())
    shares, structures, ratio = figure.axes
    assert [ax.get_xscale() for ax in figure.axes] == ["log"] * 3
    for line, p in zip(curves(shares), honest.values(), strict=True):
        assert line[-1, 1] == pytest.approx(1 - 1 / len(p.numbers))
    assert sum(len(c.get_offsets()) for c in structures.collections) == 2 * 200 - 2
    for line in curves(ratio):
        assert line[-1, 1] > 1.4
        assert line[0, 1] < 0.7


def test_sets_without_score_are_left_out(honest):
    honest["hot"].ood_score = np.ones(len(honest["hot"].numbers))
    figure = ood_plots.ood_scores(honest, Calibration.identity())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["hot"]
    svg = theme.to_svg(ood_plots.ood_scores({}, Calibration.identity()), "empty")
    assert svg.startswith("<svg")


@pytest.mark.parametrize("missing", ["labels", "scores of known elements"])
def test_scores_without_anything_to_compare(honest, missing):
    for p in honest.values():
        p.ood_score = np.full(len(p.numbers), 2.0 if missing == "labels" else np.inf)
        if missing == "labels":
            p.forces_label[:] = np.nan
    image = Image.open(io.BytesIO(theme.to_png(ood_plots.ood_scores(honest, Calibration.identity()), dpi=40)))
    assert np.asarray(image.convert("L")).min() < 100


def test_draws_beside_the_linearised_model():
    result = make_linearity()
    forces, energies = linear_plots.agreement_figure(result).axes
    points = np.concatenate([c.get_offsets() for c in forces.collections if len(c.get_offsets()) == 30])
    expected = np.concatenate(
        [
            1e3 * np.stack([e["forces"]["exact"], e["forces"]["draws"]], axis=1)
            for e in result["sets"].values()
        ]
    )
    np.testing.assert_allclose(points, expected)
    assert "exact" in energies.get_xlabel()
    same = linear_plots.agreement_figure(make_linearity(exact=False))
    assert "same draws" in same.axes[0].get_xlabel()
    axes = linear_plots.amplitude_figure(result).axes
    shift = curves(axes[0])
    assert len(shift) == 2
    np.testing.assert_allclose(shift[0], [[a, 0.2 * a * a] for a in (0.3, 0.6, 1.0)])
    # a set without any spread has no ratio: it is left out, not drawn as zero
    for point in result["sets"]["hot"]["energy"]["curve"]:
        point |= {"low": None, "median": None, "high": None}
    linear_plots.amplitude_figure(result)
