"""Precisions below that of the weights: what is refused, and where TF32 holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ase.io import write

from blip_ft import cli
from blip_ft.backbones.registry import get_adapter
from blip_ft.config import Recipe, parse_recipe
from blip_ft.errors import RecipeError
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training.module import FineTuneModule
from blip_ft.training.precision import check_precision, matrix_products

from .labelled import frames


def recipe(**sections: Any) -> Recipe:
    model = {"adapter": "fake", "checkpoint": "tiny"} | sections.pop("model", {})
    return parse_recipe({"name": "x", "data": {"train": "-"}, "model": model} | sections)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "bf16", "16-mixed", "16-true", "16", 16])
def test_half_precisions_are_refused_with_the_reason(precision: Any):
    with pytest.raises(RecipeError, match=r"is refused: .*meV/Å") as caught:
        check_precision(recipe(trainer={"precision": precision}), FakeBackbone)
    assert caught.value.field == "trainer.precision"


@pytest.mark.parametrize("precision", ["32-true", "64-true", 32, "32", "64"])
def test_precisions_of_weights_are_lightnings_own(precision: Any):
    check_precision(recipe(trainer={"precision": precision}), FakeBackbone)


def test_tf32_is_for_float32():
    check_precision(recipe(model={"tf32": True}), FakeBackbone)
    with pytest.raises(RecipeError, match="the model is in float64"):
        check_precision(recipe(model={"tf32": True, "dtype": "float64"}), FakeBackbone)


@pytest.mark.parametrize(
    ("adapter", "refused"),
    [
        pytest.param(name, name == "chgnet", marks=pytest.mark.backend(name))
        for name in ("chgnet", "sevennet", "mace", "fairchem", "orb", "diep")
    ],
)
def test_tf32_is_refused_where_forces_do_not_survive_it(adapter: str, refused: bool):
    backbone = get_adapter(adapter)
    if not refused:
        check_precision(recipe(model={"tf32": True}), backbone)
        return
    with pytest.raises(RecipeError, match="TF32 is refused for chgnet: forces are off by 27 meV/Å"):
        check_precision(recipe(model={"tf32": True}), backbone)


def test_a_training_is_in_tf32_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    step = FineTuneModule.training_step

    def watched(self: Any, *args: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return step(self, *args)

    monkeypatch.setattr(FineTuneModule, "training_step", watched)
    write(tmp_path / "frames.extxyz", frames(16, scale=1.1))
    tree = {
        "output": str(tmp_path / "runs"),
        "name": "run",
        "data": {"train": str(tmp_path / "frames.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "tf32": True},
        "posterior": {"family": "weight", "prior_scale": 0.1},
        "objective": {"temperature": 1e-3},
        "uncertainty": {"n_draws": 2, "linearity_frames": 0},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert cli.main(["fit", str(tmp_path / "recipe.yaml")]) == 0
    assert set(seen) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
    seen.clear()
    assert cli.main(["fit", str(tmp_path / "recipe.yaml"), "name=other", "model.tf32=false"]) == 0
    assert set(seen) == {"highest"}


def test_a_refused_precision_is_told_before_the_data_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tree = {
        "output": str(tmp_path / "runs"),
        "name": "run",
        "data": {"train": "nowhere.extxyz"},
        "model": {"adapter": "fake", "checkpoint": "tiny"},
        "trainer": {"precision": "bf16-mixed"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert cli.main(["fit", str(tmp_path / "recipe.yaml")]) == 2
    assert "precision 'bf16-mixed' is refused" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_the_user_has_set_comes_back():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with matrix_products(tf32=False):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
