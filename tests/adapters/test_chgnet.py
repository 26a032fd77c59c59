"""CHGNet fulfils the contract; older versions, structures without angles, dropout."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from torch import nn

from blip_ft.adapters.chgnet.backbone import CHGNetBackbone
from blip_ft.backbones.protocol import Backbone
from blip_ft.data.check.sets import check_units
from blip_ft.data.read.sources import load_source
from blip_ft.errors import BlipError, CheckpointError
from blip_ft.potential.export import export_native
from blip_ft.testing.conservative import ConservativeContract
from blip_ft.testing.helpers import array, close, evaluate, evaluate_all, same
from blip_ft.testing.variational import VariationalContract, bayesian
from blip_ft.testing.vendor import VendorContract
from blip_ft.training.sanity_checks import stock_predictions
from blip_ft.uncertainty.predict import predict_atoms

pytestmark = pytest.mark.backend("chgnet")


def path_of(name: str) -> Path:
    import chgnet

    return next((Path(chgnet.__file__).parent / "pretrained" / name).glob("*.pth.tar"))


class TestCHGNet030(VendorContract, ConservativeContract, VariationalContract):
    package = "chgnet"
    suffix = ".pth.tar"
    named = ("arguments", "composition_model")

    @classmethod
    def load(cls) -> Backbone:
        return CHGNetBackbone.load("0.3.0")

    @classmethod
    def file(cls) -> Path:
        return path_of("0.3.0")

    @classmethod
    def reload(cls, path: Path, *, trust: bool = False) -> Backbone:
        return CHGNetBackbone.load(str(path), trust=trust)


@pytest.mark.parametrize("name", ["0.2.0", "r2scan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_shipped_models(name: str, dtype: torch.dtype, quartz: Atoms) -> None:
    model = CHGNetBackbone.load(name).to(dtype)
    stock = quartz.copy()
    stock.calc = model.stock_calculator()
    ours, tolerance = evaluate(model, quartz), 1e-4 if dtype == torch.float32 else 1e-9
    assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=tolerance)
    close(ours.forces, torch.as_tensor(stock.get_forces()), tolerance)
    close(ours.stress[0], torch.as_tensor(stock.get_stress()), tolerance)


@pytest.mark.parametrize("key", ["non_linearity", "graph_converter_algorithm", "readout_norm", "final_mlp"])
def test_arguments_name_what_is_listed_only(key: str) -> None:
    config = CHGNetBackbone.load("0.3.0").config()
    config["arguments"][key] = "OrderedDict"
    with pytest.raises(CheckpointError, match=f"'OrderedDict', which is none of the values of '{key}'"):
        CHGNetBackbone.from_config(config)


def test_the_vendors_stress_has_the_wrong_sign_in_left_handed_cells(quartz: Atoms) -> None:
    """Of chgnet 0.4.2; ours and the gate's are right (``test_step_zero_of_another_description``)."""
    from chgnet.model.dynamics import CHGNetCalculator

    stress = []
    for order in ([0, 1, 2], [1, 0, 2]):
        atoms = quartz.copy()
        atoms.set_cell(quartz.cell.array[order])
        atoms.calc = CHGNetCalculator(use_device="cpu", verbose=False)
        stress.append(atoms.get_stress())
    np.testing.assert_allclose(stress[1], -stress[0], rtol=0, atol=1e-4)
    assert np.abs(stress[0]).max() > 1e-2


def test_right_labels_of_left_handed_cells_pass_the_check_of_units(quartz: Atoms, tmp_path: Path) -> None:
    """Two lattice vectors are swapped, as in many published cells; the stress is a derivative of the energy."""
    model = CHGNetBackbone.load("0.3.0")
    frames = []
    for seed in range(4):
        atoms = quartz.copy()
        atoms.set_cell(quartz.cell.array[[1, 0, 2]] * (1 + 0.01 * seed))
        atoms.rattle(0.05, seed=seed)
        ours = evaluate(model, atoms)
        atoms.calc = SinglePointCalculator(
            atoms, energy=ours.energy.item(), forces=array(ours.forces), stress=array(ours.stress[0])
        )
        frames.append(atoms)
    write(tmp_path / "left.extxyz", frames)
    calculator = model.stock_calculator()
    train = load_source(str(tmp_path / "left.extxyz"))
    assert all(row["stress"] is not None for row in train)
    assert check_units(train, lambda some: stock_predictions(calculator, some)) == []


def test_a_structure_without_angles_does_not_see_its_batch(quartz: Atoms) -> None:
    """Version 0.2.0 has biases that the vendor adds only if some structure of the batch has angles."""
    model = CHGNetBackbone.load("0.2.0").double()
    pair = Atoms("O2", positions=[(0, 0, 0), (0, 0, 3.5)], cell=[20, 20, 20], pbc=True)
    alone, batch = evaluate(model, pair), evaluate_all(model, [pair, quartz])
    close(batch.energy[:1], alone.energy, 1e-10)
    stock = pair.copy()
    stock.calc = model.stock_calculator()
    assert alone.energy.item() == pytest.approx(stock.get_potential_energy(), abs=1e-9)


def test_dropout_and_batch_statistics_are_off_in_training(quartz: Atoms, ethanol: Atoms) -> None:
    arguments = {**CHGNetBackbone.load("0.3.0").arguments, "conv_dropout": 0.5, "mlp_dropout": 0.5}
    torch.manual_seed(0)
    model = CHGNetBackbone({**arguments, "gMLP_norm": "batch", "readout_norm": "batch"}).double()
    before = evaluate(model.eval(), quartz)
    same(evaluate(model.train(), quartz), before, 1e-12)
    model.model.train()  # not through the backbone: dropout still is off
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    assert model.train().training


def test_references_follow_the_vendors_flags(quartz: Atoms) -> None:
    """An extensive model adds its (intensive) composition energy once per structure."""
    arguments = {**CHGNetBackbone.load("0.3.0").arguments, "is_intensive": False}
    torch.manual_seed(0)
    for composition in ("MPtrj", None):
        model = CHGNetBackbone({**arguments, "composition_model": composition})
        stock = quartz.copy()
        stock.calc = model.stock_calculator()
        ours = evaluate(model, quartz)
        assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=1e-4)
        assert ours.node_energy.sum().item() == pytest.approx(ours.energy.item(), abs=1e-4)


def test_a_trainers_file(tmp_path: Path, quartz: Atoms) -> None:
    """Files of the vendor's trainer name version and biases among the arguments."""
    from chgnet.model import CHGNet

    vendor = CHGNet.load(model_name="0.2.0", use_device="cpu", verbose=False)
    with torch.no_grad():
        for parameter in vendor.mlp.parameters():
            parameter += 0.01
    path = tmp_path / "tuned.pth.tar"
    torch.save({"model": vendor.as_dict(), "trainer_args": {}}, path)
    energy = vendor.predict_structure(_structure(quartz))["e"] * len(quartz)
    assert evaluate(CHGNetBackbone.load(str(path)), quartz).energy.item() == pytest.approx(energy, abs=1e-4)


def _structure(atoms: Atoms) -> object:
    from pymatgen.io.ase import AseAtomsAdaptor

    return AseAtomsAdaptor.get_structure(atoms)


def test_a_model_that_pools_first_is_refused(tmp_path: Path) -> None:
    content = torch.load(path_of("0.3.0"), map_location="cpu")
    content["model"]["model_args"]["mlp_first"] = False
    path = tmp_path / "pooled.pth.tar"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="atomic energies"):
        CHGNetBackbone.load(str(path))


def test_single_precision_noise_is_the_vendors_own(quartz: Atoms) -> None:
    """In float32 the vendor's forces change under a permutation; ours are as close to float64."""
    model = CHGNetBackbone.load("0.3.0")
    exact = evaluate(copy.deepcopy(model).double(), quartz).forces.numpy()
    stock = quartz.copy()
    stock.calc = model.stock_calculator()
    vendor = np.abs(stock.get_forces() - exact).max()
    assert np.abs(evaluate(model, quartz).forces.numpy() - exact).max() < 2 * vendor + 1e-5


OPEN = """
import json, sys
sys.modules["blip_ft"] = None  # as where it is not installed
from ase.io import read
from chgnet.model.dynamics import CHGNetCalculator
from chgnet.model.model import CHGNet
atoms = read(sys.argv[1])
atoms.calc = CHGNetCalculator(CHGNet.from_file(sys.argv[2]), use_device="cpu")
print(json.dumps([float(atoms.get_potential_energy()), atoms.get_forces().tolist()]))
"""


def test_the_vendors_program_opens_an_export(quartz: Atoms, tmp_path: Path) -> None:
    """In a process without this package; references of a model that had none of its own are added."""
    arguments = {**CHGNetBackbone.load("0.3.0").arguments, "composition_model": None}
    torch.manual_seed(0)
    for backbone in (CHGNetBackbone.load("0.2.0"), CHGNetBackbone(arguments)):
        potential = bayesian(backbone.double()).to_dtype("float32")
        potential.references = {8: -3.25, 14: 12.5}
        done = export_native(potential, tmp_path / "out", draws=2, overwrite=True)
        assert all(item.energy_ev_per_atom < 1e-5 for item in done)
    quartz.write(tmp_path / "quartz.json")
    command = [sys.executable, "-c", OPEN, str(tmp_path / "quartz.json"), str(tmp_path / "out/mean.pth.tar")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    energy, forces = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    (ours,) = predict_atoms(potential, [quartz], n_draws=0)
    assert energy == pytest.approx(ours["energy"], abs=1e-4 * len(quartz))
    np.testing.assert_allclose(forces, ours["forces"], rtol=0, atol=1e-2)  # the vendor's float32 noise


def test_all_electron_energies_are_said_to_lose_digits(tmp_path: Path) -> None:
    """The vendor's program adds up in float32: its energies move in steps of meV there."""
    potential = bayesian(CHGNetBackbone.load("0.3.0"))
    potential.references = {8: -2041.0, 14: -20337.0}
    (mean,) = export_native(potential, tmp_path / "out")
    assert mean.energy_as_used_ev_per_atom > 1e-4
    meta = json.loads((tmp_path / "out/export.json").read_text())
    assert "--references beside" in meta["notes"][0]
    (mean,) = export_native(potential, tmp_path / "beside", references=False)
    assert mean.energy_as_used_ev_per_atom < 1e-5
    meta = json.loads((tmp_path / "beside/export.json").read_text())
    assert (meta["notes"], meta["references_in_files"]) == ([], False)


def test_a_shift_that_has_no_place_in_the_file(tmp_path: Path) -> None:
    arguments = {**CHGNetBackbone.load("0.3.0").arguments, "is_intensive": False}
    model = CHGNetBackbone(arguments)
    model.model.composition_model.is_intensive = True
    with pytest.raises(BlipError, match="per structure"):
        model.write_native(tmp_path / "x.pth.tar", {8: 1.0})
