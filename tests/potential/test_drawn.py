"""Weights of draws that are kept: made once, and never those of another posterior."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import Tensor

from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.families.base.linear import ClosedFormData, LinearizedModel
from blip_ft.families.model import drawing
from blip_ft.families.registry import without_foreign_keys
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.testing.fake import FakeBackbone
from blip_ft.variational.drawn import DrawnWeights
from blip_ft.variational.noise import Noise

FAMILIES = ("pathwise", "subspace", "posthoc_laplace")


def fit(potential: BayesianPotential, seed: int = 0, scale: float = 0.3) -> None:
    n = potential.posterior.n_weights
    rows = torch.randn(20, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    nothing = np.zeros(20)
    data = LinearizedModel(rows.to(potential.backbone.dtype), nothing, np.arange(20) % 3, nothing == 0)
    potential.posterior.fit(ClosedFormData(data, scale))


def make(family: str = "pathwise") -> BayesianPotential:
    potential = BayesianPotential(
        FakeBackbone(),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(**without_foreign_keys({"family": family, "rank": 6, "prior_scale": 0.3})),
        n_draws=4,
    )
    fit(potential)
    return potential


def weights(potential: BayesianPotential, draw: int = 1) -> Tensor:
    """Of a draw, as the layers see them, side by side."""
    batch = potential.backbone.batch([bulk("Si", "diamond", 5.4)])
    with torch.no_grad(), potential.perturbed(Noise("draw", draw=draw), batch):
        return torch.cat([w.flatten() for w in potential.converted.noise.weights.values()])


def anew(potential: BayesianPotential, draw: int = 1) -> Tensor:
    """The same without anything kept."""
    potential._drawn.clear()
    return weights(potential, draw)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draw_is_made_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    potential = make(family)
    made: list[int] = []
    sample = potential.posterior.sample

    def counted(latent: Tensor) -> dict[str, Tensor]:
        made.append(len(latent))
        return sample(latent)

    monkeypatch.setattr(potential.posterior, "sample", counted)
    first = [weights(potential, k) for k in range(4)]
    again = [weights(potential, k) for k in range(4)]
    assert made == [1] * 4
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], first[1])


def _fit_anew(potential: BayesianPotential) -> None:
    fit(potential, seed=1)


def _fit_wider(potential: BayesianPotential) -> None:
    fit(potential, scale=0.4)


def _load(potential: BayesianPotential) -> None:
    other = make(potential.posterior.family)
    fit(other, seed=2)
    potential.load_state_dict(other.state_dict())


def _assign(potential: BayesianPotential) -> None:
    other = make(potential.posterior.family)
    fit(other, seed=2)
    potential.load_state_dict(other.state_dict(), assign=True)


def _in_place(potential: BayesianPotential) -> None:
    potential.posterior.directions.mul_(1.5)


def _replace(potential: BayesianPotential) -> None:
    potential.posterior.directions = 1.5 * potential.posterior.directions


def _units(potential: BayesianPotential) -> None:
    potential.prior.refresh({k: 2 * v for k, v in potential.converted.pretrained.items()})


def _amplitude(potential: BayesianPotential) -> None:
    potential.amplitude = 0.1


def _seed(potential: BayesianPotential) -> None:
    potential.seed = 7


def _number(potential: BayesianPotential) -> None:
    potential.n_draws = 6


CHANGES = [_fit_anew, _fit_wider, _load, _assign, _in_place, _replace, _units, _amplitude, _seed, _number]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
def test_no_draw_is_stale(family: str, change: Callable[[BayesianPotential], None]) -> None:
    potential = make(family)
    before = weights(potential)
    change(potential)
    after = weights(potential)
    # draws of pairs are the same for any number of them
    if not (change is _number and potential.posterior.paired):
        assert not torch.equal(after, before)
    assert torch.equal(after, anew(potential))


@pytest.mark.parametrize("family", FAMILIES)
def test_precision_and_back(family: str) -> None:
    potential = make(family)
    before = weights(potential)
    potential.to_dtype("float32" if potential.backbone.dtype == torch.float64 else "float64")
    other = weights(potential)
    assert other.dtype == potential.backbone.dtype != before.dtype
    assert torch.equal(other, anew(potential))
    potential.to(before.dtype)
    assert weights(potential).dtype == before.dtype
    assert torch.equal(weights(potential), anew(potential))


def test_another_width_for_a_while() -> None:
    """As the comparison with the linearised model draws."""
    potential = make()
    before = weights(potential)
    with drawing(potential, 4, 0.5):
        assert torch.allclose(weights(potential), 0.5 * before)
    assert torch.equal(weights(potential), before)


def test_copies_keep_nothing_of_the_original() -> None:
    potential = make()
    weights(potential)
    twin = copy.deepcopy(potential)
    twin.posterior.directions.mul_(2)
    assert torch.allclose(weights(twin), 2 * weights(potential))
    assert pickle.loads(pickle.dumps(potential._drawn))._draws == {}


def test_what_the_layers_do_with_their_table_is_forgotten() -> None:
    potential = make()
    before = weights(potential)
    batch = potential.backbone.batch([bulk("Si", "diamond", 5.4)])
    with torch.no_grad(), potential.perturbed(Noise("draw", draw=1), batch):
        potential.converted.noise.weights.clear()
    assert torch.equal(weights(potential), before)


class TestDrawnWeights:
    def get(self, memory: DrawnWeights, number: int, like: Tensor) -> list[int]:
        made: list[int] = []

        def make() -> dict[str, Tensor]:
            made.append(number)
            return {"a": like + number}

        assert torch.equal(memory.get(number, make, tensors=[like], values=0)["a"], like + number)
        return made

    def test_no_more_than_the_limit(self) -> None:
        memory, like = DrawnWeights(limit=2 * 8 * 4), torch.zeros(4, dtype=torch.float64)
        assert [self.get(memory, k, like) for k in (0, 1, 2)] == [[0], [1], [2]]
        assert [self.get(memory, k, like) for k in (0, 1, 2, 2)] == [[], [], [2], [2]]

    def test_a_view_does_not_keep_the_whole(self) -> None:
        memory, like = DrawnWeights(), torch.zeros(4)
        whole = torch.ones(1000, 4)
        memory.get(0, lambda: {"a": whole[0]}, tensors=[like], values=0)
        kept = memory.get(0, dict, tensors=[like], values=0)["a"]
        assert kept.untyped_storage().nbytes() == 16

    def test_gradients_and_uncounted_tensors_are_not_kept(self) -> None:
        memory, wanted = DrawnWeights(), torch.zeros(4, requires_grad=True)
        assert [self.get(memory, 0, wanted) for _ in range(2)] == [[0], [0]]
        with torch.inference_mode():
            like = torch.zeros(4)
        assert [self.get(memory, 0, like) for _ in range(2)] == [[0], [0]]

    def test_a_new_tensor_in_the_same_place_is_another(self) -> None:
        memory = DrawnWeights()
        for value in range(20):  # freed and made again: the address, and the object's, may be the same
            like = torch.full((4,), float(value))
            assert self.get(memory, 0, like) == [0]
            del like
