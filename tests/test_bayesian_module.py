"""Variational layers around a torch module that is no potential."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip_ft import BayesianModule
from blip_ft.errors import ConversionError
from blip_ft.variational.noise import Noise

KEYS = (7, 3, 11)
#: nodes of three graphs, and their edges
NODES = torch.tensor([0, 0, 1, 1, 1, 2])
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 0, 3, 4, 2, 5]])
ROWS = {"node": NODES, "edge": NODES[EDGES[0]]}


class Net(nn.Module):
    """Messages along edges, summed at nodes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.message = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 4))
        self.update = nn.Sequential(nn.Linear(7, 5), nn.SiLU(), nn.Linear(5, 2))
        self.double()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        messages = self.message(torch.cat([x[edges[0]], x[edges[1]]], dim=1))
        total = messages.new_zeros(len(x), 4).index_add(0, edges[0], messages)
        out: Tensor = self.update(torch.cat([x, total], dim=1))
        return out


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(family: str = "weight", **options: Any) -> BayesianModule:
    options = {"prior_scale": 0.1, "init_std": 0.05} | options
    return BayesianModule(
        Net(), family=family, rows={"edge": r"message\..*", "node": r"update\..*"}, **options
    )


@pytest.mark.parametrize("family", ["weight", "channel", "adaptive"])
def test_step_zero_is_the_module(family: str, x: Tensor):
    assert torch.equal(make(family)(x, EDGES), Net()(x, EDGES))


@pytest.mark.parametrize("mode", ["structure", "local", "flipout"])
def test_noise_belongs_to_the_structure_not_to_the_batch(mode: Any, x: Tensor):
    model = make(mode=mode)
    whole = model(x, EDGES, noise=Noise(mode, epoch=2), keys=KEYS, rows=ROWS)
    assert not torch.allclose(whole, model(x, EDGES))
    alone = torch.zeros(1, dtype=torch.int64)
    last = model(
        x[5:],
        torch.zeros(2, 1, dtype=torch.int64),
        noise=Noise(mode, epoch=2),
        keys=KEYS[2:],
        rows={"node": alone, "edge": alone},
    )
    torch.testing.assert_close(last, whole[5:])
    other = model(x, EDGES, noise=Noise(mode, epoch=3), keys=KEYS, rows=ROWS)
    assert not torch.allclose(other, whole)


def test_a_sample_per_structure_is_that_of_its_weights(x: Tensor):
    """The noise of a structure is one set of weights for all of its rows."""
    model = make()
    noise = Noise("structure", epoch=1)
    got = model(x, EDGES, noise=noise, keys=KEYS, rows=ROWS)
    with model.perturbed(noise, KEYS, ROWS):
        weights = {name: w[1].clone() for name, w in model.converted.noise.weights.items()}
    net = Net()
    with torch.no_grad():
        for name, change in weights.items():
            net.get_submodule(name).weight.add_(change)
    torch.testing.assert_close(got[2:5], net(x, EDGES)[2:5])


@pytest.mark.parametrize("family", ["weight", "channel", "adaptive"])
def test_draws_are_the_same_in_every_call_and_centred(family: str, x: Tensor):
    model = make(family, n_draws=64, init_std=0.002)
    out = model.draws(x, EDGES)
    assert out.shape == (64, 6, 2)
    assert torch.equal(out, model.draws(x, EDGES))
    assert (out.std(dim=0) > 0).all()
    # linear at this width: draws are centred on the mean's output
    off = (out.mean(dim=0) - model(x, EDGES)).abs() / out.std(dim=0)
    assert off.max() < (0.1 if family != "adaptive" else 1.0)


def test_the_elbo_of_a_loop_finds_the_labels_and_keeps_the_spread(x: Tensor):
    """Plain torch: an expected squared error and the KL; gradients reach mean and spread."""
    model = make(init_std=0.01, train="rest")
    labels = Net()(x, EDGES).detach() + 0.3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    first = last = 0.0
    for epoch in range(150):
        out = model(x, EDGES, noise=Noise("structure", epoch=epoch), keys=KEYS, rows=ROWS)
        loss = (out - labels).square().mean() + 1e-5 * model.kl()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
        first = first or last
    assert last < 0.05 * first
    assert model.kl().item() > 0
    kept = make(train="rest")
    kept.load_state_dict(model.state_dict())
    assert torch.equal(kept.draws(x, EDGES), model.draws(x, EDGES))


def test_layers_that_no_pattern_names_have_a_row_for_each_structure():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model = BayesianModule(net, init_std=0.1, prior_scale=0.1)
    x = torch.ones(5, 3, dtype=torch.float64)
    out = model(x, noise=Noise("structure"), keys=range(5))
    assert len(set(out.flatten().tolist())) == 5


def test_what_cannot_be_done_says_so(x: Tensor):
    with pytest.raises(ConversionError, match="no modules inside"):
        BayesianModule(nn.Linear(2, 2))
    with pytest.raises(ConversionError, match="gradients of all labels"):
        BayesianModule(Net(), family="pathwise")
    with pytest.raises(ConversionError, match="matches no convertible module"):
        BayesianModule(Net(), noise="nothing")
    with pytest.raises(ValueError, match="not given: edge, node"):
        make()(x, EDGES, noise=Noise("structure"), keys=KEYS)
