"""Numbers that break a training: named, left out on the user's word, and never a worse model in silence."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.io import write

from blip_ft.cli import main
from blip_ft.config import load_recipe
from blip_ft.data.split.splits import load_splits
from blip_ft.potential.checkpoint import load_model
from blip_ft.testing.fake import FakeModel
from blip_ft.training.broken import Usual
from blip_ft.training.callbacks import EXPLODED, KeepBest, StopWhenRising
from blip_ft.training.module import FineTuneModule

from .labelled import frames
from .test_resume import PATHWISE, differences, prepare

Capture = pytest.CaptureFixture[str]


def fit(folder: Path, name: str, *overrides: str) -> int:
    return main(["fit", str(folder / "recipe.yaml"), f"name={name}", *overrides])


def poison(monkeypatch: pytest.MonkeyPatch, folder: Path, what: str) -> str:
    """Make the loss or the gradient of one training frame not finite; ``file#frame``."""
    row = load_splits(load_recipe(str(folder / "recipe.yaml")).data).train[3]
    number = int(row["frame"])
    positions = np.asarray(row["positions"])
    target = float(np.linalg.norm(positions[1] - positions[0]))
    original, training_step = FakeModel.forward, FineTuneModule.training_step
    training = [False]

    def forward(self: Any, species: Any, edge_index: Any, distance: Any, *args: Any) -> Any:
        energy, features = original(self, species, edge_index, distance, *args)
        if training[0] and bool(((distance.detach() - target).abs() < 1e-9).any()):
            trained = next(p for p in self.parameters() if p.requires_grad)
            # a root at 0: the value is 0, its derivative is not finite
            energy = energy + (torch.nan if what == "loss" else (0 * trained).abs().sum().sqrt())
        return energy, features

    def step(self: Any, *args: Any) -> Any:
        training[0] = True
        try:
            return training_step(self, *args)
        finally:
            training[0] = False

    monkeypatch.setattr(FakeModel, "forward", forward)
    monkeypatch.setattr(FineTuneModule, "training_step", step)
    if what == "gradient":  # frames are looked at one by one outside the step
        answer = FineTuneModule._answer

        def answering(self: Any, *args: Any) -> Any:
            training[0] = True
            try:
                return answer(self, *args)
            finally:
                training[0] = False

        monkeypatch.setattr(FineTuneModule, "_answer", answering)
    return f"{row['source']}#{number}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path, {**PATHWISE, "plain": {}})
    return tmp_path


class Scores:
    """Feeds the callbacks with held-out scores."""

    def __init__(self, start: float, patience: int | None = 3) -> None:
        self.best = KeepBest()
        self.best.start = self.best.best = start
        self.rising = StopWhenRising(self.best, patience)
        self.trainer: Any = type(
            "T", (), {"sanity_checking": False, "should_stop": False, "current_epoch": 0}
        )()

    def give(self, *scores: float) -> bool:
        module: Any = torch.nn.Linear(1, 1)
        for score in scores:
            self.trainer.callback_metrics = {"val/crps": score}
            self.best.on_validation_end(self.trainer, module)
            self.rising.on_validation_end(self.trainer, module)
            self.trainer.current_epoch += 1
        return bool(self.trainer.should_stop)


def test_patience_is_with_rising_scores() -> None:
    assert not Scores(10).give(9, 8, 8.1, 8.1, 8.1, 8.1, 8.1, 8.1), "level is not rising"
    assert not Scores(10).give(9, 8, 9, 9, 7.9, 9, 9)
    assert Scores(10).give(9, 8, 9, 9, 9)
    assert not Scores(10, None).give(9, 8, *[20] * 50)
    scores = Scores(10)
    assert scores.give(9, 8, 9, 9, 9)
    again = Scores(10)
    again.rising.load_state_dict(scores.rising.state_dict())
    again.rising.on_train_start(again.trainer, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert again.trainer.should_stop, "a run that is resumed does not train on"


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 10 * EXPLODED * 1.01])
def test_a_training_that_is_lost_ends_at_once(score: float) -> None:
    scores = Scores(10, None)
    assert scores.give(score)
    assert "learning_rate" in scores.rising.reason
    assert scores.best.epoch == -1


def test_what_a_step_is_compared_with() -> None:
    usual = Usual()
    assert not any(usual.exploded(nll, 0) for nll in (3.0, 1e9, -4.0, 5.0)), "labels, not the training"
    assert usual.first == 1e9
    assert not usual.exploded(9e8, 1), "a label once more"
    assert usual.exploded(-2e9, 1)
    assert usual.values == [3.0, 1e9, 4.0, 5.0, 9e8]
    usual = Usual([3.0, 4.0, 5.0], 5.0)
    assert not usual.exploded(3e6, 1)
    assert usual.exploded(-5e7, 1)


@pytest.mark.parametrize("plain", [False, True])
def test_a_diverged_training_is_the_pretrained_model(plain: bool, folder: Path, capsys: Capture) -> None:
    options = [
        "optimizer.learning_rate=0.3",
        "optimizer.warmup_fraction=0",
        "trainer.max_epochs=2",
        f"plain={{enabled: {str(plain).lower()}}}",
    ]
    assert fit(folder, "run", *options) == 0
    message = " ".join(capsys.readouterr().err.split())
    assert "no epoch is better on the validation frames than the state at the start" in message
    assert "optimizer.learning_rate" in message
    metrics = json.loads((folder / "runs/run/metrics.json").read_text())
    key = "force_mae_mev_per_ang"
    for model in ["blip", *(["plain"] if plain else [])]:
        for name, found in metrics[model].items():
            assert found[key] <= 1.05 * metrics["pretrained"][name][key], model


def test_a_training_that_explodes_is_ended(folder: Path, capsys: Capture) -> None:
    assert fit(folder, "run", "optimizer.learning_rate=30") == 0
    message = " ".join(capsys.readouterr().err.split())
    assert "training was ended: the held-out score has gone from" in message
    assert "epoch 2/" not in message
    assert "the state at the start" in message


def test_a_step_that_explodes_later(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that jumps, as by a broken device: no frame of its own has caused it."""
    start = FineTuneModule.on_train_epoch_start

    def jump(self: Any) -> None:
        start(self)
        if self.current_epoch == 2:
            with torch.no_grad():
                self.potential.mean_parameters[-1].add_(1e6)

    monkeypatch.setattr(FineTuneModule, "on_train_epoch_start", jump)
    assert fit(folder, "run") == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "the loss explodes at step 6, by no single frame" in message
    assert (folder / "runs/run/pieces/epochs.json").exists(), "the last good state is kept"


@pytest.mark.parametrize("family", ["weight", "channel"])
def test_the_start_is_a_candidate_with_its_spread(family: str, folder: Path) -> None:
    options = [
        f"posterior={{family: {family}, prior_scale: 0.1, init_std: 0.05}}",
        "objective.temperature=1e-3",
    ]
    assert (
        fit(
            folder,
            "run",
            "optimizer.learning_rate=0.3",
            "optimizer.warmup_fraction=0",
            "trainer.max_epochs=2",
            *options,
        )
        == 0
    )
    potential = load_model(folder / "runs/run")
    assert all(not d.any() for d in potential.converted.deltas.values())
    for name, std in potential.posterior.std().items():
        torch.testing.assert_close(std / potential.prior.rms(name), torch.full_like(std, 0.05))


@pytest.mark.parametrize("broken", ["stop", "leave_out"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_frame_that_breaks_the_training(
    what: str, broken: str, folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(folder, "clean") == 0
    name = poison(monkeypatch, folder, what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = fit(folder, "run", f"optimizer.broken={broken}")
    message = " ".join(capsys.readouterr().err.split())
    source, _, number = name.rpartition("#")
    if broken == "stop":
        assert code == 2, message
        assert f"{source}, frame {number}: training broke down" in message
        assert f"the {what} is not finite" in message
        assert (folder / "runs/run/run.json").exists(), "what is done is kept"
        assert main(["resume", str(folder / "runs/run"), "optimizer.broken=leave_out"]) == 0
    else:
        assert code == 0, message
    receipt = json.loads((folder / "runs/run/receipt.json").read_text())
    assert [r["left_out"] for r in receipt["posterior"] if "left_out" in r] == [[name]]
    metrics = json.loads((folder / "runs/run/metrics.json").read_text())
    key = "force_mae_mev_per_ang"
    assert metrics["blip"]["seen"][key] < metrics["pretrained"]["seen"][key]


def test_leaving_out_survives_a_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from .test_run_folder import Ended, ending

    assert fit(folder, "clean") == 0
    poison(monkeypatch, folder, "loss")
    options = ["optimizer.broken=leave_out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fit(folder, "whole", *options) == 0
        with monkeypatch.context() as patch:
            patch.setattr("blip_ft.training.pieces.SHARE", float("inf"))
            patch.setattr("blip_ft.training.loop._last_fit", ending)
            with pytest.raises(Ended):
                fit(folder, "run", *options)
        assert main(["resume", str(folder / "runs/run")]) == 0
    assert differences(folder / "runs/whole", folder / "runs/run") == []


@pytest.mark.parametrize(
    "n",
    [
        pytest.param(8, marks=pytest.mark.default),
        pytest.param(16, marks=pytest.mark.full),
        pytest.param(32, marks=pytest.mark.full),
    ],
)
def test_few_frames_do_no_harm(n: int, tmp_path: Path, capsys: Capture) -> None:
    """By default the held-out force error is not above the pretrained model's by more than its spread."""
    prepare(tmp_path, {"posterior": {"rank": 16, "projections": 2}, "trainer": {"accelerator": "cpu"}})
    write(tmp_path / "train.extxyz", frames(n, other=True, seed=n))
    write(tmp_path / "test.extxyz", frames(40, other=True, seed=100))
    for rate in (1e-3, 1e-1):
        name = f"r{rate}"
        assert (
            fit(tmp_path, name, f"data.test={tmp_path / 'test.extxyz'}", f"optimizer.learning_rate={rate}")
            == 0
        )
        with (
            np.load(tmp_path / "runs" / name / "predictions/blip-seen.npz") as p,
            np.load(tmp_path / "runs" / name / "predictions/pretrained-seen.npz") as q,
        ):
            error = [np.abs(x["forces"] - x["forces_label"]).reshape(40, -1).mean(axis=1) for x in (p, q)]
        spread = np.std(error[1], ddof=1) / np.sqrt(40)
        assert error[0].mean() <= error[1].mean() + spread
