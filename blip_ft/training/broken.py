"""Steps whose numbers break: which frames are the cause."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from blip_ft.backbones.conservative import weights_only
from blip_ft.data.batch.dataset import FrameDataset, collate
from blip_ft.errors import BlipError
from blip_ft.training.objective import Objective
from blip_ft.uncertainty.predict import frame_names

#: times the median NLL of the steps before: no step of a training that goes on
EXPLODED = 1e6
#: steps that make this median
REMEMBERED = 64
#: frames that a message names
NAMED = 5


class BrokenStepError(BlipError):
    """A loss or a gradient is not finite, or a loss explodes."""


@dataclass
class Usual:
    """NLL of steps, for comparison: of the latest, and the largest of the first epoch.

    What is large when a frame is first seen is its label (``data.bad_labels`` says what becomes of it), not
    the training; one that explodes in its first epoch is ended by its held-out score.
    """

    values: list[float] = field(default_factory=list)
    first: float = 0.0

    def exploded(self, nll: float, epoch: int) -> bool:
        """Whether a step has nothing to do with those before; if not, it is remembered."""
        size = abs(nll)
        if epoch == 0:
            self.first = max(self.first, size)
        elif size > EXPLODED * max(statistics.median(self.values or [math.inf]), 1.0) and size > self.first:
            return True
        self.values = [*self.values, size][-REMEMBERED:]
        return False


@dataclass(frozen=True)
class Place:
    """A step: what its noise depends on."""

    epoch: int
    batch_index: int
    step: int
    world: int


def is_finite(gradients: Sequence[Tensor | None]) -> bool:
    """Whether all of them are."""
    known = [g for g in gradients if g is not None]
    return not known or bool(torch.isfinite(torch.nn.utils.get_total_norm(known)))


def culprits(objective: Objective, frames: FrameDataset, keys: Sequence[int], place: Place) -> list[int]:
    """Numbers of the frames that break a step: each is evaluated alone, with the noise that it had there.

    Args:
        objective: of the training.
        frames: the training set.
        keys: of the structures in the step.
        place: the step.

    Returns:
        Those with a loss or gradient that is not finite; if there are none, the one with the largest NLL where this
        is :data:`EXPLODED` times the median of the others.
    """
    number = {frames.key(i): i for i in range(len(frames))}
    backbone = objective.potential.backbone
    parameters = [p for p in objective.potential.parameters() if p.requires_grad]
    bad: list[int] = []
    nll: dict[int, float] = {}
    for index in (number[key] for key in keys if key in number):
        batch = collate(backbone, [frames[index]]).to(backbone.device)
        with weights_only():
            step = objective(batch, **asdict(place))
            nll[index] = float(step.data)
            gradients = torch.autograd.grad(step.loss, parameters, allow_unused=True)
        if not (math.isfinite(nll[index]) and bool(torch.isfinite(step.loss)) and is_finite(gradients)):
            bad.append(index)
    if bad or len(nll) < 2:
        return bad
    worst = max(nll, key=lambda i: abs(nll[i]))
    rest = statistics.median(abs(v) for i, v in nll.items() if i != worst)
    return [worst] if abs(nll[worst]) > EXPLODED * max(rest, 1.0) else []


def broken(problem: str, frames: FrameDataset | None, bad: Sequence[int], step: int) -> BrokenStepError:
    """The error for a step that cannot be taken."""
    remedy = "lower optimizer.learning_rate or posterior.init_std"
    if frames is None or not bad:
        return BrokenStepError(
            f"training broke down: {problem} at step {step}, by no single frame", remedy=remedy
        )
    names = frame_names(frames)
    listed = ", ".join(names[i] for i in bad[:NAMED]) + (
        f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    )
    row = frames.frames[bad[0]]
    return BrokenStepError(
        f"training broke down: {problem} at step {step}, by {listed}",
        file=row["source"],
        frame=row["frame"],
        remedy=f"look at these frames; optimizer.broken=leave_out goes on without them. Or {remedy}",
    )
