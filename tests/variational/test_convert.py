import copy
import json

import pytest
import torch
from ase.build import bulk, molecule
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blip_ft.errors import ConversionError
from blip_ft.testing.fake import FakeBackbone
from blip_ft.variational import convert, plan, unload
from blip_ft.variational.layers import VariationalLayer, VariationalLinear
from blip_ft.variational.sites import Block

NAMES = ["embedding", "radial.0", "radial.2", "update", "readout.0", "readout.2"]


def structures():
    a = bulk("SiO", "rocksalt", 4.6)
    a.rattle(0.1, seed=1)
    return [a, molecule("CH3OH"), molecule("H2O")]


def evaluate(backbone):
    out = backbone(backbone.batch(structures()))
    return [out.energy.detach(), out.forces.detach(), torch.nan_to_num(out.stress.detach())]


def random_deltas(converted, seed=0, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in converted.deltas.values():
            delta.copy_(size * torch.randn(delta.shape, generator=generator, dtype=torch.float64))


class Tied(nn.Module):
    """Linear modules that share a weight, a norm, and a weight that something else uses too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x))))


class TestReport:
    def test_everything_by_default(self):
        backbone = FakeBackbone()
        report = convert(backbone).report
        assert [r["name"] for r in report.rows] == NAMES
        assert {r["action"] for r in report.rows} == {"converted"}
        weights = 8 * 5 + 16 * 6 + 8 * 16 + 8 * 8 + 16 * 8 + 1 * 16
        assert report.counts == {"converted": weights, "trained": weights, "noisy": weights, "left": 0}
        assert json.loads(json.dumps(report.rows)) == report.rows
        row = next(r for r in report.rows if r["name"] == "radial.0")
        assert (row["type"], row["shape"], row["n_weights"]) == ("Linear", [16, 6], 96)

    def test_plan_says_the_same_and_changes_nothing(self):
        backbone, other = FakeBackbone(), FakeBackbone()
        before = [(n, p.requires_grad) for n, p in backbone.named_parameters()]
        planned = plan(backbone, train="readout", noise=["radial", "update"])
        assert [(n, p.requires_grad) for n, p in backbone.named_parameters()] == before
        assert planned == convert(other, train="readout", noise=["radial", "update"]).report

    def test_trained_and_noisy_are_separate_choices(self):
        backbone = FakeBackbone()
        c = convert(backbone, train="readout", noise=r"radial\.0")
        rows = {r["name"]: (r["trained"], r["noisy"]) for r in c.report.rows}
        assert rows == {n: (n.startswith("readout"), n == "radial.0") for n in NAMES}
        assert c.report.counts["trained"] == 144
        assert c.report.counts["noisy"] == 96
        assert c.noisy == ("radial.0",)
        assert [n for n, d in c.deltas.items() if d.requires_grad] == ["readout.0", "readout.2"]
        trained = [n for n, p in backbone.named_parameters() if p.requires_grad]
        assert trained == ["model.readout.0.change.delta", "model.readout.2.change.delta"]

    @pytest.mark.parametrize(("preset", "n"), [("all", 6), ("scalar", 4), ("readout", 2), ("none", 0)])
    def test_presets(self, preset, n):
        c = convert(FakeBackbone(), train=preset, noise=preset)
        assert len(c.noisy) == n
        assert sum(d.requires_grad for d in c.deltas.values()) == n

    @given(chosen=st.sets(st.sampled_from(NAMES), min_size=1))
    def test_patterns_are_full_matches(self, chosen):
        patterns = [n.replace(".", r"\.") for n in chosen]
        assert set(convert(FakeBackbone(), noise=patterns).noisy) == chosen

    def test_what_is_left_and_why(self, toy_backbone):
        backbone = toy_backbone(Tied(), keep={"last": "the head stays"})
        rows = {r["name"]: r for r in convert(backbone).report.rows}
        assert rows["first"]["action"] == rows["second"]["action"] == "converted"
        assert rows["second"]["reason"] == "shares its weight with an earlier module"
        assert (rows["first"]["n_weights"], rows["second"]["n_weights"]) == (9, 0)
        reasons = {n: r["reason"] for n, r in rows.items() if r["action"] == "left"}
        assert reasons == {
            "norm": "no variational form for LayerNorm",
            "table": "no variational form for Embedding",
            "head": "its weight is shared with table, which stays as it is",
            "last": "the head stays",
        }
        assert isinstance(backbone.model.last, nn.Linear)

    def test_a_weight_that_is_computed_is_left(self, toy_backbone):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(model[1])
        rows = convert(toy_backbone(model)).report.rows
        assert [r["action"] for r in rows] == ["converted", "left"]
        assert rows[1]["reason"] == "its weight is computed from other parameters"


class TestPatternErrors:
    @pytest.mark.parametrize("key", ["train", "noise"])
    def test_a_pattern_that_matches_nothing(self, key):
        backbone = FakeBackbone()
        before = dict(backbone.model.named_modules())
        with pytest.raises(
            ConversionError, match=r"'radail' matches no convertible module of this fake"
        ) as e:
            convert(backbone, **{key: ["readout", "radail"]})
        assert "did you mean 'radial'?" in str(e.value)
        assert dict(backbone.model.named_modules()) == before
        assert all(p.requires_grad for p in backbone.parameters())

    def test_a_pattern_must_match_something_convertible(self, toy_backbone):
        with pytest.raises(ConversionError, match="'norm' matches no convertible module"):
            convert(toy_backbone(Tied()), noise="norm")

    def test_part_of_a_name_is_no_match(self):
        with pytest.raises(ConversionError, match="did you mean 'readout"):
            convert(FakeBackbone(), noise="readout.")

    @pytest.mark.parametrize("pattern", ["radial.(", "*", "[a"])
    def test_not_a_regular_expression(self, pattern):
        with pytest.raises(ConversionError, match="neither a preset nor a regular expression"):
            convert(FakeBackbone(), noise=pattern)

    def test_converting_twice(self):
        backbone = FakeBackbone()
        convert(backbone)
        modules = list(backbone.modules())
        with pytest.raises(ConversionError, match="already converted"):
            convert(backbone)
        assert list(backbone.modules()) == modules


class TestStepZero:
    def test_converted_is_the_original_bit_for_bit(self):
        stock, backbone = FakeBackbone(), FakeBackbone()
        convert(backbone)
        assert sum(isinstance(m, VariationalLayer) for m in backbone.modules()) == len(NAMES)
        for mine, theirs in zip(evaluate(backbone), evaluate(stock), strict=True):
            assert torch.equal(mine, theirs)

    def test_in_float32(self):
        stock, backbone = FakeBackbone().float(), FakeBackbone().float()
        convert(backbone)
        for mine, theirs in zip(evaluate(backbone), evaluate(stock), strict=True):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, theirs)


class TestTied:
    def test_one_module_in_two_places(self):
        backbone = FakeBackbone()
        c = convert(backbone)
        model = backbone.model
        assert isinstance(model.update, VariationalLinear)
        assert model.update is model.update_again
        assert "update_again" not in c.sites

    @pytest.mark.parametrize("name", ["update", "update_again"])
    def test_goes_by_any_of_its_names(self, name):
        c = convert(FakeBackbone(), train=name, noise=name)
        assert c.noisy == ("update",)
        assert [n for n, d in c.deltas.items() if d.requires_grad] == ["update"]

    @pytest.mark.parametrize("name", ["first", "second"])
    def test_two_modules_with_one_weight(self, toy_backbone, name):
        backbone = toy_backbone(Tied())
        c = convert(backbone, train=name, noise=name)
        first, second = backbone.model.first, backbone.model.second
        assert first is not second
        assert first.delta is second.delta
        assert first.base.weight is second.base.weight
        assert first.site is second.site
        assert c.noisy == ("first",)
        assert first.delta.requires_grad
        assert [r["trained"] for r in c.report.rows if r["action"] == "converted"] == [True, True, False]
        assert c.report.counts["trained"] == 9  # counted once

    def test_a_name_that_must_stay_holds_for_all_names(self, toy_backbone):
        rows = plan(toy_backbone(Tied(), keep={"second": "kept"})).rows
        reasons = {r["name"]: r["reason"] for r in rows if r["name"] in ("first", "second")}
        assert reasons["second"] == "kept"
        assert reasons["first"] == "its weight is shared with second, which stays as it is"

    @pytest.mark.parametrize("make", [FakeBackbone, Tied])
    def test_still_tied_after_training_and_unloading(self, toy_backbone, make):
        fake = make is FakeBackbone
        backbone = make() if fake else toy_backbone(make())
        one, two = ("update", "update_again") if fake else ("first", "second")
        c = convert(backbone)
        optimizer = torch.optim.Adam([d for d in c.deltas.values() if d.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss = evaluate_loss(backbone) if fake else backbone.model(torch.ones(4, 3)).square().sum()
            loss.backward()
            optimizer.step()
        model = backbone.model
        assert (c.deltas[one] != 0).any()
        assert torch.equal(getattr(model, one).weight, getattr(model, two).weight)
        moved = getattr(model, one).weight.detach().clone()
        unload(backbone, merge=True)
        assert getattr(model, one).weight is getattr(model, two).weight
        assert torch.equal(getattr(model, one).weight, moved)  # added once, not once per place


def evaluate_loss(backbone):
    out = backbone(backbone.batch(structures()), create_graph=True)
    return out.energy.square().sum() + out.forces.square().sum()


class TestUnload:
    @pytest.mark.parametrize("make", [FakeBackbone, Tied])
    def test_without_merging_restores_the_original_bit_for_bit(self, toy_backbone, make):
        backbone = make() if make is FakeBackbone else toy_backbone(make())
        model = backbone.model
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        state = copy.deepcopy(model.state_dict())
        random_deltas(convert(backbone))
        assert list(model.state_dict()) != list(state)
        unload(backbone, merge=False)
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[k], state[k]) for k in state)
        restored = dict(model.named_modules(remove_duplicate=False))
        assert list(restored) == list(modules)
        assert all(restored[n] is modules[n] for n in modules)
        tied = dict(model.named_parameters(remove_duplicate=False))
        assert all(tied[n] is parameters[n] for n in parameters)

    def test_merged_is_the_mean(self):
        backbone = FakeBackbone()
        keys = list(backbone.state_dict())
        c = convert(backbone)
        random_deltas(c)
        before = evaluate(backbone)
        unload(backbone, merge=True)
        assert list(backbone.state_dict()) == keys
        for merged, mean in zip(evaluate(backbone), before, strict=True):
            torch.testing.assert_close(merged, mean, rtol=1e-13, atol=1e-13)
        stock = evaluate(FakeBackbone())
        assert (stock[1] - before[1]).abs().max() > 1e-3

    @pytest.mark.backend("sevennet")
    def test_irreps_and_radial_layers(self, toy_backbone):
        import e3nn.nn
        import e3nn.o3

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = e3nn.o3.Linear("2x0e+1x1o", "1x1o+3x0e", biases=True)
                self.edge = e3nn.nn.FullyConnectedNet([3, 4, 2], nn.functional.silu)

            def forward(self, x):
                return self.linear(x), self.edge(x[:, :3])

        backbone = toy_backbone(Net().double())
        x = torch.randn(4, 5, dtype=torch.float64)
        state = copy.deepcopy(backbone.model.state_dict())
        before = backbone.model(x)
        c = convert(backbone)
        assert list(c.sites) == ["linear", "edge.layer0", "edge.layer1"]
        assert [layer.rows for layer in c.layers.values()] == ["atom", "edge", "edge"]
        for mine, theirs in zip(backbone.model(x), before, strict=True):
            assert torch.equal(mine, theirs)
        random_deltas(c)
        mean = backbone.model(x)
        twin = toy_backbone(copy.deepcopy(backbone.model))
        unload(backbone, merge=False)
        for (k, mine), (kk, theirs) in zip(backbone.model.state_dict().items(), state.items(), strict=True):
            assert k == kk
            assert torch.equal(mine, theirs)
        unload(twin, merge=True)
        for merged, m in zip(twin.model(x), mean, strict=True):
            torch.testing.assert_close(merged, m, rtol=1e-13, atol=1e-13)

    def test_can_be_converted_again(self):
        backbone = FakeBackbone()
        convert(backbone)
        unload(backbone, merge=True)
        c = convert(backbone)
        assert all((d == 0).all() for d in c.deltas.values())


class TestFrozen:
    def test_only_means_get_gradients(self):
        backbone = FakeBackbone()
        c = convert(backbone, train="readout")
        evaluate_loss(backbone).backward()
        with_grad = {n for n, p in backbone.named_parameters() if p.grad is not None}
        assert with_grad == {"model.readout.0.change.delta", "model.readout.2.change.delta"}
        assert all((c.deltas[n].grad != 0).any() for n in ("readout.0", "readout.2"))

    def test_rest_is_everything_else(self, toy_backbone):
        backbone = toy_backbone(Tied(), keep={"table": "kept", "head": "kept"})
        c = convert(backbone, train="rest")
        assert set(c.rest) == {
            "first.base.bias",
            "norm.weight",
            "norm.bias",
            "second.base.bias",
            "last.base.bias",
        }
        assert all(p.requires_grad for p in c.rest.values())
        assert all(d.requires_grad for d in c.deltas.values())
        trainable = [p for p in backbone.parameters() if p.requires_grad]
        assert len(trainable) == len(c.rest) + 2  # first (tied to second) and last
        assert not backbone.model.first.base.weight.requires_grad
        assert not backbone.model.table.weight.requires_grad

    def test_no_rest_by_default(self):
        assert convert(FakeBackbone()).rest == {}


class Scaled(nn.Module):
    """A vendor's own layer: its parameter has another name and another shape than the weight."""

    def __init__(self, width):
        super().__init__()
        self.halves = nn.Parameter(0.1 * torch.randn(2, width, width, dtype=torch.float64))

    def forward(self, x):
        return x @ self.halves.sum(dim=0).T


class VariationalScaled(VariationalLinear):
    """Varies the sum of the halves, which stay."""

    @staticmethod
    def parameter(base):
        return base.halves

    @classmethod
    def shape(cls, base):
        return tuple(base.halves.shape[1:])

    @staticmethod
    def blocks(base):
        return (Block(0, tuple(base.halves.shape[1:]), output_axis=0),)

    @property
    def pretrained(self):
        return self.base.halves.sum(dim=0)

    def mean(self, x, weight):
        return x @ weight.T


class OwnLayers(FakeBackbone):
    """An adapter that brings a variational form for its vendor's layer, and refuses another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model.update = self.model.update_again = Scaled(8)

    def layer_type(self, name, module):
        if isinstance(module, Scaled):
            return VariationalScaled
        return "too important" if name == "embedding" else super().layer_type(name, module)


def test_an_adapter_says_what_its_layers_become():
    backbone = OwnLayers()
    before, state = evaluate(backbone), copy.deepcopy(backbone.state_dict())
    c = convert(backbone, train="rest")
    rows = {r["name"]: r for r in c.report.rows}
    assert (rows["update"]["action"], rows["update"]["shape"], rows["update"]["n_weights"]) == (
        "converted",
        [8, 8],
        64,
    )
    assert (rows["embedding"]["action"], rows["embedding"]["reason"]) == ("left", "too important")
    assert c.sites["update"].shape == c.deltas["update"].shape == (8, 8)
    # the vendor's parameter is frozen, also where everything else is trained
    assert not any("halves" in name for name in c.rest)
    assert not backbone.model.update.base.halves.requires_grad
    for one, two in zip(evaluate(backbone), before, strict=True):
        assert (one - two).abs().max() < 1e-12
    random_deltas(c)
    assert (evaluate(backbone)[0] - before[0]).abs().min() > 1e-4
    unload(backbone, merge=False)
    assert all(torch.equal(p, q) for p, q in zip(backbone.state_dict().values(), state.values(), strict=True))
