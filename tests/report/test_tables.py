import pytest
from rich.console import Console

from blip_ft.report import demo_table
from blip_ft.report.tables import COLUMNS, format_value, lines

from .conftest import make_run


def printed(metrics, width=80) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(demo_table(metrics, "[bold]run[/]"))
    return console.export_text().splitlines()


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, "value", "–"),
        (0.0, "value", "0.00"),
        (0.564, "value", "0.56"),
        (9.994, "value", "9.99"),
        (9.996, "value", "10.0"),
        (54.82, "value", "54.8"),
        (99.96, "value", "100"),
        (-2.5, "value", "−2.50"),
        (0.746, "rank", "0.75"),
        (-0.3, "rank", "−0.30"),
        (0.896, "share", "90 %"),
    ],
)
def test_formats(value, form, text):
    assert format_value(value, form) == text


def test_lines_go_by_set_then_model():
    rows = lines(make_run()["metrics"])
    assert [(r.set_name, r.model) for r in rows] == [
        (s, m) for s in ("seen", "hot", "dense") for m in ("pretrained", "plain", "BLIP")
    ]
    assert [r.first for r in rows[:3]] == [True, False, False]


def test_pool_is_shown_on_request_only():
    run = make_run()
    assert lines(run["metrics"], pooled=True)[-1].set_name == "all unseen"
    one = make_run(unseen=("hot",))["metrics"]
    assert [r.set_name for r in lines(one, pooled=True)][-1] == "hot"
    called = make_run(unseen=("unseen",))["metrics"]
    assert {r.set_name for r in lines(called)} == {"seen", "unseen"}
    assert lines({}) == []


def test_best_is_the_lowest_error_and_never_a_rank():
    row = {c.key: 1.0 for c in COLUMNS}
    metrics = {
        "pretrained": {"seen": row},
        "plain": {"seen": row | {COLUMNS[0].key: 0.5}},
        "blip": {"seen": {}},
    }
    rows = {r.model: [c.best for c in r.cells] for r in lines(metrics)}
    assert rows["plain"] == [True, True, True] + [False] * 5
    assert rows["pretrained"] == [False, True, True] + [False] * 5
    assert rows["BLIP"] == [False] * 8
    assert not any(c.best for r in lines({"blip": {"seen": row}}) for c in r.cells)


def test_terminal_table_fits_80_columns():
    metrics = make_run()["metrics"]
    text = printed(metrics)
    assert max(map(len, text)) <= 80
    joined = "\n".join(text)
    assert "…" not in joined
    assert "[bold]run[/]" in joined  # names are text, not markup
    row = metrics["blip"]["dense"]
    (line,) = [x for x in text if "BLIP" in x and format_value(row["force_mae_mev_per_ang"]) in x]
    assert line.split()[-2:] == [*format_value(row["coverage90"], "share").split()]
    names = [x.split()[0] for x in text if "pretrained" in x]
    assert names == ["seen", "hot", "dense"]


def test_long_set_names_give_way_to_numbers():
    metrics = make_run(unseen=("a_phase_with_a_very_long_name_indeed",))["metrics"]
    text = "\n".join(printed(metrics))
    assert "…" not in text
    assert format_value(metrics["blip"]["seen"]["force_crps_mev_per_ang"]) in text


def test_few_values_are_marked_in_the_terminal():
    metrics = make_run()["metrics"]
    metrics["blip"]["hot"] |= {"n_energy_labels": 4, "n_ranked_structures": 2}
    text = printed(metrics)
    assert max(map(len, text)) <= 80
    joined = "\n".join(text)
    assert f"{format_value(metrics['blip']['hot']['energy_mae_mev_per_atom'])}*" in joined
    assert joined.count("*") == 4, "energy, both ranks of structures, and the line that explains"
    assert "* from fewer than five values" in joined
    assert "*" not in "".join(printed(make_run()["metrics"]))
