"""SevenNet fulfils the contract; modalities, older layers, names."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from ase import Atoms
from blip_ft.adapters.sevennet import SevenNetBackbone

from blip_ft.backbone import Backbone
from blip_ft.errors import CheckpointError, RecipeError
from blip_ft.variational.convert import plan

from .conservative import ConservativeContract
from .helpers import close, evaluate, same
from .variational import VariationalContract
from .vendor import VendorContract

pytestmark = pytest.mark.backend("sevennet")


def path_of(name: str) -> Path:
    from sevenn.util import pretrained_name_to_path

    return Path(pretrained_name_to_path(name))


class TestSevenNet0(VendorContract, ConservativeContract, VariationalContract):
    package = "sevenn"
    suffix = ".pth"
    invariance = 1e-7  # Wigner 3j tables are stored in single precision

    @classmethod
    def load(cls) -> Backbone:
        return SevenNetBackbone.load("7net-0")

    @classmethod
    def file(cls) -> Path:
        return path_of("7net-0")

    @classmethod
    def reload(cls, path: Path, *, trust: bool = False) -> Backbone:
        return SevenNetBackbone.load(str(path), trust=trust)


class TestMultiFidelity:
    """A model with modalities gives the vendor's numbers for each."""

    @pytest.fixture(scope="class")
    @classmethod
    def models(cls) -> dict[str, Backbone]:
        return {name: SevenNetBackbone.load("7net-mf-0", modal=name) for name in ("PBE", "R2SCAN")}

    @pytest.mark.parametrize("modal", ["PBE", "R2SCAN"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_step_zero(self, models, quartz, modal, dtype):
        model = copy.deepcopy(models[modal]).to(dtype)
        stock = quartz.copy()
        stock.calc = model.stock_calculator()
        tolerance = 1e-4 if dtype == torch.float32 else 1e-9
        ours = evaluate(model, quartz)
        assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=tolerance)
        close(ours.forces, torch.as_tensor(stock.get_forces()), tolerance)

    def test_modalities_differ_and_batch(self, models, quartz, ethanol):
        pbe, scan = (evaluate(models[name], quartz).energy for name in ("PBE", "R2SCAN"))
        assert (pbe - scan).abs() > 1.0
        batch = models["PBE"].batch([ethanol, quartz])
        close(models["PBE"](batch).energy[1:], pbe, 1e-4)

    def test_a_wrong_or_missing_modality_lists_the_valid_ones(self):
        for modal in ("PBEsol", None):
            with pytest.raises(RecipeError, match="R2SCAN, PBE"):
                SevenNetBackbone.load("7net-mf-0", modal=modal)

    def test_a_modality_of_a_model_without_any(self):
        with pytest.raises(RecipeError, match="no modalities"):
            SevenNetBackbone.load("7net-0", modal="PBE")

    def test_config_keeps_the_modality(self, models, quartz):
        twin = SevenNetBackbone.from_config(models["R2SCAN"].config())
        twin.load_state_dict(models["R2SCAN"].state_dict())
        same(evaluate(twin, quartz), evaluate(models["R2SCAN"], quartz), 1e-5)


@pytest.mark.parametrize("name", ["7net-l3i5", "7net-0_22may2024"])
def test_other_shipped_models(name: str, quartz: Atoms) -> None:
    model = SevenNetBackbone.load(name)
    stock = quartz.copy()
    stock.calc = model.stock_calculator()
    ours = evaluate(model, quartz)
    assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=1e-4)
    close(ours.forces, torch.as_tensor(stock.get_forces()), 1e-4)


@functools.cache
def shipped_architecture() -> dict[str, object]:
    return SevenNetBackbone.load("7net-0").architecture


def small_architecture(**changes: object) -> dict[str, object]:
    """The configuration of a small model in the vendor's format."""
    return {
        **copy.deepcopy(shipped_architecture()),
        "channel": 8,
        "irreps_manual": False,
        "lmax": 1,
        "num_convolution_layer": 2,
        "conv_denominator": 30.0,
        "weight_nn_hidden_neurons": [16],
        **changes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"self_connection_type": "nequip"},
        {"is_parity": True},
        {"readout_as_fcn": True, "readout_fcn_hidden_neurons": [8], "readout_fcn_activation": "relu"},
        {"radial_basis": {"radial_basis_name": "bessel", "bessel_basis_num": 8, "trainable_coeff": False}},
        {"use_bias_in_linear": True},
    ],
)
def test_other_architectures(changes: dict[str, object], quartz: Atoms) -> None:
    torch.manual_seed(0)
    model = SevenNetBackbone(small_architecture(**changes)).double()
    stock = quartz.copy()
    stock.calc = model.stock_calculator()
    ours = evaluate(model, quartz)
    assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=1e-9)
    close(ours.forces, torch.as_tensor(stock.get_forces()), 1e-9)
    twin = SevenNetBackbone.from_config(model.config()).double()
    twin.load_state_dict(model.state_dict())
    same(evaluate(twin, quartz), ours, 1e-12)
    table = {row.name: row for row in plan(model, train="all", noise="all").table}
    assert any(row.noisy for name, row in table.items() if "reduce" in name or "readout" in name)
    if changes.get("self_connection_type") == "nequip":
        left = table["0_self_connection_intro.fc_tensor_product"]
        assert left.action == "left"
        assert left.reason


def test_node_features_are_the_invariant_input_of_the_readout(quartz: Atoms) -> None:
    torch.manual_seed(0)
    model = SevenNetBackbone(small_architecture(is_parity=True)).double()
    assert evaluate(model, quartz).node_features.shape == (9, 8)


def test_a_download_that_fails_says_how_to_fetch_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests
    from sevenn import util

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(util.requests, "get", refuse)
    with pytest.raises(CheckpointError, match=r"by hand.*https://"):
        SevenNetBackbone.load("7net-omni")
