"""Orb fulfils the contract: conservative and direct models; older ones, charges, names, export."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.adapters.orb import vendor
from blip_ft.adapters.orb.backbone import OrbBackbone
from blip_ft.backbones.protocol import Backbone
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.data.batch.dataset import make_item
from blip_ft.data.read.sources import load_source
from blip_ft.errors import CheckpointError, ConversionError, DataError, RecipeError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.export import export_native
from blip_ft.testing.conservative import ConservativeContract
from blip_ft.testing.helpers import array, close, evaluate
from blip_ft.testing.variational import VariationalContract
from blip_ft.testing.vendor import VendorContract
from blip_ft.training.sanity_checks import stock_predictions
from blip_ft.variational.convert import plan

from .orb_files import SIZES, write_orb

pytestmark = pytest.mark.backend("orb")

CONSERVATIVE, DIRECT = "orb-v3-conservative-inf-omat", "orb-v3-direct-inf-omat"
_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def path_of(architecture: str) -> Path:
    return write_orb(Path(_FOLDER.name) / f"{architecture}.ckpt", architecture)


def load(architecture: str, **options: Any) -> OrbBackbone:
    return OrbBackbone.load(str(path_of(architecture)), architecture=architecture, **options)


class Orb(VendorContract, VariationalContract):
    package = "orb_models"
    suffix = ".ckpt"
    named = ("architecture",)
    equivariant = False
    atomic = False
    architecture: ClassVar[str]
    #: rotations are learned, so that there is no law for how error bars turn with a structure
    test_force_covariance_turns_with_the_structure = None

    @classmethod
    def load(cls) -> Backbone:
        return load(cls.architecture)

    @classmethod
    def file(cls) -> Path:
        return path_of(cls.architecture)

    @classmethod
    def reload(cls, path: Path, *, trust: bool = False) -> Backbone:
        return OrbBackbone.load(str(path), trust=trust, architecture=cls.architecture)


class TestConservative(Orb, ConservativeContract):
    architecture = CONSERVATIVE


class TestDirect(Orb):
    architecture = DIRECT

    @pytest.mark.full
    def test_save_and_load_in_another_process(self, potential, quartz, elsewhere):
        super().test_save_and_load_in_another_process(potential, quartz, elsewhere)

    @pytest.mark.full
    def test_importing_the_adapter_imports_no_backend(self, elsewhere):
        super().test_importing_the_adapter_imports_no_backend(elsewhere)

    def test_vacuum_does_not_matter(self, backbone, slab, ethanol):
        """The vendor takes the torque off free molecules, but not off boxed ones."""
        thick = slab.copy()
        thick.cell[2] = (0.0, 0.0, 60.0)
        thick.pbc = True
        close(evaluate(backbone, thick).forces, evaluate(backbone, slab).forces, 1e-9)
        box = ethanol.copy()
        box.set_cell([50.0, 60.0, 70.0])
        box.pbc = True
        boxed, free = evaluate(backbone, box), evaluate(backbone, ethanol)
        close(boxed.energy, free.energy, 1e-9)
        arm = ethanol.positions - ethanol.positions.mean(axis=0)
        assert np.abs(np.cross(arm, array(free.forces)).sum(axis=0)).max() < 1e-9
        assert np.abs(np.cross(arm, array(boxed.forces)).sum(axis=0)).max() > 1e-3

    def test_forces_carry_a_graph_to_the_weights_if_asked(self, backbone, quartz):
        batch = backbone.batch([quartz])
        assert not backbone(batch).forces.requires_grad
        prediction = backbone(batch, create_graph=True)
        (prediction.forces.square().sum() + prediction.stress.square().sum()).backward()
        assert backbone.model.heads["stress"].mlp[0].weight.grad.abs().max() > 0

    def test_energies_of_far_molecules_add_up(self, backbone, ethanol):
        """In a periodic box, where no torque is taken off; the energy is one of a mean of equals."""
        one, pair = ethanol.copy(), ethanol.copy()
        pair.extend(Atoms(ethanol.numbers, ethanol.positions + np.array([60.0, 0.0, 0.0])))
        for atoms in (one, pair):
            atoms.set_cell([150.0, 40.0, 40.0])
            atoms.pbc = True
        single, double = evaluate(backbone, one), evaluate(backbone, pair)
        close(double.energy, 2 * single.energy, 1e-9)
        close(double.forces, torch.cat((single.forces, single.forces)), 1e-9)


# ---- architectures -----------------------------------------------------------------------------


def test_architectures_are_those_of_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every published model: the vendor's own function builds what the table says."""
    from orb_models.forcefield import pretrained

    monkeypatch.setattr(pretrained, "load_model", lambda model, *_args, **_options: model)
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda self: self)  # nothing to copy on "meta"
    known = vendor.architectures()
    assert {name for name in pretrained.ORB_PRETRAINED_MODELS if "v1" not in name} == set(known)
    with torch.device("meta"):
        for name, kind in known.items():
            model = pretrained.ORB_PRETRAINED_MODELS[name](device="cpu", compile=False)
            state = model.state_dict()
            ours = vendor.build(name, vendor.read_sizes(state, name))
            assert {k: v.shape for k, v in ours.state_dict().items()} == {
                k: v.shape for k, v in state.items()
            }
            assert model.system_config == ours.system_config, name
            assert model.has_stress == kind.has_stress, name
            assert hasattr(model, "grad_forces_name") == kind.conservative, name
            assert (model.model.conditioner is not None) == kind.charged, name


@pytest.mark.parametrize("name", ["orb-v2", "orb-v3-conservative-20-omat", "orb-v3-direct-20-mpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_architectures(name: str, dtype: torch.dtype, quartz: Atoms, ethanol: Atoms) -> None:
    model = load(name).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for atoms in (quartz, ethanol):
        stock = atoms.copy()
        stock.calc = model.stock_calculator()
        ours = evaluate(model, atoms)
        assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=tolerance * len(atoms))
        close(ours.forces, torch.as_tensor(stock.get_forces()), tolerance)
    degrees = torch.bincount(model.batch([quartz]).graph["edge_index"][0])
    assert degrees.tolist() == [20] * len(quartz)


@pytest.mark.parametrize(
    ("key", "value"), [("activation", 1), ("latent_dim", "OrderedDict"), ("latent_dim", True)]
)
def test_sizes_are_numbers_and_listed(key: str, value: Any) -> None:
    config = load(CONSERVATIVE).config()
    config["sizes"][key] = value
    with pytest.raises(CheckpointError, match="which is none of"):
        OrbBackbone.from_config(config)


def test_the_stock_calculator_notices_another_charge(ethanol: Atoms) -> None:
    """The vendor's caches over it: the same atoms, and the energy of before."""
    model = load("orb-v3-conservative-omol").double()  # without options: each structure has its own
    atoms = ethanol.copy()
    atoms.calc = model.stock_calculator()
    energies = []
    for charge, spin in ((0, 1), (1, 2), (0, 1)):
        atoms.info.update(charge=charge, spin=spin)
        energies.append(atoms.get_potential_energy())
        assert energies[-1] == pytest.approx(evaluate(model, atoms).energy.item(), abs=1e-9)
    assert abs(energies[1] - energies[0]) > 1e-3
    frames = []
    for charge in (0, 1):
        frames.append(ethanol.copy())
        frames[-1].info.update(charge=charge, spin=1)
    one, two = stock_predictions(model.stock_calculator(), frames)
    assert abs(one["energy"] - two["energy"]) > 1e-3


@pytest.mark.parametrize("name", ["orb-v3-conservative-omol", "orb-v3-direct-omol"])
def test_charge_and_spin(name: str, ethanol: Atoms) -> None:
    model = load(name, charge=1, spin=2).double()
    assert (
        model.layer_type("", model.model.model.gnn_stacks[0]._cond_node_proj).__name__ == "VariationalLinear"
    )
    neutral = ethanol.copy()
    neutral.info.update(charge=0, spin=1)
    energies = []
    for atoms in (ethanol, neutral):
        ours, stock = evaluate(model, atoms), atoms.copy()
        stock.calc = model.stock_calculator()
        assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=1e-9)
        close(ours.forces, torch.as_tensor(stock.get_forces()), 1e-9)
        assert ours.stress is None
        energies.append(ours.energy.item())
    assert abs(energies[0] - energies[1]) > 1e-3
    both = model(model.batch([ethanol, neutral]), stress=False).energy
    assert both.tolist() == pytest.approx(energies, abs=1e-9)
    twin = OrbBackbone.from_config(model.config()).double()
    twin.load_state_dict(model.state_dict())
    assert evaluate(twin, ethanol).energy.item() == pytest.approx(energies[0], abs=1e-9)
    with pytest.raises(DataError, match=r"charge .*every structure"):
        load(name).graph(ethanol)


def test_frames_charge_and_spin_go_into_every_step(ethanol: Atoms, tmp_path: Path) -> None:
    """No options: each frame has its own; the calculator of the vendor overlooks a changed one, ours do not."""
    model = load("orb-v3-conservative-omol").double()
    assert model.conditions == {"charge": None, "spin": None}
    assert load(CONSERVATIVE).conditions == {}
    states = []
    for charge, spin in ((0, 1), (1, 2), (-1, 2)):
        states.append(ethanol.copy())
        states[-1].info = {"charge": charge, "spin": spin}
    wanted = model(model.batch(states), stress=False).energy.tolist()
    assert np.ptp(wanted) > 1e-3
    assert [p["energy"] for p in stock_predictions(model.stock_calculator(), states)] == pytest.approx(
        wanted, abs=1e-9
    )
    one = states[0].copy()
    one.calc = model.stock_calculator()
    found = []
    for state in states:
        one.info = dict(state.info)
        found.append(one.get_potential_energy())
    assert found == pytest.approx(wanted, abs=1e-9)
    states[1].info = {"charge": 1}
    states[1].calc = SinglePointCalculator(states[1], energy=-1.0)
    ase.io.write(tmp_path / "a.xyz", states)
    with pytest.raises(
        DataError, match=r"a\.xyz, frame 1, field 'spin': this orb model needs the spin of every structure"
    ):
        make_item(load_source(str(tmp_path / "a.xyz"), labels=False)[1], model)


def test_no_charge_for_a_model_without() -> None:
    with pytest.raises(RecipeError, match="neither charge nor spin"):
        load(CONSERVATIVE, charge=1)


# ---- files and names ---------------------------------------------------------------------------


def test_a_file_needs_its_architecture() -> None:
    with pytest.raises(RecipeError, match="which model") as caught:
        OrbBackbone.load(str(path_of(DIRECT)))
    assert CONSERVATIVE in caught.value.remedy
    with pytest.raises(RecipeError, match=r"orb-v3-direct-inf-omat") as caught:
        OrbBackbone.load(str(path_of(DIRECT)), architecture="orb-v3-direct-inf-oma")
    assert caught.value.field == "model.options.architecture"
    for other in (CONSERVATIVE, "orb-v3-direct-omol", "orb-v2"):
        with pytest.raises(CheckpointError, match="not a state dict of an Orb model"):
            OrbBackbone.load(str(path_of(DIRECT)), architecture=other)
    with pytest.raises(RecipeError, match="is not"):
        OrbBackbone.load(CONSERVATIVE, architecture=DIRECT)


def test_a_missing_head_is_an_error(tmp_path: Path) -> None:
    """The vendor's own loader would leave it at random weights."""
    state = torch.load(path_of(DIRECT))
    torch.save({k: v for k, v in state.items() if not k.startswith("heads.stress")}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="not a state dict"):
        OrbBackbone.load(str(tmp_path / "x.ckpt"), architecture=DIRECT)


def test_files_of_other_times(tmp_path: Path, quartz: Atoms) -> None:
    """Reference energies as a matrix, heads under their names of v2, no confidence."""
    state = torch.load(path_of("orb-v2"))
    old = {"heads.forces.": "node_head.", "heads.energy.": "graph_head.", "heads.stress.": "stress_head."}
    renamed = {}
    for key, value in state.items():
        prefix = next((p for p in old if key.startswith(p)), "")
        renamed[old.get(prefix, "") + key.removeprefix(prefix)] = value
    key = "graph_head.reference.linear.weight"
    renamed[key] = renamed[key].reshape(1, -1)
    torch.save(renamed, tmp_path / "old.ckpt")
    model = OrbBackbone.load(str(tmp_path / "old.ckpt"), architecture="orb-v2")
    close(evaluate(model, quartz).energy, evaluate(load("orb-v2"), quartz).energy, 1e-12)


def test_a_name_is_downloaded_by_the_vendor(monkeypatch: pytest.MonkeyPatch, quartz: Atoms) -> None:
    import cached_path

    asked = []
    monkeypatch.setattr(cached_path, "cached_path", lambda url: asked.append(url) or path_of(CONSERVATIVE))
    model = OrbBackbone.load(CONSERVATIVE)
    assert asked[0].startswith("https://")
    assert CONSERVATIVE in asked[0]
    assert model.origin["checkpoint"] == CONSERVATIVE
    close(evaluate(model, quartz).energy, evaluate(load(CONSERVATIVE), quartz).energy, 1e-6)


def test_without_internet(monkeypatch: pytest.MonkeyPatch) -> None:
    import cached_path
    import requests

    def fail(url: str) -> None:
        raise requests.exceptions.ConnectionError(url)

    monkeypatch.setattr(cached_path, "cached_path", fail)
    with pytest.raises(CheckpointError, match="downloaded") as caught:
        OrbBackbone.load(CONSERVATIVE)
    text = str(caught.value)
    assert "orb-v3-conservative-inf-omat-20250404.ckpt" in text
    assert f"model.options.architecture={CONSERVATIVE}" in text
    assert str(cached_path.get_cache_dir()) in text


def test_the_process_is_left_as_it_was(tmp_path: Path, quartz: Atoms) -> None:
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    model = load(CONSERVATIVE).double()
    evaluate(model, quartz)
    model.write_native(tmp_path / "x.ckpt", {})
    atoms = quartz.copy()
    atoms.calc = model.open_native(tmp_path / "x.ckpt")
    atoms.get_forces()
    assert (torch.get_default_dtype(), torch.get_float32_matmul_precision()) == before


# ---- conversion and export ---------------------------------------------------------------------


def test_what_plays_no_part_is_left() -> None:
    rows = {r.name: r for r in plan(load(CONSERVATIVE), train="all", noise="scalar").table}
    for name in (
        "model._decoder.node_fn.mlp.NN-0",
        "heads.confidence.mlp.NN-0",
        "heads.energy.reference.linear",
    ):
        assert rows[name].action == "left"
        assert "no variational form" not in rows[name].reason
    first = rows["model._encoder._edge_fn.mlp.NN-0"]
    assert (first.trained, first.noisy) == (True, False)  # sees directions


def test_row_noise_is_refused_where_directions_come_in() -> None:
    def potential(noise: str) -> BayesianPotential:
        return BayesianPotential(
            load(CONSERVATIVE),
            ModelConfig(adapter="orb", checkpoint="x", noise=noise),
            PosteriorConfig(family="channel", mode="local", prior_scale=0.1),
        )

    potential("scalar")
    with pytest.raises(ConversionError, match="scalar paths only"):
        potential("all")


@pytest.mark.parametrize("architecture", [CONSERVATIVE, DIRECT, "orb-v2"])
def test_export(architecture: str, tmp_path: Path, quartz: Atoms) -> None:
    potential = BayesianPotential(
        load(architecture),
        ModelConfig(adapter="orb", checkpoint="x", noise="readout"),
        PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.02),
        n_draws=2,
    )
    with torch.no_grad():
        for delta in potential.mean_parameters:
            delta.add_(0.01 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(0)))
    potential.references = {8: -3.5, 14: 1.25}
    done = export_native(potential, tmp_path / "out", draws=2)
    assert [e.file for e in done] == ["mean.ckpt", "draw-00.ckpt", "draw-01.ckpt"]
    state = torch.load(tmp_path / "out/mean.ckpt", weights_only=True)
    assert state.keys() == torch.load(path_of(architecture)).keys()
    again = evaluate(OrbBackbone.load(str(tmp_path / "out/mean.ckpt"), architecture=architecture), quartz)
    ours = potential(potential.backbone.batch([quartz]))
    assert again.energy.item() == pytest.approx(ours.energy.item(), abs=1e-4)
    close(again.forces, ours.forces, 1e-5)


def test_an_export_for_structures_with_charges_of_their_own(tmp_path: Path) -> None:
    potential = BayesianPotential(
        load("orb-v3-conservative-omol"),
        ModelConfig(adapter="orb", checkpoint="x", noise="readout"),
        PosteriorConfig(family="weight", prior_scale=0.1),
    )
    potential.references = {8: -3.5, 14: 1.25}
    export_native(potential, tmp_path / "out")
    meta = json.loads((tmp_path / "out/export.json").read_text())
    assert meta["for"] == {"charge": None, "spin": None}
    assert "charge=each its own, spin=each its own" in meta["notes"][0]


def test_other_sizes_are_read_from_the_file(tmp_path: Path) -> None:
    sizes = {
        **SIZES,
        "latent_dim": 8,
        "num_message_passing_steps": 3,
        "base_mlp_depth": 1,
        "head_mlp_depth": 2,
    }
    path = write_orb(tmp_path / "x.ckpt", DIRECT, **sizes)
    model = OrbBackbone.load(str(path), architecture=DIRECT)
    assert model.sizes == sizes
    assert copy.deepcopy(model).double().dtype == torch.float64
