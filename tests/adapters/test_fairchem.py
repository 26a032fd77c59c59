"""UMA and eSEN fulfil the contract, on tiny models in the vendor's format."""

from __future__ import annotations

import copy
import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from blip_ft.adapters.fairchem.backbone import FairchemBackbone, FairchemDirectBackbone
from blip_ft.backbones.protocol import Backbone
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.data.batch.dataset import collate, make_item
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.sources import load_source
from blip_ft.errors import BlipError, CheckpointError, DataError, RecipeError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.export import export_native
from blip_ft.testing.conservative import ConservativeContract
from blip_ft.testing.contract import AdapterContract
from blip_ft.testing.helpers import array, close, evaluate, evaluate_all, same
from blip_ft.testing.variational import VariationalContract
from blip_ft.testing.vendor import VendorContract
from blip_ft.training.sanity_checks import stock_predictions
from blip_ft.variational.convert import plan
from blip_ft.variational.noise import Noise

from . import tiny_uma

pytestmark = pytest.mark.backend("fairchem")


@functools.cache
def folder() -> Path:
    """Where tiny models lie; removed when the tests end."""
    keep = tempfile.TemporaryDirectory(prefix="tiny-uma-")
    _KEPT.append(keep)
    return Path(keep.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def uma() -> Path:
    return tiny_uma.uma(folder() / "uma.pt")


@functools.cache
def direct() -> Path:
    return tiny_uma.direct(folder() / "direct.pt")


class TestUMA(VendorContract, ConservativeContract, VariationalContract):
    package = "fairchem"
    suffix = ".pt"
    named = ("model", "backbone", "model")

    @classmethod
    def load(cls) -> Backbone:
        return FairchemBackbone.load(str(uma()), task="omat")

    @classmethod
    def file(cls) -> Path:
        return uma()

    @classmethod
    def reload(cls, path: Path, *, trust: bool = False) -> Backbone:
        return FairchemBackbone.load(str(path), trust=trust, task="omat")


class TestDirect(AdapterContract, VariationalContract):
    """Forces are predicted, not differentiated: what holds for derivatives does not apply."""

    @classmethod
    def load(cls) -> Backbone:
        return FairchemBackbone.load(str(direct()))

    @pytest.mark.full
    def test_save_and_load_in_another_process(self, potential, quartz, elsewhere):
        super().test_save_and_load_in_another_process(potential, quartz, elsewhere)


class TestDirectStress(AdapterContract):
    """A model with heads for energy, forces and stress."""

    @classmethod
    def load(cls) -> Backbone:
        return FairchemBackbone.load(str(tiny_uma.direct(folder() / "direct-stress.pt", stress=True)))

    @pytest.mark.parametrize("name", ["quartz", "periodic_atom", "ethanol"])
    def test_step_zero_in_float64(self, backbone, stock, structures, name):
        """The vendor assembles stress in float32 also where it computes in float64."""
        self._compare_with_stock(backbone, stock, structures[name], 1e-9, 1e-9, 1e-7)


def load(path: Path, **options: Any) -> Backbone:
    return FairchemBackbone.load(str(path), **({"task": "omat"} | options))


def compare(model: Backbone, atoms: Atoms) -> None:
    """With the vendor's calculator, in float64."""
    model = copy.deepcopy(model).double()
    stock = atoms.copy()
    stock.calc = model.stock_calculator()
    ours = evaluate(model, atoms)
    assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(array(ours.forces), stock.get_forces(), rtol=0, atol=1e-9)


# ---- direct heads ----------------------------------------------------------------------------


def test_direct_forces_are_the_heads_not_derivatives(quartz: Atoms) -> None:
    model = FairchemBackbone.load(str(direct())).double()
    assert isinstance(model, FairchemDirectBackbone)
    assert not model.conservative
    assert not model.has_stress
    prediction = model(model.batch([quartz]), create_graph=True)
    assert prediction.stress is None
    assert prediction.forces.sum(dim=0).abs().max() > 1e-3  # a derivative would sum to zero
    grads = torch.autograd.grad(
        prediction.forces.square().sum(), model.model.output_heads["forces"].parameters()
    )
    assert all(torch.isfinite(g).all() for g in grads)
    assert not model(model.batch([quartz])).forces.requires_grad
    with torch.no_grad():
        same(model(model.batch([quartz])), evaluate(model, quartz), 1e-12)
    report = plan(model, train="readout", noise="readout")
    assert {r.name for r in report.table if r.noisy} == {
        *(f"output_heads.energy.head.energy_block.{i}" for i in (0, 2, 4)),
        "output_heads.forces.head.linear",
    }


# ---- architectures ---------------------------------------------------------------------------

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "eSEN": {"num_experts": 0, "num_layers": 2},
    "lmax 1": {"lmax": 1, "mmax": 1},
    "lmax 3": {"lmax": 3, "mmax": 2},
    "lmax 6": {"lmax": 6, "mmax": 2, "num_experts": 0},
    "grid": {"ff_type": "grid"},
    "layer norm": {"norm_type": "layer_norm_sh"},
    "sine embedding": {"chg_spin_emb_type": "pos_emb"},
    "pnorm": {"moe_expert_coefficient_norm": "pnorm"},
    "experts everywhere": {"moe_type": "all"},
    "experts at m = 0": {"moe_type": "so2m0"},
    "experts shared": {"moe_single": True},
    "dropout": {"moe_dropout": 0.3, "composition_dropout": 0.3},
    "charge channels": {"charge_balanced_channels": [0, 1], "spin_balanced_channels": [2]},
    "few neighbours": {"max_neighbors": 20},
}


@pytest.mark.parametrize(
    "name", [n if n in ("eSEN", "grid") else pytest.param(n, marks=pytest.mark.full) for n in ARCHITECTURES]
)
def test_other_architectures(name: str, quartz: Atoms, tmp_path: Path) -> None:
    model = load(tiny_uma.uma(tmp_path / "model.pt", **ARCHITECTURES[name])).train()
    compare(model, quartz)
    left = [r for r in plan(model).table if r.action == "left"]
    assert all(r.reason for r in left)
    linear = {r.name for r in left if r.type in ("Linear", "MOLE", "SO3_Linear")}
    assert all(n.startswith("backbone.routing_mlp") for n in linear)


def test_an_embedding_that_the_vendor_feeds_float32(quartz: Atoms, tmp_path: Path) -> None:
    """The vendor's own model fails in float64 there; ours does not."""
    model = load(tiny_uma.uma(tmp_path / "model.pt", chg_spin_emb_type="lin_emb"))
    stock = quartz.copy()
    stock.calc = model.stock_calculator()
    assert evaluate(model, quartz).energy.item() == pytest.approx(stock.get_potential_energy(), abs=1e-4)
    assert evaluate(model.double(), quartz).energy.item() == pytest.approx(
        stock.get_potential_energy(), abs=1e-4
    )


# ---- tasks -----------------------------------------------------------------------------------


def test_tasks_are_levels_of_theory(quartz: Atoms) -> None:
    omat, omol = (load(uma(), task=name) for name in ("omat", "omol"))
    compare(omol, quartz)
    assert (evaluate(omat, quartz).energy - evaluate(omol, quartz).energy).abs() > 1e-2
    assert (omat.spin, omol.spin) == (0, 1)  # the vendor's defaults


@pytest.mark.parametrize("name", [None, "omatt", "pbe"])
def test_a_wrong_or_missing_task_lists_the_valid_ones(name: str | None) -> None:
    with pytest.raises(RecipeError, match="omat, omol") as caught:
        load(uma(), task=name)
    assert caught.value.field == "model.options.task"


def test_the_only_task_needs_no_name() -> None:
    assert FairchemBackbone.load(str(direct())).task == "omol"


def test_charge_and_spin(ethanol: Atoms) -> None:
    neutral, cation = load(uma(), task="omol"), load(uma(), task="omol", charge=1, spin=2)
    compare(cation, ethanol)
    assert (evaluate(neutral, ethanol).energy - evaluate(cation, ethanol).energy).abs() > 1e-3
    own = ethanol.copy()
    own.info = {"charge": 1.0, "spin": 2}
    close(evaluate(neutral, own).energy, evaluate(cation, ethanol).energy, 0)
    pair = [ethanol, own]
    together = neutral(neutral.batch(pair)).energy
    close(together[1:], evaluate(cation, ethanol).energy, 1e-5)
    own.info["charge"] = "positive"
    with pytest.raises(DataError, match="charge 'positive' is not a whole number"):
        neutral.graph(own)
    for options in ({"charge": 0.5}, {"charge": 101}, {"spin": -1}, {"charge": True}):
        with pytest.raises(RecipeError, match="whole number"):
            load(uma(), task="omol", **options)


@pytest.mark.parametrize("task", ["omat", "omol"])
def test_charge_and_spin_count_in_every_task(task: str, quartz: Atoms, tmp_path: Path) -> None:
    model = load(uma(), task=task).double()
    assert model.conditions == {"charge": 0.0, "spin": 0.0 if task == "omat" else 1.0}
    states = []
    for charge, spin in ((0, 1), (1, 2), (-2, 1)):
        states.append(quartz.copy())
        states[-1].info = {"charge": charge, "spin": spin}
        states[-1].calc = SinglePointCalculator(states[-1], energy=-1.0)
    ase.io.write(tmp_path / "a.xyz", states)
    rows = load_source(str(tmp_path / "a.xyz"))
    items = [make_item(row, model) for row in rows]
    found = model(collate(model, items)).energy.tolist()
    stock = [p["energy"] for p in stock_predictions(model.stock_calculator(), [i.atoms for i in items])]
    assert found == pytest.approx(stock, abs=1e-9)
    assert np.ptp(found) > 1e-3
    with pytest.raises(DataError, match=r"b\.xyz, frame 7, field 'charge': .*not a whole number"):
        model.check(to_atoms(rows[0] | {"charge": 0.5}), file="b.xyz", frame=7)


def test_references_and_scales_are_the_vendors(tmp_path: Path, quartz: Atoms) -> None:
    """An offset and a scale that float32 cannot hold, and the references of both elements."""
    tasks = [
        tiny_uma.task_config("omat", "energy", rmsd=1.4, mean=-0.3),
        tiny_uma.task_config("omat", "forces", rmsd=1.4),
    ]
    path = tiny_uma.save(tmp_path / "model.pt", tiny_uma.uma_config(["omat"]), tasks)
    model = load(path)
    compare(model, quartz)
    plain = [{**t, "element_references": None} for t in tasks]
    other = load(tiny_uma.save(tmp_path / "plain.pt", tiny_uma.uma_config(["omat"]), plain))
    shift = 3 * tiny_uma.REFERENCES[14] + 6 * tiny_uma.REFERENCES[8]
    close(evaluate(model, quartz).energy - shift, evaluate(other, quartz).energy, 1e-9)


def test_forces_that_are_no_derivatives_are_refused(tmp_path: Path) -> None:
    tasks = [tiny_uma.task_config("omat", "energy"), tiny_uma.task_config("omat", "forces", rmsd=1.0)]
    path = tiny_uma.save(tmp_path / "model.pt", tiny_uma.uma_config(["omat"]), tasks)
    with pytest.raises(CheckpointError, match="no derivatives"):
        load(path)


def test_a_head_of_another_task_stays_out(tmp_path: Path, quartz: Atoms) -> None:
    """Plain heads with prefixes. (With two of them the vendor's own calculator fails in autograd.)"""
    names = ["omat", "omol"]
    config = tiny_uma.uma_config(names)
    kind = f"{tiny_uma.UMA}.escn_md.MLP_EFS_Head"
    config["heads"] = {d: {"module": kind, "prefix": d} for d in names}
    path = tiny_uma.save(tmp_path / "model.pt", config, tiny_uma.task_configs(names))
    energies = [evaluate(load(path, task=d), quartz).energy for d in names]
    assert (energies[0] - energies[1]).abs() > 1e-3
    model = load(path)
    rows = {r.name: r for r in plan(model).table}
    assert rows["output_heads.omat.energy_block.0"].action == "converted"
    assert "does not use" in rows["output_heads.omol.energy_block.0"].reason


# ---- files -----------------------------------------------------------------------------------


def content(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def test_the_averaged_weights_are_used(quartz: Atoms, tmp_path: Path) -> None:
    plain = content(uma())
    assert any(
        not torch.equal(v, plain.ema_state_dict[f"module.{k}"]) for k, v in plain.model_state_dict.items()
    )
    compare(load(uma()), quartz)


def test_omegaconf_containers_need_no_trust(quartz: Atoms, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    checkpoint = content(uma())
    checkpoint.model_config = OmegaConf.create(checkpoint.model_config)
    checkpoint.tasks_config = OmegaConf.create(checkpoint.tasks_config)
    torch.save(checkpoint, tmp_path / "conf.pt")
    same(evaluate(load(tmp_path / "conf.pt"), quartz), evaluate(load(uma()), quartz), 0)


def _set(name: str, value: Any) -> Any:
    def change(checkpoint: Any) -> None:
        config = checkpoint.model_config
        *parents, last = name.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("backbone.model", "subprocess.Popen"), "names 'subprocess.Popen'"),
        (_set("backbone.extra", {"_target_": "os.system", "_args_": ["true"]}), "names 'os.system'"),
        (_set("heads.energyandforcehead.head_cls", "builtins.exec"), "names 'builtins.exec'"),
        (_set("_target_", "fairchem.core.common.utils.load_model_and_weights_from_checkpoint"), "names"),
        (_set("_target_", "eval"), "names 'eval'"),
        (_set("_target_", "fairchem.core.models.base.HydraModelV2"), "names"),
        (_set("backbone.extra", {"_target_": "torch.nn.Identity"}), r"names 'torch\.nn\.Identity'"),
        (_set("backbone.extra", {"_target_": f"{tiny_uma.UMA}.escn_md.GradRegressConfig"}), "names"),
        (_set("backbone.extra", {"_target_": ["builtins.dict"]}), "names"),
        (_set("heads.energyandforcehead.head_cls", "HeadInterface"), "names 'HeadInterface'"),
        (_set("backbone.model", f"{tiny_uma.UMA}.escn_md.MLP_EFS_Head"), "names"),
        (_set("backbone.extra", "${backbone.model}"), "refers to values elsewhere"),
        (_set("backbone.model", "fairchem.core.models.allscaip.AllScAIP.AllScAIPBackbone"), "UMA or eSEN"),
        (_set("backbone.model", "no_such_name"), "UMA or eSEN"),
        (_set("backbone.colour", "red"), "cannot build"),
        (_set("backbone.num_distance_basis", 8), "do not fit"),
        (_set("model_id", None), "UMA 1.0"),
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_foreign_classes_and_broken_configurations(tmp_path, change, message, trust):
    checkpoint = content(uma())
    change(checkpoint)
    path = tmp_path / "bad.pt"
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=message):
        load(path, trust=trust)


def test_a_model_folder_names_no_foreign_class(tmp_path: Path) -> None:
    """Our own format is JSON, in which a class name would be as good as code."""
    config = load(uma()).config()
    config["tasks"][0]["loss_fn"] = {"_target_": "os.system", "_args_": [f"touch {tmp_path}/x"]}
    with pytest.raises(CheckpointError, match=r"os\.system"):
        FairchemBackbone.from_config(config)
    assert not (tmp_path / "x").exists()


def test_a_listed_name_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is compared with what is meant before it is called."""
    from fairchem.core.models.uma import escn_md

    called = []

    class Other:
        def __init__(self, *args: Any, **options: Any) -> None:
            called.append(args)

    config = load(uma()).config()
    monkeypatch.setattr(escn_md, "MLP_EFS_Head", Other)
    with pytest.raises(CheckpointError, match=r"MLP_EFS_Head', which here is .*Other"):
        FairchemBackbone.from_config(config)
    assert not called


def test_computed_values_need_no_trust_and_are_refused(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    checkpoint = content(uma())
    config = {**checkpoint.model_config, "channels": "${oc.env:HOME}"}
    checkpoint.model_config = OmegaConf.create(config)
    torch.save(checkpoint, tmp_path / "computed.pt")
    with pytest.raises(CheckpointError, match="not an inference checkpoint"):
        load(tmp_path / "computed.pt")


def test_a_download_that_fails_says_how_to_fetch_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from fairchem.core.calculate import pretrained_mlip

    def refuse(**_kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(pretrained_mlip, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=r"by hand") as caught:
        FairchemBackbone.load("uma-s-1p1", task="omat")
    for part in ("https://huggingface.co/facebook/UMA", "checkpoints/uma-s-1p1.pt", "hf auth login", "cache"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="did you mean 'uma-s-1p1'"):
        FairchemBackbone.load("uma-s-1p11", task="omat")


# ---- behaviour -------------------------------------------------------------------------------


def test_a_free_atom_that_the_vendor_looks_up(tmp_path: Path, boxed_atom: Atoms) -> None:
    config = tiny_uma.uma_config(["omat"]) | {"supports_single_atoms": False}
    model = load(tiny_uma.save(tmp_path / "m.pt", config, tiny_uma.task_configs(["omat"])))
    with pytest.raises(DataError, match="free atom"):
        model.graph(Atoms("O"))
    compare(model, boxed_atom)


def test_random_generators_are_left_alone(quartz: Atoms) -> None:
    """The vendor's loader seeds Python, NumPy and torch, and its model draws a random angle per edge."""
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    model = load(uma())
    stock = quartz.copy()
    stock.calc = model.stock_calculator()
    stock.get_potential_energy()
    evaluate(model, quartz)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_same_input_gives_the_same_bits(quartz: Atoms) -> None:
    model = load(uma())
    same(evaluate(model, quartz), evaluate(model, quartz), 0)


def test_the_stock_calculator_leaves_structures_alone(ethanol: Atoms, quartz: Atoms) -> None:
    calculator = load(uma()).stock_calculator()
    atoms = quartz.copy()
    atoms.calc = calculator
    atoms.get_forces()
    assert atoms.info == {}
    assert not calculator.check_state(atoms)  # a second property costs nothing


# ---- export ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uma", "direct", pytest.param("float64", marks=pytest.mark.full)])
def test_export(tmp_path: Path, quartz: Atoms, kind: str) -> None:
    """Mean and draws open in the vendor's program, with its own settings, and are what we predict."""
    from fairchem.core import FAIRChemCalculator, pretrained_mlip

    task = "omol" if kind == "direct" else "omat"
    model = load(direct() if kind == "direct" else uma(), task=task)
    if kind == "float64":
        model = model.double()
    potential = BayesianPotential(
        model,
        ModelConfig(adapter="fairchem", checkpoint="x"),
        PosteriorConfig(family="weight", prior_scale=0.3, init_std=0.05),
        n_draws=2,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, delta in potential.converted.deltas.items():
            rms = potential.prior.rms(name)
            delta.add_(0.1 * rms * torch.randn(delta.shape, generator=generator, dtype=delta.dtype))
    potential.references = {8: -321.5, 14: 4.25}
    done = export_native(potential, tmp_path / "out", draws=2)
    assert [e.file for e in done] == ["mean.pt", "draw-00.pt", "draw-01.pt"]
    meta = json.loads((tmp_path / "out/export.json").read_text())
    assert meta["for"] == {"task": task, "charge": model.charge, "spin": model.spin}
    assert f"task={task}" in meta["notes"][0]
    values = []
    for item in done:
        unit = pretrained_mlip.load_predict_unit(tmp_path / "out" / item.file, "batch", device="cpu")
        atoms = quartz.copy()
        atoms.calc = FAIRChemCalculator(unit, task_name=task)
        values.append(atoms.get_potential_energy())
    batch = model.batch([quartz])
    expected = [potential(batch).energy.item()]
    expected += [potential(batch, Noise("draw", draw=k)).energy.item() for k in (0, 1)]
    assert values == pytest.approx(expected, abs=2e-4)
    assert abs(values[1] - values[2]) > 1e-2
    again = FairchemBackbone.load(str(tmp_path / "out" / "mean.pt"), task=task)
    assert evaluate(again, quartz).energy.item() == pytest.approx(expected[0], abs=2e-4)


def test_an_export_cannot_hold_an_unknown_element(tmp_path: Path) -> None:
    with pytest.raises(BlipError, match="no element 118"):
        load(uma()).write_native(tmp_path / "m.pt", {118: 1.0})


# ---- the stand-in ----------------------------------------------------------------------------


@pytest.mark.backend("sevennet")
def test_the_small_trained_model_is_what_its_description_says() -> None:
    """Opened without trust, and as close to its teacher as is written beside it."""
    from blip_ft.adapters.sevennet.backbone import SevenNetBackbone

    file = Path(__file__).parents[1] / "models" / "sio2_uma.pt"
    about = json.loads(file.with_suffix(".json").read_text())
    model, teacher = load(file), SevenNetBackbone.load("7net-0")
    assert model.origin["sha256"] == about["sha256"]
    assert file.stat().st_size == about["bytes"] < 3_000_000
    frames = [to_atoms(row, labels=False) for row in load_source("sio2_polymorphs@tridymite")][:6]
    error = (evaluate_all(model, frames).forces - evaluate_all(teacher, frames).forces).abs().mean().item()
    expected = about["error_against_teacher"]["polymorphs_tridymite"]["force_mae_mev_per_ang"]
    assert 1000 * error == pytest.approx(expected, rel=0.5)
