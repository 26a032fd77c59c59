"""SevenNet fulfils the contract; modalities, older layers, names."""

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from blip_ft.adapters.sevennet.backbone import SevenNetBackbone
from blip_ft.backbones.protocol import Backbone
from blip_ft.errors import CheckpointError, RecipeError
from blip_ft.potential.export import export_native
from blip_ft.testing.conservative import ConservativeContract
from blip_ft.testing.helpers import close, evaluate, same
from blip_ft.testing.variational import VariationalContract, bayesian
from blip_ft.testing.vendor import VendorContract
from blip_ft.uncertainty.predict import predict_atoms
from blip_ft.variational.convert import plan

pytestmark = pytest.mark.backend("sevennet")


def path_of(name: str) -> Path:
    from sevenn.util import pretrained_name_to_path

    return Path(pretrained_name_to_path(name))


class TestSevenNet0(VendorContract, ConservativeContract, VariationalContract):
    package = "sevenn"
    suffix = ".pth"
    named = ("architecture", "self_connection_type")
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


@pytest.mark.full
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
        pytest.param(
            {"readout_as_fcn": True, "readout_fcn_hidden_neurons": [8], "readout_fcn_activation": "relu"},
            marks=pytest.mark.full,
        ),
        pytest.param(
            {
                "radial_basis": {
                    "radial_basis_name": "bessel",
                    "bessel_basis_num": 8,
                    "trainable_coeff": False,
                }
            },
            marks=pytest.mark.full,
        ),
        pytest.param({"use_bias_in_linear": True}, marks=pytest.mark.full),
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
        product = table["0_self_connection_intro.fc_tensor_product"]
        assert (product.action, product.trained, product.noisy) == ("converted", True, True)


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


# ---- export ------------------------------------------------------------------------------------

DEPLOY = """
import json, sys
sys.modules["blip_ft"] = None  # as where it is not installed
from ase.io import read
from sevenn.calculator import SevenNetCalculator
from sevenn.scripts.deploy import deploy
structure, file, modal, target = sys.argv[1:]
atoms = read(structure)
atoms.calc = SevenNetCalculator(file, modal=modal or None, device="cpu")
print(json.dumps([float(atoms.get_potential_energy()), atoms.get_forces().tolist()]))
deploy(file, target, modal=modal or None)
"""


@pytest.mark.parametrize(
    ("name", "modal"),
    [
        ("7net-0", None),
        pytest.param("7net-mf-0", "R2SCAN", marks=pytest.mark.full),
        pytest.param("small", None, marks=pytest.mark.full),
    ],
)
def test_the_vendors_programs_open_an_export(
    name: str, modal: str | None, quartz: Atoms, tmp_path: Path
) -> None:
    """The calculator, and the converter for LAMMPS, in a process without this package."""
    if name == "small":  # one number for all elements as shift, and a tensor product
        torch.manual_seed(0)
        changes = {"self_connection_type": "nequip", "shift": -1.5, "scale": 2.0}
        backbone = SevenNetBackbone(small_architecture(**changes))
    else:
        backbone = SevenNetBackbone.load(name, **({"modal": modal} if modal else {}))
    potential = bayesian(backbone.double()).to_dtype("float32")
    potential.references = {8: -3.25, 14: 12.5}
    done = export_native(potential, tmp_path / "out", draws=2 if name == "7net-0" else 0)
    assert all(item.energy_ev_per_atom < 1e-5 for item in done)
    quartz.write(tmp_path / "quartz.json")
    target = tmp_path / "deployed.pt"
    arguments = [str(tmp_path / "quartz.json"), str(tmp_path / "out/mean.pth"), modal or "", str(target)]
    printed = subprocess.run(
        [sys.executable, "-c", DEPLOY, *arguments], capture_output=True, text=True, check=True
    ).stdout
    energy, forces = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    (ours,) = predict_atoms(potential, [quartz], n_draws=0)
    assert energy == pytest.approx(ours["energy"], abs=1e-5 * len(quartz))
    np.testing.assert_allclose(forces, ours["forces"], rtol=0, atol=2e-4)
    deployed = torch.jit.load(target)
    batch = backbone.batch([quartz])
    index, vectors = batch.graph["edge_index"], batch.graph["edge_vec"]
    species = torch.tensor([backbone.architecture["_type_map"][int(z)] for z in quartz.numbers])
    out = deployed(
        {
            "x": species,
            # the vendor's graphs have both directions of every pair
            "edge_index": torch.cat((index, index.flip(0)), dim=1),
            "edge_vec": torch.cat((vectors, -vectors)).float().requires_grad_(),
            "num_atoms": torch.tensor(len(quartz)),
        }
    )
    assert out["inferred_total_energy"].item() == pytest.approx(ours["energy"], abs=1e-4 * len(quartz))
