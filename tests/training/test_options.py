"""Options that cannot work are told before the pretrained model runs, by their key, and leave no folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blip_ft.cli import main
from blip_ft.testing.fake import FakeBackbone

from .test_resume import PATHWISE, prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("options")
    prepare(folder, PATHWISE)
    return folder


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("trainer.max_epochs=ten", "trainer.max_epochs"),
        ("trainer.max_epochs=2.5", "trainer.max_epochs"),
        ("trainer.max_epochs=-1", "trainer.max_epochs"),
        ("trainer.accelerator=abacus", "trainer"),
        ("trainer.accelerator=cuda", "trainer"),
        ("trainer.devices=[]", "trainer"),
        ("trainer.strategy=dpp", "trainer"),
        ("trainer.precision=12", "trainer"),
        ("trainer.gradient_clip_val=much", "trainer.gradient_clip_val"),
        ("trainer.gradient_clip_algorithm=median", "trainer"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches"),
        ("trainer.callbacks=early", "trainer.callbacks"),
        ("trainer.inference_mode=true", "trainer.inference_mode"),
        ("trainer.limit_train_batches=lots", "trainer.limit_train_batches"),
        ("trainer.val_check_interval=[1]", "trainer.val_check_interval"),
        ("trainer.val_check_interval=100", "trainer.val_check_interval"),
        ("data={batch_by: atoms, batch_size: 2, train: train.extxyz}", "data.batch_size"),
        ("data.context=none.extxyz", "none.extxyz"),
        ("data.replay={source: none.extxyz}", "none.extxyz"),
        ("data.replay={probe: none.extxyz}", "none.extxyz"),
        (
            "data={references: given, reference_energies: {Xx: 1.0}, train: train.extxyz}",
            "data.reference_energies",
        ),
        ("data.split.test=0.9", "data"),
    ],
)
def test_options_before_work(
    override: str, field: str, made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "cuda" in override:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    evaluated: list[Any] = []
    energy = FakeBackbone.energy_of
    monkeypatch.setattr(
        FakeBackbone, "energy_of", lambda self, *a, **k: evaluated.append(1) or energy(self, *a, **k)
    )
    monkeypatch.chdir(made)
    before = sorted(p.name for p in made.rglob("*"))
    extra = ["posterior.family=subspace"] if "context" in override else []
    assert main(["fit", str(made / "recipe.yaml"), "name=wrong", override, *extra]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert field in message
    assert "What to do" in message
    assert evaluated == []
    assert sorted(p.name for p in made.rglob("*")) == before


def test_a_good_recipe_gets_through(made: Path) -> None:
    """What Lightning takes in several forms."""
    from blip_ft.training.options import check_types

    check_types(
        {
            "max_epochs": 3,
            "max_time": {"minutes": 5},
            "devices": [0],
            "precision": "bf16-mixed",
            "limit_train_batches": 0.5,
            "gradient_clip_val": 1,
            "strategy": "ddp",
            "profiler": "simple",
            "detect_anomaly": True,
        }
    )
