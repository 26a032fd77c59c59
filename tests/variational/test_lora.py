"""Means of low rank: the algebra, ties, merging, files, and what peft makes of the same numbers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from torch import nn

from blip_ft.backbones.protocol import Backbone
from blip_ft.config import LoraOptions, ModelConfig, PosteriorConfig
from blip_ft.errors import BlipError, MissingBackendError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import load_model, save_model
from blip_ft.potential.export import export_native, member
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty.predict import predict_atoms
from blip_ft.variational.convert import convert, unload
from blip_ft.variational.layers import VariationalLayer
from blip_ft.variational.lora import LowRank, LowRankChange
from blip_ft.variational.noise import Noise

pytestmark = pytest.mark.backend("lora")

#: small trained models in vendors' formats (benchmarks/distil)
MODELS = Path(__file__).parents[1] / "models"
OPTIONS = LowRank(rank=3, alpha=6.0)


def fake() -> Backbone:
    return FakeBackbone.load("tiny")


def sevennet() -> Backbone:
    from blip_ft.adapters.sevennet.backbone import SevenNetBackbone

    return SevenNetBackbone.load("7net-0").double()


def mace() -> Backbone:
    from blip_ft.adapters.mace.backbone import MACEBackbone

    return MACEBackbone.load(str(MODELS / "sio2_mace.model"), trust=True).double()


def uma() -> Backbone:
    from blip_ft.adapters.fairchem.backbone import FairchemBackbone

    return FairchemBackbone.load(str(MODELS / "sio2_uma.pt"), task="omat").double()


def orb() -> Backbone:
    from blip_ft.adapters.orb.backbone import OrbBackbone

    name = "orb-v3-conservative-inf-omat"
    return OrbBackbone.load(str(MODELS / "sio2_orb.ckpt"), architecture=name).double()


def on(make: Any, name: str) -> Any:
    return pytest.param(make, marks=pytest.mark.backend(name), id=name)


#: with layers of e3nn, of fairchem's mixtures and of the vendors themselves
VENDORS = [on(mace, "mace"), on(uma, "fairchem"), on(orb, "orb")]
BACKBONES = [pytest.param(fake), on(sevennet, "sevennet"), *VENDORS]


def crystal():
    atoms = bulk("SiO", "rocksalt", 4.4)
    atoms.rattle(0.1, seed=3)
    return atoms


def randomise(parameters, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in parameters:
            p.copy_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def potential_of(backbone: Backbone, **model) -> BayesianPotential:
    return BayesianPotential(
        backbone,
        ModelConfig(adapter=backbone.name, checkpoint="x", lora=LoraOptions(rank=3, alpha=6.0), **model),
        PosteriorConfig(family="weight", prior_scale=0.3, init_std=0.02),
        n_draws=4,
    )


@pytest.mark.parametrize("make", BACKBONES)
def test_merged_equals_unmerged(make):
    backbone = make()
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    before = backbone(backbone.batch([crystal()]))
    done = convert(backbone, low_rank=OPTIONS)
    start = backbone(backbone.batch([crystal()]))
    torch.testing.assert_close(start.forces, before.forces, rtol=0, atol=1e-12)
    randomise(done.mean_parameters)
    unmerged = backbone(backbone.batch([crystal()]))
    assert (unmerged.energy - before.energy).abs() > 1e-3
    merged = copy.deepcopy(backbone)
    unload(merged, merge=True)
    assert not any("lora" in key for key in merged.state_dict())
    after = merged(merged.batch([crystal()]))
    torch.testing.assert_close(after.energy, unmerged.energy, rtol=0, atol=1e-9)
    torch.testing.assert_close(after.forces, unmerged.forces, rtol=0, atol=1e-9)
    unload(backbone, merge=False)
    after = backbone.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in state.items())


@pytest.mark.parametrize("make", BACKBONES)
def test_every_matrix_changes_by_the_rank_and_no_more(make):
    done = convert(make(), low_rank=OPTIONS)
    randomise(done.mean_parameters)
    ranks = set()
    for name, site in done.sites.items():
        flat = done.deltas[name].detach().reshape(-1)
        for block in site.blocks:
            matrix = flat[block.start : block.start + block.numel].reshape(block.shape)
            found = int(torch.linalg.matrix_rank(matrix))
            assert found <= min(OPTIONS.rank, *block.shape), name
            ranks.add(found)
    assert OPTIONS.rank in ranks
    few = sum(p.numel() for p in done.mean_parameters)
    assert few < sum(s.numel for s in done.sites.values())


def test_the_scale_is_alpha_over_rank():
    done = convert(fake(), low_rank=LowRank(rank=2, alpha=5.0))
    layer = done.layers["readout.0"].change.lora
    randomise(done.mean_parameters)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(done.deltas["readout.0"], 2.5 * b @ a)


@pytest.mark.backend("sevennet")
def test_irreps_stay_equivariant():
    backbone = sevennet()
    done = convert(backbone, low_rank=OPTIONS)
    randomise(done.mean_parameters)
    atoms = crystal().repeat((2, 1, 1))
    turned = atoms.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    one, two = backbone(backbone.batch([atoms])), backbone(backbone.batch([turned]))
    assert one.energy.item() == pytest.approx(two.energy.item(), abs=1e-8)


def test_a_tied_weight_has_one_change():
    backbone = fake()
    done = convert(backbone, low_rank=OPTIONS)
    assert backbone.model.update.change is backbone.model.update_again.change
    assert sum("update" in name for name in done.sites) == 1


def test_peft_alone_gets_the_same_numbers():
    """The vendor's model with peft's own layers and forward, given our factors."""
    import peft

    backbone = fake()
    done = convert(backbone, train="readout", low_rank=OPTIONS)
    randomise(done.mean_parameters)
    plain = fake()
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["readout.0", "readout.2"])
    peft.inject_adapter_in_model(config, plain.model)
    for name in ("readout.0", "readout.2"):
        theirs, ours = plain.model.get_submodule(name), done.layers[name].change
        theirs.load_state_dict(ours.lora.state_dict(), strict=False)
        torch.testing.assert_close(theirs.get_delta_weight("default"), ours.value())
    one, two = (b(b.batch([crystal()])) for b in (backbone, plain))
    torch.testing.assert_close(one.energy, two.energy, rtol=0, atol=1e-10)


def test_noise_comes_on_top():
    potential = potential_of(fake(), mean="lora")
    randomise(potential.mean_parameters)
    batch = potential.backbone.batch([crystal()])
    drawn = potential(batch, Noise("draw", draw=1)).energy
    plain = member(potential, 1, n_draws=4)
    assert plain(batch).energy.item() == pytest.approx(drawn.item(), abs=1e-9)
    assert abs(drawn.item() - potential(batch).energy.item()) > 1e-4


def test_the_prior_holds_the_product():
    lora, full = potential_of(fake(), mean="lora"), potential_of(fake())
    randomise(lora.mean_parameters)
    with torch.no_grad():
        for name, value in lora.converted.deltas.items():
            full.converted.layers[name].delta.copy_(value)
    assert lora.kl().item() == pytest.approx(full.kl().item(), rel=1e-9)
    lora.kl().backward()
    assert all(p.grad is not None for p in lora.mean_parameters)
    with torch.no_grad():  # as a full change, it counts whatever the grad mode
        assert lora.kl().item() == pytest.approx(full.kl().item(), rel=1e-9)


@pytest.mark.parametrize("make", BACKBONES)
def test_a_file_keeps_it(make, tmp_path):
    potential = potential_of(make(), mean="lora", noise="readout", dtype="float64")
    randomise(potential.mean_parameters)
    save_model(potential, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.model_config.mean == "lora"
    assert any(
        isinstance(m, VariationalLayer) and isinstance(m.change, LowRankChange) for m in again.modules()
    )
    (one,), (two,) = predict_atoms(potential, [crystal()]), predict_atoms(again, [crystal()])
    assert one["energy"] == pytest.approx(two["energy"], abs=1e-9)
    np.testing.assert_allclose(one["forces"], two["forces"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", VENDORS)
def test_an_export_holds_the_merged_change(make, tmp_path):
    """``export_native`` opens every file with the vendor's loader and compares."""
    potential = potential_of(make(), mean="lora", noise="readout", dtype="float64")
    before = potential.backbone(potential.backbone.batch([crystal()])).energy.item()
    randomise(potential.mean_parameters)
    (mean, *draws) = export_native(potential, tmp_path / "native", draws=2)
    assert len(draws) == 2
    atoms = crystal()
    atoms.calc = make().open_native(tmp_path / "native" / mean.file)
    (ours,) = predict_atoms(potential, [crystal()], n_draws=0)
    assert atoms.get_potential_energy() == pytest.approx(ours["energy"], abs=2e-5)
    assert abs(ours["energy"] - before) > 1e-3


def test_the_start_is_a_function_of_the_site():
    torch.manual_seed(0)
    one = convert(fake(), low_rank=OPTIONS)
    start = [p.detach().clone() for p in one.mean_parameters]
    torch.manual_seed(1)
    two = convert(fake(), low_rank=OPTIONS)
    assert all(torch.equal(p, q) for p, q in zip(start, two.mean_parameters, strict=True))
    randomise(one.mean_parameters)
    one.reset_mean()
    assert all(torch.equal(p, q) for p, q in zip(start, one.mean_parameters, strict=True))
    assert all(not d.any() for d in one.deltas.values())


def test_only_trained_modules_get_factors():
    done = convert(fake(), train="readout", noise="all", low_rank=OPTIONS)
    assert {n for n, layer in done.layers.items() if isinstance(layer.change, LowRankChange)} == {
        "readout.0",
        "readout.2",
    }
    potential = potential_of(fake(), mean="frozen")
    assert potential.mean_parameters == []
    assert potential.converted.noisy


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingBackendError, match="peft") as caught:
        convert(fake(), low_rank=OPTIONS)
    assert "blip-ft[lora]" in caught.value.remedy


def test_the_private_call_of_peft_is_there_and_guarded(monkeypatch):
    """It is not in peft's saved configuration, and may go: then an error says which release to take."""
    import peft

    config = peft.LoraConfig()
    config._register_custom_module({nn.Bilinear: nn.Bilinear})
    assert "_custom_modules" not in config.to_dict()
    monkeypatch.delattr(peft.LoraConfig, "_register_custom_module")
    with pytest.raises(BlipError, match="no longer takes layers"):
        convert(fake(), low_rank=OPTIONS)
