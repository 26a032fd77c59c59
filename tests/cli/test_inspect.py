"""``inspect``, ``doctor`` and ``recipes``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blip_ft.config import load_recipe
from blip_ft.testing.fake import FakeBackbone


def test_inspect_bare_model(call: Any):
    code, out, _ = call("inspect", "fake:tiny", "model.noise=none", "--json")
    assert code == 0
    tree = json.loads(out)
    assert tree["adapter"] == "fake"
    assert "tiny" in tree["base"]["checkpoint"]
    rows = tree["modules"]
    assert tree["counts"]["converted"] == sum(r["n_weights"] for r in rows if r["action"] == "converted") > 0
    assert tree["counts"]["noisy"] == 0
    assert all(r["reason"] for r in rows if r["action"] == "left")


def test_inspect_recipe_run_and_model_agree(call: Any, run: Path, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {train: x}\nmodel: {adapter: fake, checkpoint: tiny, dtype: float64}\n")
    trees = [
        json.loads(call("inspect", spec, "--json")[1]) for spec in ("fake:tiny", recipe, run, run / "model")
    ]
    assert all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize("flag", [[], ["--trust"]])
def test_trust_reaches_the_adapter(monkeypatch: pytest.MonkeyPatch, call: Any, flag: list[str]):
    seen: list[bool] = []
    load = FakeBackbone.load

    def watched(checkpoint: str, *, trust: bool = False, **options: Any) -> FakeBackbone:
        seen.append(trust)
        return load(checkpoint, trust=trust, **options)

    monkeypatch.setattr(FakeBackbone, "load", watched)
    assert call("inspect", "fake:tiny", *flag)[0] == 0
    assert seen == [bool(flag)]


def test_inspect_prints_every_module(call: Any):
    names = [m["name"] for m in json.loads(call("inspect", "fake:tiny", "--json")[1])["modules"]]
    _, out, _ = call("inspect", "fake:tiny")
    assert [n for n in names if n not in out] == []
    assert "converted, trained, noisy" in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["nonsense"], "neither a recipe nor a run nor a model"),
        (["fak:tiny"], "did you mean 'fake'?"),
        (["fake:nonsense"], "nonsense"),
        (["fake:tiny", "model.nois=all"], "did you mean 'noise'?"),
        (["fake:tiny", "model.noise=nothing_like_it"], "matches no convertible module"),
        (["."], "no trained model here"),
    ],
)
def test_inspect_refuses(call: Any, argv: list[str], text: str):
    code, out, err = call("inspect", *argv)
    assert (code, out) == (2, "")
    assert text in err


def test_doctor_prints_json_and_a_table(call: Any):
    tree = json.loads(call("doctor", "--json")[1])
    assert isinstance(tree["adapters"]["sevennet"]["available"], bool)
    assert "version" in tree["adapters"]["sevennet"]
    _, out, _ = call("doctor")
    assert [name for name in tree["adapters"] if name not in out] == []


def test_recipes_lists_every_recipe(call: Any):
    from blip_ft.config import shipped

    _, out, _ = call("recipes")
    for name in shipped():
        model = load_recipe(name, frames=False).model
        assert any(name in row and f"{model.adapter}:{model.checkpoint}" in row for row in out.splitlines())


def test_every_recipe_says_what_it_is_for():
    from blip_ft.config import recipe_summary, shipped

    assert [name for name, path in shipped().items() if len(recipe_summary(path)[1]) < 20] == []
