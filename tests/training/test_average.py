"""The moving average of the mean: its formula, what is validated and kept, resumed runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from blip_ft.config import load_recipe
from blip_ft.data.batch.dataset import FrameDataset
from blip_ft.data.read.sources import load_source
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training import loop
from blip_ft.training.callbacks import AverageMean

DECAY = 0.8


def by_hand(values: list[torch.Tensor]) -> torch.Tensor:
    """m_t = sum of d^(t-k) (1-d) w_k, the first with weight d^(t-1)."""
    t = len(values)
    weights = [DECAY ** (t - 1)] + [DECAY ** (t - k) * (1 - DECAY) for k in range(2, t + 1)]
    assert sum(weights) == pytest.approx(1)
    return sum(w * v for w, v in zip(weights, values, strict=True))


def test_known_average_and_swap() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    average = AverageMean([parameter], DECAY)
    values = [torch.tensor([float(k), k * k, -k], dtype=torch.float64) for k in range(1, 6)]
    trainer: Any = SimpleNamespace(global_step=0)
    module: Any = None
    average.on_validation_start(trainer, module)
    average.on_validation_end(trainer, module)
    assert not parameter.any(), "nothing to validate before the first step"
    for k, value in enumerate(values, 1):
        parameter.data.copy_(value)
        for step in (k, k):  # a batch that only accumulates gradients does not count
            trainer.global_step = step
            average.on_train_batch_end(trainer)
        average.on_validation_start(trainer, module)
        torch.testing.assert_close(parameter.data, by_hand(values[:k]))
        average.on_validation_end(trainer, module)
        assert torch.equal(parameter.data, value)


def test_a_fit_starts_from_the_average_and_the_average_from_the_fit() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    average = AverageMean([parameter], DECAY)
    trainer: Any = SimpleNamespace(global_step=0)
    for k in (1, 2):
        parameter.data.fill_(k)
        trainer.global_step = k
        average.on_train_batch_end(trainer)
    seen = []

    def fit() -> None:
        seen.append(float(parameter.detach()))
        parameter.data.fill_(10.0)

    average.around(fit)
    assert seen == pytest.approx([DECAY * 1 + (1 - DECAY) * 2])
    parameter.data.fill_(11.0)
    trainer.global_step = 3
    average.on_train_batch_end(trainer)
    average.on_validation_start(trainer, trainer)
    assert float(parameter.detach()) == 11.0, "what was averaged before the fit is forgotten"


class Quadratic(lightning.LightningModule):
    """Noisy gradients that depend on the step alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        noise = torch.randn(4, generator=torch.Generator().manual_seed(self.global_step))
        return (self.w * noise + 0.1 * self.w**2).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(range(3), batch_size=1)


def test_a_resumed_run_has_the_same_average(tmp_path: Any) -> None:
    def run(epochs: int, checkpoint: Any = None) -> tuple[lightning.Trainer, AverageMean, Quadratic]:
        module = Quadratic()
        average = AverageMean([module.w], DECAY)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[average],
        )
        trainer.fit(module, ckpt_path=checkpoint, weights_only=False)
        return trainer, average, module

    _, whole, module = run(4)
    trainer, _, _ = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, again = run(4, tmp_path / "half.ckpt")
    assert torch.equal(module.w, again.w)
    one, other = whole.state_dict(), resumed.state_dict()
    assert one["step"] == other["step"] == 12
    assert one["average"].keys() == other["average"].keys()
    for key, value in one["average"].items():
        assert torch.equal(value, other["average"][key]), key
    assert not torch.allclose(one["average"]["module.0"], module.w)


@pytest.mark.parametrize("plain", [True, False])
def test_the_average_is_what_is_validated_and_kept(
    plain: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    recipe = load_recipe(
        "sio2_sevennet",
        [
            f"output={tmp_path}",
            "model={adapter: fake, checkpoint: tiny, dtype: float64, train: rest}",
            "posterior={family: weight, prior_scale: 0.2}",
            "objective={temperature: 1e-4}",
            f"optimizer={{ema_decay: {DECAY}, learning_rate: 0.02}}",
            "trainer={max_epochs: 1, accelerator: cpu, limit_train_batches: 4}",
        ],
    )
    backbone = FakeBackbone().double()
    potential = BayesianPotential(backbone, recipe.model, recipe.posterior)
    sets = {n: FrameDataset(load_source(f"sio2_polymorphs@{n}"), backbone) for n in ("train", "validation")}
    steps: list[list[torch.Tensor]] = []
    log_std: list[list[torch.Tensor]] = []

    class Spy(Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append([p.detach().clone() for p in potential.mean_parameters])
            log_std.append([p.detach().clone() for p in potential.posterior.parameters()])

    original = loop.make_trainer
    monkeypatch.setattr(
        loop, "make_trainer", lambda r, f, callbacks, **k: original(r, f, [*callbacks, Spy()], **k)
    )
    loop.train(recipe, potential, sets, tmp_path, Console(quiet=True), plain=plain)
    assert len(steps) == 4
    assert len(potential.converted.rest) > 0
    for i, parameter in enumerate(potential.mean_parameters):
        torch.testing.assert_close(parameter.data, by_hand([s[i] for s in steps]))
    assert any(
        not torch.equal(p.data, last) for p, last in zip(potential.mean_parameters, steps[-1], strict=True)
    )
    # the spread is not averaged
    for parameter, last in zip(potential.posterior.parameters(), log_std[-1], strict=True):
        assert torch.equal(parameter.data, last)
