"""Variational forms of fairchem's layers, alone and inside a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from blip_ft.adapters.fairchem import layers
from blip_ft.adapters.fairchem.backbone import FairchemBackbone
from blip_ft.backbones.protocol import Backbone
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import load_model, save_model
from blip_ft.testing.helpers import close, evaluate, evaluate_all
from blip_ft.uncertainty.jacobian import output_gradients
from blip_ft.variational import NoiseState, RowLayout, Site, convert, unload
from blip_ft.variational.mean import FullChange

from . import tiny_uma

pytestmark = pytest.mark.backend("fairchem")

EXPERTS, COUNTS = 3, (4, 0, 2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_uma.uma(tmp_path_factory.mktemp("layers") / "uma.pt")


@pytest.fixture
def backbone(file: Path) -> Backbone:
    return FairchemBackbone.load(str(file), task="omat").double()


# ---- one layer -------------------------------------------------------------------------------


def bases() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """A vendor's module of every kind, and the shape of a row of its input."""
    from fairchem.core.models.uma.nn.mole import MOLE, MOLEGlobals
    from fairchem.core.models.uma.nn.so3_layers import SO3_Linear

    mixing: Any = MOLEGlobals(normal(len(COUNTS), EXPERTS).softmax(1), torch.tensor(COUNTS))
    mixing.reference = lambda: torch.full((EXPERTS,), 1 / EXPERTS)
    mixing.share = torch.ones(EXPERTS)
    return {
        "scalars": (nn.Linear(5, 4).double(), (1, 5)),
        "orders": (nn.Linear(5, 4, bias=False).double(), (2, 5)),
        "so3": (SO3_Linear(5, 4, lmax=2).double(), (9, 5)),
        "mixture": (MOLE(EXPERTS, 5, 4, mixing, bias=True).double(), (5,)),
        "mixed orders": (MOLE(EXPERTS, 5, 4, mixing, bias=False).double(), (2, 5)),
    }


KINDS = {
    "scalars": layers.VariationalChannels,
    "orders": layers.VariationalOrders,
    "so3": layers.VariationalSO3Linear,
    "mixture": layers.VariationalMixture,
    "mixed orders": layers.VariationalMixtureOfOrders,
}


def make(name: str) -> tuple[Any, Tensor, RowLayout]:
    """A layer with a mean of its own, an input, and its rows: three structures, one of them empty."""
    base, shape = bases()[name]
    kind = layers.layer_type(base, mixes="orders" in name)
    assert kind is KINDS[name]
    site = Site("x", kind.shape(base), kind.blocks(base))
    rows = RowLayout.from_index(
        torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS)), len(COUNTS)
    )
    delta = FullChange(nn.Parameter(0.1 * normal(*site.shape, seed=1)))
    layer = kind(base, site, delta, NoiseState(rows={"edge": rows}), "edge")
    return layer, normal(sum(COUNTS), *shape, seed=2), rows


@pytest.mark.parametrize("name", KINDS)
class TestLayer:
    def test_without_change_it_is_the_vendors(self, name):
        layer, x, _ = make(name)
        layer.delta.data.zero_()
        assert torch.equal(layer(x), layer.base(x))
        assert not layer.parameter(layer.base).requires_grad

    def test_a_weight_per_structure_is_a_draw_per_structure(self, name):
        layer, x, rows = make(name)
        perturbation = 0.3 * normal(len(COUNTS), *layer.site.shape, seed=3)
        layer.noise.weights, layer.noise.mode = {"x": perturbation}, "structure"
        together = layer(x)
        layer.noise.mode = "draw"
        for structure in range(len(COUNTS)):
            layer.noise.weights = {"x": perturbation[structure]}
            mine = rows.index == structure
            close(together[mine], layer(x)[mine], 1e-12)

    def test_one_structure(self, name):
        layer, x, _ = make(name)
        rows = RowLayout.from_index(torch.zeros(len(x), dtype=torch.int64), 1)
        perturbation = normal(1, *layer.site.shape, seed=3)
        layer.noise.weights = {"x": perturbation[0]}
        before, layer.noise.mode = layer(x), "draw"
        close(layer.sampled(x, perturbation, rows), layer(x) - before, 1e-12)

    def test_the_variance_of_a_row_is_that_of_many_draws(self, name):
        layer, x, _ = make(name)
        variance = normal(*layer.site.shape, seed=4).square()
        if name == "so3":  # only scalars get noise per row
            assert torch.equal(layer.row_variance(x, variance)[:, 1:], torch.zeros(len(x), 8, 4))
            variance[1:] = 0
        draws = variance.sqrt() * normal(1500, *layer.site.shape, seed=5)
        rows = RowLayout.from_index(torch.arange(len(x)), len(x))
        outputs = torch.stack([layer.sampled(x, d.expand(len(x), *d.shape), rows) for d in draws])
        torch.testing.assert_close(layer.row_variance(x, variance), outputs.var(dim=0), rtol=0.25, atol=1e-12)

    def test_noise_per_row_has_that_variance(self, name):
        layer, x, rows = make(name)
        layer.noise.mode, layer.noise.variances = "local", {"x": torch.full(layer.site.shape, 0.01).double()}
        asked = []

        def ones(site: str, layout: RowLayout, width: int, like: Tensor) -> Tensor:
            asked.append((site, layout is rows, width))
            return like.new_ones(len(layout.index), width)

        layer.noise.row_normal = ones
        noisy = layer(x)
        layer.noise.mode = "off"
        variance = layer.row_variance(x, torch.full(layer.site.shape, 0.01).double())
        close(noisy - layer(x), variance.sqrt(), 1e-12)
        assert asked == [("x", True, variance[0].numel())]

    def test_flipped_signs_are_a_weight_per_structure(self, name):
        layer, x, rows = make(name)
        weight = normal(*layer.site.shape, seed=3)
        into, outof = normal(len(COUNTS), 5, seed=6).sign(), normal(len(COUNTS), 4, seed=7).sign()
        without = layer(x)
        layer.noise.weights, layer.noise.mode = {"x": weight[None]}, "flipout"
        layer.noise.signs = lambda _site, n_in, n_out, _like: (into[:, :n_in], outof[:, :n_out])
        signs = (outof[:, :, None] * into[:, None, :]).reshape(len(COUNTS), *[1] * (weight.dim() - 2), 4, 5)
        close(layer(x) - without, layer.sampled(x, signs * weight, rows), 1e-12)

    def test_invariants_do_not_turn(self, name):
        layer, x, _ = make(name)
        values = layer.invariants(x)
        assert values.shape == (len(x), layer.n_invariants)
        if name in ("scalars", "mixture"):
            close(values, x.reshape(len(x), 5), 0)
        else:  # any rotation of the components
            turn = torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=8)).Q
            close(layer.invariants(torch.einsum("ab,nbc->nac", turn, x)), values, 1e-12)

    def test_merged_into_the_vendors_weight(self, name):
        layer, x, _ = make(name)
        if "mix" in name:  # coefficients that add up to one
            assert torch.allclose(
                layer.base.global_mole_tensors.expert_mixing_coefficients.sum(1), torch.ones(3).double()
            )
        expected = layer(x)
        layer.merge()
        close(layer.base(x), expected, 1e-12)
        layer, x, _ = make(name)
        perturbation = normal(*layer.site.shape, seed=3)
        layer.noise.mode, layer.noise.weights = "draw", {"x": perturbation}
        expected = layer(x)
        layer.merge(perturbation)
        close(layer.base(x), expected, 1e-12)


def test_blocks_say_what_is_scalar():
    scalar = {name: [b.scalar for b in make(name)[0].site.blocks] for name in KINDS}
    assert scalar == {
        "scalars": [True],
        "orders": [False],
        "so3": [True, False, False],
        "mixture": [True],
        "mixed orders": [False],
    }
    assert [b.start for b in make("so3")[0].site.blocks] == [0, 20, 40]


# ---- a model ---------------------------------------------------------------------------------


def perturb(converted: Any, n: int | None = None, size: float = 0.2) -> dict[str, Tensor]:
    """A random perturbation of every site, in units of the pretrained rms; for ``n`` structures or one."""
    out = {}
    for i, (name, site) in enumerate(converted.sites.items()):
        rms = converted.pretrained[name].square().mean().sqrt()
        shape = site.shape if n is None else (n, *site.shape)
        out[name] = size * rms * normal(*shape, seed=100 + i)
    return out


def turned(atoms: Atoms) -> Atoms:
    turn = Rotation.random(random_state=3).as_matrix()
    out = atoms.copy()
    out.set_cell(atoms.cell.array @ turn.T)
    out.set_positions(atoms.positions @ turn.T)
    return out


@pytest.fixture
def frames(quartz: Atoms, ethanol: Atoms, boxed_atom: Atoms) -> list[Atoms]:
    return [ethanol, quartz, boxed_atom]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"num_experts": 0, "lmax": 3}, marks=pytest.mark.full),
        pytest.param({"ff_type": "grid"}, marks=pytest.mark.full),
    ],
)
def test_every_draw_is_equivariant(tmp_path: Path, quartz: Atoms, changes: dict[str, Any]) -> None:
    model = FairchemBackbone.load(str(tiny_uma.uma(tmp_path / "uma.pt", **changes)), task="omat").double()
    stock = [evaluate(model, a) for a in (quartz, turned(quartz))]
    defect = (stock[0].node_energy - stock[1].node_energy).abs().max().item()
    # point-wise activations on a grid of the sphere are equivariant approximately only
    limit = max(2 * defect, 1e-10)
    c = convert(model)
    before = evaluate(model, quartz).energy
    for seed in range(3):
        c.noise.mode = "draw"
        c.noise.weights = {k: w.roll(seed, -1) for k, w in perturb(c).items()}
        one, two = evaluate(model, quartz), evaluate(model, turned(quartz))
        close(one.node_energy, two.node_energy, limit)
        turn = Rotation.random(random_state=3).as_matrix()
        forces = one.forces.numpy() @ turn.T
        assert np.abs(two.forces.numpy() - forces).max() < max(1e-9, 20 * limit)
        assert (one.energy - before).abs() > 1e-2


@pytest.mark.parametrize("direct", [False, True])
def test_a_batch_with_a_weight_per_structure_is_single_draws(tmp_path, frames, direct):
    make_file = tiny_uma.direct if direct else tiny_uma.uma
    task = "omol" if direct else "omat"
    model = FairchemBackbone.load(str(make_file(tmp_path / "model.pt")), task=task).double()
    c = convert(model)
    weights = perturb(c, len(frames))
    batch = model.batch(frames)
    c.noise.mode, c.noise.weights = "structure", weights
    c.noise.rows = {kind: RowLayout.from_index(i, len(frames)) for kind, i in batch.rows.items()}
    together = model(batch)
    start = 0
    for i, atoms in enumerate(frames):
        c.noise.clear()
        c.noise.mode, c.noise.weights = "draw", {k: w[i] for k, w in weights.items()}
        alone, stop = evaluate(model, atoms), start + len(atoms)
        close(together.energy[i : i + 1], alone.energy, 1e-9)
        close(together.forces[start:stop], alone.forces, 1e-9)
        start = stop


def potential_of(model: Backbone, noise: str = "all") -> BayesianPotential:
    options = ModelConfig(adapter="fairchem", checkpoint="x", noise=noise)
    posterior = PosteriorConfig(family="channel", prior_scale=0.1)
    return BayesianPotential(model, options, posterior, n_draws=2)


@pytest.mark.parametrize("direct", [False, True])
def test_gradients_per_structure_are_those_of_autograd(tmp_path, frames, direct):
    """One backward call for a batch against one per structure by the means themselves."""
    make_file = tiny_uma.direct if direct else tiny_uma.uma
    task = "omol" if direct else "omat"
    model = FairchemBackbone.load(str(make_file(tmp_path / "model.pt")), task=task).double()
    potential = potential_of(model)
    batch = model.batch(frames)
    direction = normal(len(batch.numbers), 3)
    results = [(v.clone(), g.clone()) for v, g in output_gradients(potential, batch, [direction])]
    names = [site.name for site in potential.posterior.sites]
    deltas = [potential.converted.deltas[name] for name in names]
    rms = torch.cat([potential.prior.rms(name).reshape(-1) for name in names])
    start = 0
    for i, atoms in enumerate(frames):
        out = model(model.batch([atoms]), create_graph=True)
        stop = start + len(atoms)
        for (value, gradient), mine in zip(
            results, (out.energy.sum(), (out.forces * direction[start:stop]).sum()), strict=True
        ):
            assert value[i].item() == pytest.approx(mine.item(), abs=1e-10)
            grads = torch.autograd.grad(
                mine, deltas, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            expected = torch.cat([g.reshape(-1) for g in grads]) * rms
            torch.testing.assert_close(gradient[i], expected, rtol=1e-8, atol=1e-10)
        assert gradient.abs().max() > 1e-6
        start = stop


# ---- mixtures --------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "experts"), [("softmax", 4), ("softmax", 7), ("pnorm", 4)])
def test_the_merged_model_is_the_same_for_all_compositions(tmp_path, quartz, carbide, ethanol, norm, experts):
    """The vendor's coefficients add up to 1 + 0.005 E (softmax) or 1: Delta is shared out accordingly."""
    file = tiny_uma.uma(tmp_path / "m.pt", num_experts=experts, moe_expert_coefficient_norm=norm)
    model = FairchemBackbone.load(str(file), task="omat").double()
    mixing = model.model.backbone.global_mole_tensors
    total = 1 + 0.005 * experts if norm == "softmax" else 1.0
    torch.testing.assert_close(mixing.share, torch.full((experts,), 1 / total, dtype=torch.float64))
    coefficients = mixing.reference()
    assert coefficients.sum().item() == pytest.approx(total)
    frames = [quartz, carbide, ethanol]
    stock = evaluate_all(model, frames)
    c = convert(model)
    changes = perturb(c)
    with torch.no_grad():
        for name, delta in c.deltas.items():
            delta += changes[name]
    expected = evaluate_all(model, frames)
    assert (expected.energy - stock.energy).abs().min() > 1e-2
    unload(model, merge=True)
    merged = evaluate_all(model, frames)
    close(merged.energy, expected.energy, 1e-10)
    close(merged.forces, expected.forces, 1e-10)
    assert not any("delta" in name for name in model.state_dict())


def test_a_heads_mixture_is_the_tasks_own_expert(backbone, file, quartz):
    """Merging leaves the other task's expert alone."""
    c = convert(backbone, train="readout", noise="none")
    name = "output_heads.energyandforcehead.head.energy_block.0"
    before = backbone.model.get_submodule(name).base.weights.clone()
    assert torch.equal(c.pretrained[name], before[0])  # tasks in alphabetical order: omat, omol
    with torch.no_grad():
        c.deltas[name].fill_(0.1)
    expected = evaluate(backbone, quartz)
    unload(backbone, merge=True)
    after = backbone.model.get_submodule(name).weights
    close(after[0], before[0] + 0.1, 1e-12)
    assert torch.equal(after[1], before[1])
    close(evaluate(backbone, quartz).energy, expected.energy, 1e-10)


def test_the_experts_stay_frozen(backbone):
    c = convert(backbone, train="rest")
    assert not any(name.endswith(".weights") for name in c.rest)
    assert not any("routing_mlp" in name for name in c.rest)
    assert any("norm_1" in name for name in c.rest)


def test_the_priors_scale_is_that_of_the_mixed_weight(backbone, tmp_path):
    """Also after training and loading: the coefficients are those of the pretrained model."""
    potential = potential_of(backbone)
    name = "backbone.blocks.0.edge_wise.so2_conv_1.fc_m0"
    layer = potential.converted.layers[name]
    mixed = torch.einsum(
        "e,eoi->oi", backbone.model.backbone.global_mole_tensors.reference(), layer.base.weights
    )
    close(potential.prior.rms(name), mixed.square().mean().sqrt().expand(mixed.shape), 1e-12)
    with torch.no_grad():
        for delta in potential.converted.deltas.values():
            delta += 0.05
    save_model(potential, tmp_path / "model")
    again = load_model(tmp_path / "model")
    for site in potential.prior.sites:
        assert torch.equal(potential.prior.rms(site), again.prior.rms(site))


def test_unload_gives_the_vendors_state_back(backbone):
    before = copy.deepcopy(backbone.state_dict())
    c = convert(backbone)
    with torch.no_grad():
        for delta in c.deltas.values():
            delta += 1.0
    unload(backbone, merge=False)
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
