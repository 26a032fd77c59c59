"""The fake backbone fulfils the contract, and is what its users rely on."""

import copy

import pytest
import torch

from blip_ft.backbones.protocol import Backbone
from blip_ft.errors import RecipeError
from blip_ft.testing.conservative import ConservativeContract
from blip_ft.testing.fake import FakeBackbone
from blip_ft.testing.helpers import evaluate
from blip_ft.testing.variational import VariationalContract


class TestFake(ConservativeContract, VariationalContract):
    @classmethod
    def load(cls) -> Backbone:
        return FakeBackbone.load("tiny", seed=0)


class TestCharged(ConservativeContract):
    """The size that sees charge and spin."""

    @classmethod
    def load(cls) -> Backbone:
        return FakeBackbone.load("charged", seed=0)


def test_weights_are_a_function_of_the_seed(quartz):
    torch.manual_seed(1)
    one = FakeBackbone(seed=3)
    torch.manual_seed(2)
    two = FakeBackbone(seed=3)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    other = FakeBackbone(seed=4)
    assert (evaluate(one, quartz).energy - evaluate(other, quartz).energy).abs() > 1e-3


def test_one_weight_is_tied():
    model = FakeBackbone().model
    assert model.update is model.update_again
    assert copy.deepcopy(model).update_again.weight is not model.update.weight


def test_unknown_option():
    with pytest.raises(RecipeError, match="sead"):
        FakeBackbone.load("tiny", sead=1)
