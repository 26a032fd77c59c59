"""Recipes: every wrong key and value is named, every shipped recipe and its page are right."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.backbones.registry import ENTRY_POINT_GROUP
from blip_ft.config import Recipe, load_recipe, parse_recipe, shipped
from blip_ft.errors import RecipeError

ROOT = Path(__file__).parents[1]


def tree(**changes: Any) -> dict[str, Any]:
    """A small valid recipe."""
    base: dict[str, Any] = {
        "name": "x",
        "data": {"train": "frames.extxyz"},
        "model": {"adapter": "fake", "checkpoint": "tiny"},
    }
    return base | changes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree()), encoding="utf-8")
    return path


# ---- unknown keys ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("sed=1", "sed", "seed"),
        ("modle.adapter=x", "modle", "model"),
        ("data.trian=x", "data.trian", "train"),
        ("posterior.prior_scal=1", "posterior.prior_scal", "prior_scale"),
        ("data.split.bye=random", "data.split.bye", "by"),
        ("data.split.validaton=0.1", "data.split.validaton", "validation"),
        ("trainer.max_epoch=3", "trainer.max_epoch", "max_epochs"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(file: Path, override: str, key: str, suggestion: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), [override])
    message = str(caught.value)
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{suggestion}'?" in message
    assert str(file) in message


def test_unknown_key_that_resembles_nothing_lists_the_valid_ones(file: Path):
    with pytest.raises(RecipeError, match=r"valid names: .*batch_size.*train.*validation"):
        load_recipe(str(file), ["data.qqqqqqq=1"])


def test_all_errors_of_a_recipe_come_in_one_message():
    wrong = tree(sed=1, objective={"temperature": -1, "energy_sdt": 2}, posterior={"family": "gauss"})
    with pytest.raises(RecipeError) as caught:
        parse_recipe(wrong)
    for part in (
        "'sed'",
        "'objective.temperature'",
        "'objective.energy_sdt'",
        "'posterior.family'",
        "'weight'",
    ):
        assert part in str(caught.value)


@given(
    st.sampled_from([(), ("data",), ("data", "split"), ("model",), ("plain",), ("uncertainty",)]),
    st.text(st.characters(categories=["Ll"]), min_size=1, max_size=8),
)
def test_no_unknown_key_passes_at_any_depth(path: tuple[str, ...], key: str):
    section: Any = Recipe
    for part in path:
        section = section.model_fields[part].annotation
    wrong = tree()
    here = wrong
    for part in path:
        here = here.setdefault(part, {})
    if key in section.model_fields:
        return
    here[key] = 1
    with pytest.raises(RecipeError, match="unknown key"):
        parse_recipe(wrong)


# ---- wrong values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=one", "seed"),
        ("seed=1.5", "seed"),
        ("overwrite=perhaps", "overwrite"),
        ("data.batch_size=0", "data.batch_size"),
        ("data.batch_size=[1, 2]", "data.batch_size"),
        ("data.split.test=1", "data.split.test"),
        ("data.split.by=frame", "data.split.by"),
        ("model.dtype=float16", "model.dtype"),
        ("model.adapter=null", "model.adapter"),
        ("posterior.prior_scale=0", "posterior.prior_scale"),
        ("posterior.prior_scale=-1e-3", "posterior.prior_scale"),
        ("objective.forces_std=wide", "objective.forces_std"),
        ("uncertainty.n_draws=1", "uncertainty.n_draws"),
        ("optimizer=fast", "optimizer"),
        ("trainer=[1]", "trainer"),
    ],
)
def test_wrong_value_is_named(file: Path, override: str, key: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), [override])
    assert f"'{key}'" in str(caught.value)
    assert "docs/recipes.md" in caught.value.remedy


@pytest.mark.parametrize("section", ["data", "model"])
def test_missing_section_is_named(section: str):
    wrong = tree()
    del wrong[section]
    with pytest.raises(RecipeError, match=f"'{section}': field required"):
        parse_recipe(wrong)


def test_assignment_is_checked_too():
    recipe = parse_recipe(tree())
    with pytest.raises(ValueError, match="greater than 0"):
        recipe.objective.temperature = -1.0


# ---- overrides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("seed=7", lambda r: r.seed, 7),
        ("name=demo", lambda r: r.name, "demo"),
        ("overwrite=true", lambda r: r.overwrite, True),
        ("optimizer.learning_rate=1e-3", lambda r: r.optimizer.learning_rate, 1e-3),
        ("optimizer.learning_rate=3E-4", lambda r: r.optimizer.learning_rate, 3e-4),
        ("objective.temperature=5", lambda r: r.objective.temperature, 5.0),
        ("model.noise=[scalar, 'readout.*']", lambda r: r.model.noise, ["scalar", "readout.*"]),
        ("data.train=[a.xyz, b.xyz]", lambda r: r.data.train, ["a.xyz", "b.xyz"]),
        ("data.train=a.xyz@0:50", lambda r: r.data.train, "a.xyz@0:50"),
        ("data.validation=null", lambda r: r.data.validation, None),
        ("data.test={seen: a, far: b}", lambda r: r.data.test, {"seen": "a", "far": "b"}),
        ("data.fields={energy: E}", lambda r: r.data.fields, {"energy": "E"}),
        ("data.split.by=random", lambda r: r.data.split.by, "random"),
        ("trainer.max_epochs=3", lambda r: r.trainer, {"max_epochs": 3}),
        ("trainer.gradient_clip_val=1e-1", lambda r: r.trainer, {"gradient_clip_val": 0.1}),
        ("model.checkpoint=a=b.pth", lambda r: r.model.checkpoint, "a=b.pth"),
    ],
)
def test_override(file: Path, override: str, get: Any, value: Any):
    assert get(load_recipe(str(file), [override])) == value


def test_the_last_override_wins_and_the_others_stay(file: Path):
    recipe = load_recipe(str(file), ["seed=1", "data.batch_size=2", "seed=2"])
    assert (recipe.seed, recipe.data.batch_size, recipe.data.train) == (2, 2, "frames.extxyz")


@pytest.mark.parametrize("override", ["seed", "=1", "--seed 1"])
def test_override_that_is_none_is_refused(file: Path, override: str):
    with pytest.raises(RecipeError, match="key=value"):
        load_recipe(str(file), [override])


@pytest.mark.parametrize("override", ["seed=[1", "seed={a: b: c}"])
def test_override_that_is_not_yaml_is_refused(file: Path, override: str):
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(str(file), [override])


def test_override_below_a_value_is_refused(file: Path):
    with pytest.raises(RecipeError, match="'name' has no keys below it"):
        load_recipe(str(file), ["name.first=1"])


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_every_number_survives_an_override(value: float):
    recipe = load_recipe("sio2_sevennet", [f"objective.forces_std={value!r}"])
    assert recipe.objective.forces_std == value


# ---- files -----------------------------------------------------------------------------------


def test_name_is_the_file_name_unless_it_is_given(tmp_path: Path):
    path = tmp_path / "glass.yaml"
    nameless = tree()
    del nameless["name"]
    path.write_text(yaml.safe_dump(nameless))
    assert load_recipe(str(path)).name == "glass"
    assert load_recipe(str(path)).folder == Path("runs/glass")


def test_missing_recipe_lists_the_shipped_ones(tmp_path: Path):
    with pytest.raises(RecipeError, match="sio2_sevennet"):
        load_recipe(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe", b"- 1\n- 2\n", b"", b"just text"])
def test_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"bad\.yaml"):
        load_recipe(str(path))


def test_a_folder_is_no_recipe(tmp_path: Path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(str(tmp_path))


def test_recipe_survives_yaml(file: Path, tmp_path: Path):
    recipe = load_recipe(str(file), ["data.test={seen: a}", "optimizer.learning_rate=1e-3"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(str(again)) == recipe


# ---- what is shipped -------------------------------------------------------------------------


def test_every_file_of_the_recipes_folder_is_shipped():
    on_disk = {p.stem: p for p in (ROOT / "recipes").glob("*.yaml")}
    assert set(shipped()) == set(on_disk)
    assert {"sio2_sevennet", "sio2_chgnet"} <= set(on_disk)
    assert sorted(p.suffix for p in (ROOT / "recipes").iterdir() if p.is_file()) == sorted(
        [".yaml"] * len(on_disk) + [".py"]
    )


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_recipe_is_valid(name: str):
    recipe = load_recipe(name, frames=False)
    assert recipe.name == name
    assert recipe.model.adapter in {e.name for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}


def test_the_page_of_all_keys_is_current():
    page = ROOT / "docs" / "generate_recipes.py"
    done = subprocess.run([sys.executable, page, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_name_cannot_leave_the_output_folder(file: Path):
    for name in ("../other", "a/b", ".hidden", ""):
        with pytest.raises(RecipeError, match="name"):
            load_recipe(str(file), [f"name={name}"])
    assert load_recipe(str(file), ["name=2024"]).name == "2024"


def test_exponents_are_numbers_at_any_depth(file: Path):
    recipe = load_recipe(str(file), ["trainer.gradient_clip_val=1e1", "optimizer.learning_rate=1e-3"])
    assert recipe.trainer["gradient_clip_val"] == 10.0
    assert recipe.optimizer.learning_rate == 1e-3


# ---- values that no run can have -------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=-1", "seed"),
        ("seed=5000000000", "seed"),
        ("data.split.seed=-1", "data.split.seed"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate"),
        ("optimizer.std_learning_rate=.nan", "optimizer.std_learning_rate"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay"),
        ("objective.forces_std=1e999", "objective.forces_std"),
        ("posterior.prior_scale=.inf", "posterior.prior_scale"),
        ("data.energy_offset=.nan", "data.energy_offset"),
        ("data.reference_energies={Si: .inf}", "data.reference_energies.Si"),
    ],
)
def test_numbers_that_are_none(file: Path, override: str, key: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file), [override])
    assert f"'{key}'" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"path": "x.xyz", "feilds": {}}, "unknown key 'data.train.feilds': did you mean 'fields'?"),
        ({"path": "x.xyz", "units": {"energie": "eV"}}, "'data.train.units.energie"),
        ({"fields": {}}, "'data.train.path': field required"),
        ({"path": 3}, "'data.train.path': should be a text (got 3)"),
        (
            ["x.xyz", {"path": "y.xyz", "splt": "train"}],
            "unknown key 'data.train.1.splt': did you mean 'split'?",
        ),
        (7, "'data.train': should be a text (got 7)"),
    ],
)
def test_a_typo_in_a_source_is_one_error(source: Any, problem: str):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree(data={"train": source}))
    message = str(caught.value)
    assert problem in message
    assert message.count(";") == message.count(", or ") == 0
    for word in ("SourceConfig", "list[", "union", "pydantic", "dictionary"):
        assert word not in message


def test_typos_in_test_sets():
    with pytest.raises(RecipeError, match=r"unknown key 'data\.test\.hot\.feilds': did you mean 'fields'\?"):
        parse_recipe(tree(data={"train": "x", "test": {"hot": {"path": "y", "feilds": {}}}}))
    with pytest.raises(RecipeError, match=r"unknown key 'data\.test\.feilds': did you mean 'fields'\?"):
        parse_recipe(tree(data={"train": "x", "test": {"path": "y", "feilds": {}}}))
    sets = parse_recipe(
        tree(data={"train": "x", "test": {"seen": "y", "path": ["z", {"path": "w"}]}})
    ).data.test
    assert isinstance(sets, dict)
    assert sorted(sets) == ["path", "seen"]


def laughs(levels: int) -> str:
    """Aliases of aliases: ten to the power of ``levels`` values."""
    lines = ["a0: &a0 [" + ", ".join("x" * 10) + "]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (laughs(12), "more than 100,000 values"),
        ("name: " + "[" * 20_000 + "]" * 20_000, "nested deeper than 50 levels"),
        ("name: &a [*a]", "stands inside what it stands for"),
        ("name: &a {b: [*a]}", "stands inside what it stands for"),
        ("name: 2001-99-99", "not a YAML file"),
    ],
)
def test_yaml_bombs_are_refused_at_once(tmp_path: Path, file: Path, text: str, problem: str):
    path = tmp_path / "bomb.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=problem):
        load_recipe(str(path))
    value = text.partition(": ")[2]
    if not text.startswith("a0"):
        with pytest.raises(RecipeError):
            load_recipe(str(file), [f"name={value}"])


def test_aliases_may_be_used(tmp_path: Path):
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump(tree()) + "plain: &p {enabled: true}\nx: *p\n".replace("x: *p\n", ""))
    assert load_recipe(str(path)).plain.enabled
    shared = "data: {train: &t {path: x.xyz, fields: {energy: E}}, calibration: *t}\n"
    path.write_text(yaml.safe_dump({k: v for k, v in tree().items() if k != "data"}) + shared)
    data = load_recipe(str(path)).data
    assert data.train == data.calibration


# ---- paths -----------------------------------------------------------------------------------


def test_paths_are_expanded_in_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", "/sets")
    data = {
        "train": ["~/a.xyz@0:5", {"path": "$SETS/b.xyz"}],
        "validation": "${SETS}/v.xyz",
        "test": {"hot": "~/hot.xyz"},
        "split": {"by": "file", "file": "~/splits.json"},
        "calibration": "org/set",
        "replay": {"source": "~/r.xyz"},
    }
    recipe = parse_recipe(
        tree(output="~/runs", data=data, model={"adapter": "fake", "checkpoint": "$SETS/m.pt"})
    )
    assert recipe.folder == tmp_path / "runs" / "x"
    assert isinstance(recipe.data.train, list)
    texts = [one if isinstance(one, str) else one.path for one in recipe.data.train]
    assert texts == [f"{tmp_path}/a.xyz@0:5", "/sets/b.xyz"]
    assert recipe.data.validation == "/sets/v.xyz"
    assert recipe.data.test == {"hot": f"{tmp_path}/hot.xyz"}
    assert recipe.data.split.file == f"{tmp_path}/splits.json"
    assert recipe.data.calibration == "org/set"
    assert recipe.data.replay is not None
    assert recipe.data.replay.source == f"{tmp_path}/r.xyz"
    assert recipe.model.checkpoint == "/sets/m.pt"
    monkeypatch.delenv("SETS")
    with pytest.raises(RecipeError, match=r"'output': the variable \$SETS is not set"):
        parse_recipe(tree(output="$SETS/runs"))
    (tmp_path / "$SETS.xyz").touch()
    literal = str(tmp_path / "$SETS.xyz")
    assert parse_recipe(tree(data={"train": literal})).data.train == literal, (
        "what exists is meant as written"
    )


def test_earlier_names_of_keys_are_taken_with_a_note(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe(
        str(file), ["posterior.context=0.25", "objective.kind=function_kl", "objective.replay=x.extxyz"]
    )
    assert recipe.posterior.perturbed_share == 0.25
    assert recipe.objective.frames == "x.extxyz"
    assert "posterior.context is called posterior.perturbed_share now" in caplog.text
    assert "objective.replay is called objective.frames now" in caplog.text
    with pytest.raises(RecipeError, match="both are given"):
        load_recipe(str(file), ["posterior.context=0.25", "posterior.perturbed_share=0.5"])
