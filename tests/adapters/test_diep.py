"""DIEP fulfils the contract; both frames, ties and straight triplets, steps of the energy, files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from blip_ft.adapters.diep.backbone import DIEPBackbone
from blip_ft.backbones.protocol import Backbone
from blip_ft.errors import BlipError, CheckpointError
from blip_ft.potential.export import export_native
from blip_ft.testing.conservative import ConservativeContract
from blip_ft.testing.helpers import array, energies, evaluate
from blip_ft.testing.variational import VariationalContract, bayesian
from blip_ft.testing.vendor import Bomb, VendorContract
from blip_ft.uncertainty.predict import predict_atoms

pytestmark = pytest.mark.backend("diep")


def folder() -> Path:
    import diep

    return Path(diep.__file__).parent / "pretrained_models/diep_fold1"


class TestDIEP(VendorContract, ConservativeContract, VariationalContract):
    package = "diep"
    suffix = ".pt"
    named = ("arguments", "activation_type")
    step = 1e-5  # at 1e-4 Å two sides of a triplet of the slab change places

    @classmethod
    def load(cls) -> Backbone:
        return DIEPBackbone.load("fold1")

    @classmethod
    def file(cls) -> Path:
        return folder() / "state.pt"

    @classmethod
    def reload(cls, path: Path, *, trust: bool = False) -> Backbone:
        if not path.with_name("model.pt").exists():
            shutil.copy(folder() / "model.pt", path.parent)
        return DIEPBackbone.load(str(path), trust=trust)

    @pytest.mark.parametrize("name", ["quartz", "no_ties"])
    def test_stress_is_the_strain_derivative(
        self, backbone: Backbone, structures: dict[str, Atoms], name: str
    ) -> None:
        """Not where lattice vectors are equally long: the energy has a kink there (``test_at_a_tie``)."""
        no_ties = structures["periodic_atom"].copy()
        no_ties.set_cell(no_ties.cell.array * [1.0, 1.02, 1.05], scale_atoms=True)
        super().test_stress_is_the_strain_derivative(backbone, structures | {"no_ties": no_ties}, name)


@pytest.fixture(scope="module")
def fold1() -> DIEPBackbone:
    """In float64."""
    return DIEPBackbone.load("fold1").double()


def other(references: bool = True, **arguments: Any) -> DIEPBackbone:
    """Another model of the vendor's, with random weights, in float64."""
    torch.manual_seed(0)
    known = DIEPBackbone.load("fold1").arguments
    return DIEPBackbone({**known, "use_edges": None, **arguments}, references=references).double()


def equals_the_vendor(model: DIEPBackbone, atoms: Atoms) -> None:
    stock, ours = atoms.copy(), evaluate(model, atoms)
    stock.calc = model.stock_calculator()
    assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(array(ours.forces), stock.get_forces(), rtol=0, atol=1e-9)
    if atoms.pbc.all():
        np.testing.assert_allclose(array(ours.stress[0]), stock.get_stress(), rtol=0, atol=1e-9)


# ---- what the canonical frame does --------------------------------------------------------
PEROVSKITE = Atoms(
    "SrTiO3",
    scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
    cell=[3.905] * 3,
    pbc=True,
)
PERFECT = {
    "SiC": bulk("SiC", "zincblende", a=4.36, cubic=True),
    "MgO": bulk("MgO", "rocksalt", a=4.21, cubic=True),
    "SrTiO3": PEROVSKITE,  # Sr and O are equally far from an O
    "Ti": bulk("Ti", "hcp", a=2.95, c=4.68),
}


@pytest.mark.parametrize("name", PERFECT)
def test_perfect_crystals(fold1: DIEPBackbone, name: str) -> None:
    """All ties and straight triplets there are; symmetry leaves no force."""
    equals_the_vendor(fold1, PERFECT[name])
    assert evaluate(fold1, PERFECT[name]).forces.abs().max() < 1e-9


def test_linear_molecules(fold1: DIEPBackbone) -> None:
    for name in ("CO2", "HCN"):
        equals_the_vendor(fold1, molecule(name))


def test_the_vendors_straight_triplets_push_sideways(fold1: DIEPBackbone) -> None:
    """Of diep 2.0.0: what the stock calculator leaves out, and all that it does."""
    from diep.pretrained import make_calculator

    atoms = PERFECT["SiC"].copy()
    atoms.calc = make_calculator()
    assert 1e-4 < np.abs(atoms.get_forces()).max() < 1e-3
    atoms.rattle(0.05, seed=0)
    np.testing.assert_allclose(array(evaluate(fold1, atoms).forces), atoms.get_forces(), rtol=0, atol=1e-4)


def crossing(symbols: str, distance: float) -> Atoms:
    """Three atoms; the first is 2 Å from the second and ``distance`` from the third."""
    angle = np.deg2rad(100)
    third = (distance * np.cos(angle), distance * np.sin(angle), 0)
    return Atoms(symbols, positions=[(0, 0, 0), (2, 0, 0), third])


def step_at(model: DIEPBackbone, symbols: str) -> float:
    """By how much the energy jumps where two sides become equally long, eV."""
    near, far = 1.1e-6, 1e-4
    distances = (2 - near - far, 2 - near, 2 + near, 2 + near + far)
    energy = array(energies(model, [crossing(symbols, d) for d in distances]))
    return float(energy[2] - energy[1] - (energy[3] - energy[2] + energy[1] - energy[0]) * near / far)


def test_the_energy_steps_where_sides_of_different_elements_cross(fold1: DIEPBackbone) -> None:
    """The vendor's, and kept. Equal elements have none, and the bond frame has none at all."""
    assert step_at(fold1, "OIrW") == pytest.approx(-0.52e-3, abs=0.01e-3)
    assert step_at(fold1, "OSiH") == pytest.approx(-15.1e-3, abs=0.1e-3)
    assert abs(step_at(fold1, "OSiSi")) < 1e-6
    assert abs(step_at(other(triplet_frame="bond"), "OSiH")) < 1e-6


def test_at_a_tie_forces_are_those_between_its_sides(fold1: DIEPBackbone) -> None:
    """Sides to equal elements: the energy has a kink."""
    one, tie, two = (
        array(evaluate(fold1, crossing("OSiSi", d)).forces)[2, :2] for d in (2 - 2e-6, 2.0, 2 + 2e-6)
    )
    assert np.abs(two - one).max() > 1e-2
    np.testing.assert_allclose(tie, (one + two) / 2, rtol=0, atol=1e-4)


# ---- other models -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        {"triplet_frame": "bond"},
        {"use_triplets": False},
        {"references": False, "use_effective_charge": False, "activation_type": "tanh"},
        {"base_spacing": 0.4, "grid_half_length": 3.0, "gaussian_sigma": 0.7, "dropout": 0.3, "nblocks": 2},
    ],
    ids=lambda a: next(iter(a)),
)
def test_other_arguments(arguments: dict[str, Any], quartz: Atoms, ethanol: Atoms) -> None:
    model = other(**arguments)
    model.model.data_mean.fill_(0.7)
    for atoms in (quartz, ethanol):
        equals_the_vendor(model, atoms)
    twin = DIEPBackbone.from_config(json.loads(json.dumps(model.config()))).double()
    twin.load_state_dict(model.state_dict())
    assert evaluate(twin, quartz).energy.item() == evaluate(model, quartz).energy.item()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"integral_mode": "sum"}, "'sum', which is none of the values of 'integral_mode'"),
        ({"is_intensive": True}, "has is_intensive: True"),
        ({"include_state": True}, "has include_state: True"),
        ({"ntargets": 2}, "has ntargets: 2"),
    ],
)
def test_models_that_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        other(**arguments)


# ---- files --------------------------------------------------------------------------------
def test_a_folder(fold1: DIEPBackbone, tmp_path: Path, quartz: Atoms) -> None:
    """As the vendor's ``Potential.save`` writes it."""
    model = other()
    model.model.save(tmp_path / "mine")
    twin = DIEPBackbone.load(str(tmp_path / "mine")).double()
    assert twin.origin["checkpoint"] == str(tmp_path / "mine")
    assert evaluate(twin, quartz).energy.item() == pytest.approx(
        evaluate(model, quartz).energy.item(), abs=1e-9
    )
    (tmp_path / "mine/model.pt").unlink()
    with pytest.raises(CheckpointError, match="no such file") as caught:
        DIEPBackbone.load(str(tmp_path / "mine"))
    assert caught.value.file == str(tmp_path / "mine/model.pt")


def edited(tmp_path: Path, edit: Any) -> str:
    """The shipped folder with other arguments."""
    shutil.copytree(folder(), tmp_path / "edited")
    content = torch.load(folder() / "model.pt", weights_only=True)
    torch.save(edit(content), tmp_path / "edited/model.pt")
    return str(tmp_path / "edited")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: {**c, "calc_repuls": True}, "repulsion"),
        (
            lambda c: {**c, "model": {**c["model"], "@module": "os"}},
            "'os.DIEP', which is none of the DIEP classes",
        ),
        (lambda c: {"model": None}, "not the file of arguments"),
        (lambda c: c["model"]["init_args"].update(units=torch.ones(1)) or c, "no plain numbers"),
        (lambda c: c["model"]["init_args"].update(units=32) or c, "no weights of the DIEP model"),
        (lambda c: c["model"]["init_args"].update(element_types=["Xx"]) or c, "no weights of the DIEP model"),
    ],
)
def test_arguments_of_another_kind(edit: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        DIEPBackbone.load(edited(tmp_path, edit))


def test_code_among_the_arguments_runs_only_if_trusted(tmp_path: Path) -> None:
    path = edited(tmp_path, lambda _: {"model": Bomb(str(tmp_path / "exploded"))})
    with pytest.raises(CheckpointError, match="trust"):
        DIEPBackbone.load(path)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(CheckpointError):
        DIEPBackbone.load(path, trust=True)
    assert (tmp_path / "exploded").exists()


def test_the_vendors_settings_come_back(fold1: DIEPBackbone, quartz: Atoms) -> None:
    from diep import config
    from diep.layers import _diep

    before = config.float_th, config.float_np, _diep._canonicalize_triplets_batch
    calculator = fold1.stock_calculator()
    calculator.calculate(quartz)
    with pytest.raises(KeyError, match="Lr"):
        calculator.calculate(Atoms("Lr", positions=[(0, 0, 0)]))
    assert (config.float_th, config.float_np, _diep._canonicalize_triplets_batch) == before


OPEN = """
import json, sys
sys.modules["blip_ft"] = None  # as where it is not installed
from pathlib import Path
from ase.io import read
from diep.apps.pes import Potential
from diep.pretrained import DEFAULT_MODEL_DIR, DIEPCalculator
files = {name: DEFAULT_MODEL_DIR / name for name in ("model.json", "model.pt")}
potential = Potential.load(files | {"state.pt": sys.argv[2]}).eval()
atoms = read(sys.argv[1])
atoms.calc = DIEPCalculator(potential=potential, stress_unit="eV/A3")
print(json.dumps([float(atoms.get_potential_energy()), atoms.get_forces().tolist()]))
"""


def test_the_vendors_program_opens_an_export(fold1: DIEPBackbone, quartz: Atoms, tmp_path: Path) -> None:
    """In a process without this package."""
    potential = bayesian(fold1).to_dtype("float32")
    potential.references = {8: -3.25, 14: 12.5}
    done = export_native(potential, tmp_path / "out", draws=2)
    assert all(item.energy_ev_per_atom < 1e-5 for item in done)
    quartz.write(tmp_path / "quartz.json")
    command = [sys.executable, "-c", OPEN, str(tmp_path / "quartz.json"), str(tmp_path / "out/mean.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    energy, forces = json.loads(next(line for line in printed.splitlines() if line.startswith("[")))
    (ours,) = predict_atoms(potential, [quartz], n_draws=0)
    assert energy == pytest.approx(ours["energy"], abs=1e-4 * len(quartz))
    np.testing.assert_allclose(forces, ours["forces"], rtol=0, atol=1e-3)


def test_a_shift_that_has_no_place_in_the_file(tmp_path: Path) -> None:
    model = other(references=False)
    with pytest.raises(BlipError, match="no energies of elements"):
        model.write_native(tmp_path / "x.pt", {8: 1.0})
    model.write_native(tmp_path / "x.pt", {})
