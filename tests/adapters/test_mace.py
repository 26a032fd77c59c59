"""MACE fulfils the contract; heads, other architectures, names, trust, reference energies."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from blip_ft.adapters.mace import vendor
from blip_ft.adapters.mace.backbone import MACEBackbone
from blip_ft.adapters.shared import files
from blip_ft.backbones.protocol import Backbone
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import CheckpointError, ConversionError, RecipeError, SanityCheckError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.export import export_native, member
from blip_ft.testing.conservative import ConservativeContract
from blip_ft.testing.helpers import close, evaluate, same
from blip_ft.testing.variational import VariationalContract, bayesian, turned
from blip_ft.testing.vendor import VendorContract
from blip_ft.uncertainty.predict import predict_atoms
from blip_ft.variational.convert import plan

from .mace_files import ELEMENTS, KINDS, architecture, load, path_of

pytestmark = pytest.mark.backend("mace")
SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@pytest.fixture(scope="module", autouse=True)
def published() -> Iterator[None]:
    """The file of the contract counts as a published release, as those on the shipped list do."""
    path = path_of("vectors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "releases", lambda: {files.sha256(path): "tiny"})
        yield


class TestMACE(VendorContract, ConservativeContract, VariationalContract):
    package = "mace"
    suffix = ".model"
    named = ("architecture", "class")

    @classmethod
    def load(cls) -> Backbone:
        return MACEBackbone.load(str(path_of("vectors")))

    @classmethod
    def file(cls) -> Path:
        return path_of("vectors")

    @classmethod
    def reload(cls, path: Path, *, trust: bool = False) -> Backbone:
        return MACEBackbone.load(str(path), trust=trust)


class TestOtherModels(VariationalContract):
    """Other irreps, layers and heads than those of the contract."""

    @pytest.fixture(
        scope="class",
        params=[
            # several heads, and blocks that no other kind has
            kind if kind == "nonlinear" else pytest.param(kind, marks=pytest.mark.full)
            for kind in sorted(set(KINDS) - {"vectors", "attention"})
        ],
    )
    @classmethod
    def native(cls, request: pytest.FixtureRequest) -> Backbone:
        heads = KINDS[request.param].get("heads")
        return load(request.param, head=heads[1] if heads else None)

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls, native: Backbone) -> Backbone:
        return copy.deepcopy(native).double()

    def test_save_and_load_in_another_process(self):
        """Once is enough: TestMACE."""

    def test_step_zero(self, native, backbone, quartz, ethanol, boxed_atom):
        for atoms in (quartz, ethanol, boxed_atom):
            for model, e, f in ((native, 1e-5, 1e-4), (backbone, 1e-9, 1e-9)):
                stock = atoms.copy()
                stock.calc = model.stock_calculator()
                ours = evaluate(model, atoms)
                assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=e * len(atoms))
                close(ours.forces, torch.as_tensor(stock.get_forces(), dtype=ours.forces.dtype), f)
                if atoms.pbc.all():
                    stress = torch.as_tensor(stock.get_stress(), dtype=ours.stress.dtype)
                    close(ours.stress[0], stress, e)

    def test_config_round_trip(self, native, backbone, quartz):
        twin = MACEBackbone.from_config(json.loads(json.dumps(native.config())))
        twin.load_state_dict(native.state_dict())
        assert twin.dtype == native.dtype
        assert twin.head == native.head
        same(evaluate(twin.double(), quartz), evaluate(backbone, quartz), 1e-12)

    def test_every_path_weight_is_converted(self, native):
        table = plan(native, train="all", noise="all").table
        left = {row.name: row.reason for row in table if row.action == "left"}
        allowed = ("density's normalisation", "LayerNorm", "vanish by symmetry")
        assert all(any(word in why for word in allowed) for why in left.values()), left
        kinds = {row.type for row in table if row.noisy}
        assert {"Contraction", "Linear"} <= kinds

    def test_the_scalar_preset_is_scalar(self, native):
        local = {"family": "weight", "mode": "local", "prior_scale": 0.1}
        model = ModelConfig(adapter="mace", checkpoint="-", noise="scalar")
        BayesianPotential(copy.deepcopy(native), model, PosteriorConfig(**local))  # refuses other paths
        with pytest.raises(ConversionError, match="scalar paths only"):
            BayesianPotential(
                copy.deepcopy(native),
                ModelConfig(adapter="mace", checkpoint="-", noise="all"),
                PosteriorConfig(**local),
            )

    def test_features_are_invariant(self, backbone, quartz):
        other, _ = turned(quartz, 6)
        before = evaluate(backbone, quartz).node_features
        close(evaluate(backbone, other).node_features, before, 1e-8 * before.abs().max().item())


def test_the_attention_block(quartz: Atoms) -> None:
    backbone = copy.deepcopy(load("attention")).double()
    stock = quartz.copy()
    stock.calc = backbone.stock_calculator()
    ours = evaluate(backbone, quartz)
    close(ours.forces, torch.as_tensor(stock.get_forces()), 1e-9)
    assert all(row.action == "converted" for row in plan(backbone).table)


# ---- heads -------------------------------------------------------------------------------------


def test_heads_differ_and_a_wrong_or_missing_one_lists_the_valid_ones(quartz: Atoms) -> None:
    pbe, scan = (evaluate(load("heads", head=h), quartz).energy.item() for h in ("pbe", "r2scan"))
    assert abs(pbe - scan) > 0.1
    for head in ("scan", None):
        with pytest.raises(RecipeError, match="pbe, r2scan") as caught:
            load("heads", head=head)
        assert caught.value.field == "model.options.head"
    assert load("vectors", head="Default").head == "Default"


# ---- totals of all-electron calculations --------------------------------------------------------


def test_large_references_keep_their_digits(quartz: Atoms, tmp_path: Path) -> None:
    """In float32 the vendor's total of 9 atoms at -2000 eV is off by meV; ours is not."""
    model = copy.deepcopy(load("vectors"))
    table = model.model.atomic_energies_fn.atomic_energies
    table -= 2000.0
    exact = evaluate(copy.deepcopy(model).double(), quartz).energy.item()
    assert evaluate(model, quartz).energy.item() == pytest.approx(exact, abs=1e-5 * len(quartz))


# ---- names and downloads -----------------------------------------------------------------------


def test_a_download_that_fails_says_how_to_fetch_by_hand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mace.calculators.foundations_models._urlretrieve_with_timeout", _refuse)
    with pytest.raises(CheckpointError, match=r"by hand") as caught:
        MACEBackbone.load("small")
    assert "https://" in str(caught.value)
    assert str(tmp_path / "mace" / "20231210mace128L0_energy_epoch249model") in str(caught.value)


def _refuse(*_args: object, **_options: object) -> None:
    raise urllib.error.URLError("no route")


def test_a_name_is_downloaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quartz: Atoms) -> None:
    calls = []

    def fetch(url: str, target: str, **_options: object) -> tuple[str, str]:
        calls.append(url)
        shutil.copy(path_of("vectors"), target)
        return target, ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("mace.calculators.foundations_models._urlretrieve_with_timeout", fetch)
    for _ in range(2):
        model = MACEBackbone.load("mpa-0")
    assert calls == [vendor.names()["medium-mpa-0"]]
    assert model.origin["checkpoint"] == "mpa-0"
    same(evaluate(model, quartz), evaluate(load("vectors"), quartz), 1e-6)


# ---- trust -------------------------------------------------------------------------------------


def test_an_unpublished_file_needs_trust() -> None:
    with pytest.raises(CheckpointError, match="--trust") as caught:
        MACEBackbone.load(str(path_of("plain")))
    assert files.sha256(path_of("plain")) in str(caught.value)


def test_the_shipped_list_names_the_published_models() -> None:
    listed = json.loads((Path(files.__file__).parents[1] / "releases.json").read_text())
    assert all(len(digest) == 64 and int(digest, 16) for digest in listed)
    assert sum(name.startswith("MACE-") for name in listed.values()) == 19


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        (None, "refused"),
        # the user's own choice is respected
        pytest.param("1", "opened", marks=pytest.mark.full),
    ],
)
def test_safe_loading_stays_on_for_the_process(tmp_path: Path, expected: str | None, answer: str) -> None:
    code = f"""
import os, pickle, sys, torch
from pathlib import Path
from typing import Any
from blip_ft.adapters.mace.backbone import MACEBackbone
file, out = sys.argv[1:]
model = MACEBackbone.load(file, trust=True)
model.stock_calculator()
model.write_native(Path(out), {{}})
model.open_native(Path(out))
assert "mace" in sys.modules and os.environ.get({SWITCH!r}) == os.environ.get("EXPECTED"), os.environ
try:
    torch.load(file)
except pickle.UnpicklingError:
    print("refused")
else:
    print("opened")
"""
    environment = {k: v for k, v in os.environ.items() if k not in (SWITCH, "EXPECTED")}
    if expected is not None:
        environment |= {SWITCH: expected, "EXPECTED": expected}
    done = _run(code, str(path_of("plain")), str(tmp_path / "out.model"), env=environment)
    assert done.split()[-1] == answer


BESIDE = """
import pickle, sys, torch
from blip_ft.adapters.mace.backbone import MACEBackbone
from ase.build import bulk
file = sys.argv[1]
ours = MACEBackbone.load(file, trust=True)
from mace.calculators import MACECalculator, mace_mp
atoms = bulk("Si")
for calculator in (
    MACECalculator(model_paths=file, device="cpu", default_dtype="float64"),
    mace_mp(model=file, device="cpu", default_dtype="float64"),
):
    atoms.calc = calculator
    print(atoms.get_potential_energy())
print(ours.double()(ours.batch([atoms])).energy.item())
try:
    torch.load(file)
except pickle.UnpicklingError:
    print("refused")
"""


def test_the_vendors_calculators_open_files_beside_this_package() -> None:
    """They expect safe loading to be off in the process, where it stays on."""
    environment = {k: v for k, v in os.environ.items() if k != SWITCH}
    *energies, last = _run(BESIDE, str(path_of("plain")), env=environment).splitlines()[-4:]
    assert last == "refused"
    assert float(energies[0]) == float(energies[1]) == pytest.approx(float(energies[2]), abs=1e-9)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class", "PolarMACE"),
        ("interaction_cls", "OrderedDict"),
        ("interaction_cls_first", "LinearReadoutBlock"),
        ("readout_cls", "LinearDipoleReadoutBlock"),
        ("gate", "relu"),
        ("dtype", "int64"),
        ("cueq_config", {"enabled": True}),
    ],
)
def test_an_architecture_names_what_is_listed_only(key: str, value: Any) -> None:
    config = load("vectors").config()
    config["architecture"][key] = value
    named = key if key == "cueq_config" else value
    with pytest.raises(CheckpointError, match=f"names '{named}', which is none of"):
        MACEBackbone.from_config(config)


def test_a_listed_name_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is compared with what is meant before it is called."""
    called = []

    def other(**arguments: Any) -> None:
        called.append(arguments)

    config = load("vectors").config()
    monkeypatch.setattr("mace.modules.ScaleShiftMACE", other)
    with pytest.raises(CheckpointError, match=r"'ScaleShiftMACE', which here is .*other"):
        MACEBackbone.from_config(config)
    assert not called


def _run(code: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.nn.Linear(2, 2), "not a MACE model file"),
        ({"model": {}, "optimizer": {}}, "not a MACE model file"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.model")
    with pytest.raises(CheckpointError, match=message):
        MACEBackbone.load(str(tmp_path / "other.model"), trust=True)


def test_a_model_that_wants_charge_and_spin_says_so(tmp_path: Path) -> None:
    kinds = {
        name: {"type": "categorical", "per": "graph", "num_classes": 5, "emb_dim": 4}
        for name in ("total_charge", "total_spin")
    }
    model = vendor.build({**architecture("vectors"), "embedding_specs": kinds}, stock=True)
    torch.save(model, tmp_path / "omol.model")
    with pytest.raises(CheckpointError, match="wants total_charge and total_spin") as caught:
        MACEBackbone.load(str(tmp_path / "omol.model"), trust=True)
    assert "without such inputs" in caught.value.remedy


def test_a_model_that_would_be_rebuilt_with_other_numbers_is_refused(tmp_path: Path) -> None:
    model = torch.load(path_of("vectors"), weights_only=False)
    model.interactions[1].avg_num_neighbors = 3.0  # not in the state dict
    torch.save(model, tmp_path / "odd.model")
    with pytest.raises(CheckpointError, match="rebuilds another potential"):
        MACEBackbone.load(str(tmp_path / "odd.model"), trust=True)


# ---- export ------------------------------------------------------------------------------------

OPEN = """
import json, sys
sys.modules["blip_ft"] = None  # as where it is not installed
from ase.io import read
from mace.calculators import MACECalculator
structure, mean, *draws = sys.argv[1:]
for files in ([mean], draws):
    atoms = read(structure)
    atoms.calc = MACECalculator(files, device="cpu", default_dtype="float64")
    answer = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces().tolist()}
    print(json.dumps(answer | {"var": float(atoms.calc.results.get("energy_var", 0.0))}))
"""


def test_the_vendors_calculator_opens_mean_and_committee_without_this_package(
    quartz: Atoms, tmp_path: Path
) -> None:
    potential = bayesian(copy.deepcopy(load("heads", head="r2scan")).double())
    potential.references = {8: -100.25, 14: 3.5}
    export_native(potential, tmp_path / "out", draws=2)
    quartz.write(tmp_path / "quartz.json")
    files = [str(tmp_path / f"out/{name}.model") for name in ("mean", "draw-00", "draw-01")]
    printed = _run(OPEN, str(tmp_path / "quartz.json"), *files).splitlines()  # no head is named
    mean, committee = (json.loads(line) for line in printed[-2:])
    (point,) = predict_atoms(potential, [quartz], n_draws=0)
    (drawn,) = predict_atoms(potential, [quartz], n_draws=2)
    assert mean["energy"] == pytest.approx(point["energy"], abs=1e-8)
    np.testing.assert_allclose(mean["forces"], point["forces"], rtol=0, atol=1e-8)
    assert committee["energy"] == pytest.approx(drawn["energy"], abs=1e-8)
    np.testing.assert_allclose(committee["forces"], drawn["forces"], rtol=0, atol=1e-8)
    assert committee["var"] ** 0.5 == pytest.approx(drawn["energy_std"], rel=1e-6)


def test_references_are_in_the_file_for_the_head_in_use(quartz: Atoms, tmp_path: Path) -> None:
    """The vendor's own fine-tuning puts the foundation's references back where shapes match."""
    backbone = copy.deepcopy(load("heads", head="r2scan")).double()
    potential = bayesian(backbone)
    potential.references = {8: -100.25, 14: 3.5}
    export_native(potential, tmp_path / "out")
    meta = json.loads((tmp_path / "out/export.json").read_text())
    assert meta["for"] == {"head": "r2scan"}
    assert meta["notes"] == ["The files are for head=r2scan: MACECalculator('mean.model', head='r2scan')."]
    file = torch.load(tmp_path / "out/mean.model", weights_only=False)
    before = backbone.model.atomic_energies_fn.atomic_energies
    assert file.heads == ["r2scan"]
    moved = file.atomic_energies_fn.atomic_energies - before[1:]
    shift = torch.tensor([[potential.references.get(z, 0.0) for z in ELEMENTS]])
    torch.testing.assert_close(moved, shift.double())
    for number in (8, 14):
        atom = Atoms([number], positions=[(0, 0, 0)])
        stock, shifted = atom.copy(), atom.copy()
        stock.calc = member(potential, None).stock_calculator()
        shifted.calc = backbone.open_native(tmp_path / "out/mean.model")
        gain = shifted.get_potential_energy() - stock.get_potential_energy()
        assert gain == pytest.approx(potential.references[number], abs=1e-9)


@pytest.mark.parametrize(("kind", "default", "dtype"), [("heads", 0, "float64"), ("nonlinear", 1, "float32")])
def test_a_file_has_the_head_in_use_alone(
    kind: str, default: int, dtype: str, quartz: Atoms, tmp_path: Path
) -> None:
    """Also where another head has the name that the vendor's calculator takes by itself."""
    vendor.import_mace()
    from mace.calculators import MACECalculator

    whole = load(kind, head=KINDS[kind]["heads"][0])
    for used in (0, 1):
        names = ["other", "other"]
        names[default], names[1 - default] = "Default", "r2scan"
        backbone = MACEBackbone(copy.deepcopy(whole.architecture) | {"heads": names}, head=names[used])
        backbone.model.load_state_dict(whole.model.state_dict())
        backbone = backbone.double() if dtype == "float64" else backbone.float()
        expected = evaluate(copy.deepcopy(backbone).double(), quartz)
        backbone.write_native(tmp_path / "one.model", {8: 2.0})
        atoms = quartz.copy()
        atoms.calc = MACECalculator(
            model_paths=str(tmp_path / "one.model"), device="cpu", default_dtype="float64"
        )
        shift = 2.0 * int((quartz.numbers == 8).sum())
        off = 1e-5 if dtype == "float32" else 1e-9
        assert atoms.get_potential_energy() == pytest.approx(expected.energy.item() + shift, abs=off)
        np.testing.assert_allclose(atoms.get_forces(), expected.forces.detach().numpy(), atol=off)
        again = MACEBackbone.load(str(tmp_path / "one.model"), trust=True)
        assert again.heads == [names[used]]


def test_heads_that_the_vendor_cannot_part_stay_together(
    quartz: Atoms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vendor's function is compared with the model: what it gets wrong is not written."""
    from mace.tools import scripts_utils

    part = scripts_utils.remove_pt_head

    def wrong(model: torch.nn.Module, head: str) -> torch.nn.Module:
        single = part(model, head)
        with torch.no_grad():
            single.scale_shift.scale *= 1.01  # type: ignore[union-attr, operator]
        return single

    monkeypatch.setattr(scripts_utils, "remove_pt_head", wrong)
    backbone = copy.deepcopy(load("heads", head="r2scan")).double()
    backbone.write_native(tmp_path / "both.model", {})
    atoms = quartz.copy()
    atoms.calc = backbone.open_native(tmp_path / "both.model")
    assert atoms.get_potential_energy() == pytest.approx(evaluate(backbone, quartz).energy.item(), abs=1e-9)


def test_a_file_with_the_foundations_references_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    potential = bayesian(copy.deepcopy(load("vectors")).double())
    write = MACEBackbone.write_native
    monkeypatch.setattr(MACEBackbone, "write_native", lambda self, path, shift: write(self, path, {}))
    with pytest.raises(SanityCheckError, match="other numbers"):
        export_native(potential, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_the_vendors_lammps_converter_takes_the_file(quartz: Atoms, tmp_path: Path) -> None:
    model = copy.deepcopy(load("density")).double()
    potential = bayesian(model)
    export_native(potential, tmp_path / "out")
    file = tmp_path / "out/mean.model"
    command = [sys.executable, "-m", "mace.cli.create_lammps_model", str(file), "--dtype", "float64"]
    subprocess.run(command, check=True, capture_output=True)
    converted = torch.jit.load(f"{file}-lammps.pt")
    batch = model.batch([quartz])
    element = model._index[batch.numbers]
    edge_vec = batch.graph["edge_vec"]
    data = vendor.inputs(element, len(ELEMENTS), batch.graph["edge_index"], edge_vec, batch.n_atoms, 0)
    out = converted(data, torch.ones(len(quartz), dtype=torch.float64))
    (point,) = predict_atoms(potential, [quartz], n_draws=0)
    assert out["total_energy_local"].item() == pytest.approx(point["energy"], abs=1e-8)
