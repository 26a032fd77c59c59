"""Every shipped recipe through the real entry point: real weights, real frames, few of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from ase.io import read, write

from blip_ft.cli import main
from blip_ft.config import load_recipe, shipped
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.sources import load_source
from blip_ft.errors import RecipeError
from blip_ft.families.registry import options_class

MODELS = ("pretrained", "plain", "blip")
KEYS = (
    "energy_mae_mev_per_atom",
    "force_mae_mev_per_ang",
    "force_crps_mev_per_ang",
    "coverage90",
    "n_structures",
)
#: small trained models in vendors' formats (benchmarks/distil)
STAND_INS = Path(__file__).parents[1] / "models"
#: parts of the embedded set that are test sets, by the name they get
TESTS = {"seen": "test", "tridymite": "tridymite"}
#: as small as a run can be and still take every step of a real one
SMALL = [
    "posterior.rank=6",
    "posterior.projections=1",
    "posterior.perturbed_share=0.1",
    "posterior.mean_steps=1",
    "posterior.start=0.5",
    "uncertainty.n_draws=2",
    "uncertainty.calibration_draws=2",
    "uncertainty.linearity_frames=1",
    "uncertainty.linearity_draws=2",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=2",
]


def few(folder: Path, **frames: int) -> list[str]:
    """Overrides for some frames of each part of the embedded set, taken evenly."""
    files = {}
    for role, n in frames.items():
        rows = load_source(f"sio2_polymorphs@{role}")
        files[role] = folder / f"{role}.extxyz"
        write(files[role], [to_atoms(rows[i * len(rows) // n]) for i in range(n)])
    tests = ", ".join(f"{name}: {files.pop(role)}" for name, role in TESTS.items() if role in files)
    return [f"data.{role}={file}" for role, file in files.items()] + [f"data.test={{{tests}}}"]


def run(recipe: str, folder: Path, *more: str) -> None:
    sets = few(folder, train=16, validation=4, calibration=4, test=4, tridymite=4)
    overrides = [f"output={folder}", "name=small", *SMALL, *sets, *more]
    assert main(["fit", recipe, *overrides]) == 0
    metrics = json.loads((folder / "small/metrics.json").read_text())
    for model in MODELS:
        for group in ("seen", "unseen", "all", "tridymite"):
            for key in KEYS:
                assert math.isfinite(metrics[model][group][key]), (model, group, key)
    # a few steps are enough to learn something
    assert (
        metrics["blip"]["seen"]["force_mae_mev_per_ang"]
        < metrics["pretrained"]["seen"]["force_mae_mev_per_ang"]
    )
    receipt = json.loads((folder / "small/receipt.json").read_text())
    assert receipt["base"]["sha256"]
    assert receipt["references"]["rank"] == 1
    assert [r["final"] for r in receipt["posterior"]][-1:] == [True]
    assert receipt["step_zero"]["n_frames"] >= 7  # one of every set at least
    assert "converted" in {r["action"] for r in receipt["conversion"]["modules"]}
    assert all(r["reason"] for r in receipt["conversion"]["modules"] if r["action"] == "left")


def predict(folder: Path) -> None:
    """The trained model on new structures, through a file."""
    frames = read(Path(__file__).parent / "quartz.extxyz", ":")
    turned = frames[0].copy()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    source, target = folder / "in.extxyz", folder / "out.extxyz"
    write(source, [frames[0], turned])
    assert main(["predict", str(folder / "small"), str(source), "-o", str(target)]) == 0
    a, b = read(target, ":")
    assert a.info["energy_std"] == pytest.approx(b.info["energy_std"], rel=1e-4)
    assert a.arrays["forces_std_norm"] == pytest.approx(b.arrays["forces_std_norm"], rel=1e-4)
    assert a.get_potential_energy() == pytest.approx(b.get_potential_energy(), abs=1e-5)
    assert a.info["stress_std"].shape == (6,)


def simulate(folder: Path) -> None:
    """The guard lets a crystal be that even this small model knows, and not one at 4000 K."""
    frame = load_source("sio2_polymorphs@train")[0]
    write(folder / "start.extxyz", to_atoms(frame), write_results=False)
    command = ["md", str(folder / "small"), str(folder / "start.extxyz"), "--thin-cell", "--every", "10"]
    for temperature, steps, saved in (("300", "60", False), ("4000", "200", True)):
        target = folder / f"{temperature}.extxyz"
        options = ["-o", str(target), "--temperature", temperature, "--steps", steps]
        assert main([*command, *options]) in ((0, 3) if saved else (0,))
        assert (folder / f"{temperature}.saved.extxyz").exists() == saved


#: for a user's own system, with the settings of a recipe that is tested here
OWN = {
    "sevennet": "sio2_sevennet",
    "chgnet": "sio2_chgnet",
    "diep": "sio2_diep",
    "mace": "sio2_mace_mp",
    "orb": "sio2_orb",
    "uma": "sio2_uma",
}


def test_every_recipe_is_tested_here() -> None:
    ours = {n for n in shipped() if not n.endswith("_paper")} - OWN.keys()
    assert ours == set(OWN.values())
    assert set(shipped()) - ours - OWN.keys() == {
        "ammonia_paper",
        "silica_glass_paper",
    }  # test_paper_recipes.py


@pytest.mark.parametrize("name", OWN)
def test_recipes_for_a_users_system_have_the_tested_settings(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"fit {name} data.train="):
        load_recipe(name)
    own = load_recipe(name, ["data.train=sio2_polymorphs"])
    assert own.name == name
    assert not own.plain.enabled
    tested = load_recipe(OWN[name], [f"name={name}", "plain.enabled=false"])
    assert own == tested


@pytest.mark.backend("sevennet")
def test_sio2_sevennet(tmp_path: Path) -> None:
    run("sio2_sevennet", tmp_path)
    predict(tmp_path)
    simulate(tmp_path)


#: the other families on real weights: noise in the readout and the first radial layers, a few frames
FAMILIES = {
    "adaptive": [
        "posterior.family=adaptive",
        "posterior.prior_scale=0.05",
        "objective.temperature=1e-6",
        "optimizer.std_learning_rate=1e-3",
        "plain.enabled=false",
    ],
    "posthoc_laplace": ["posterior.family=posthoc_laplace", "plain.learning_rate=1e-3"],
}


@pytest.mark.full
@pytest.mark.backend("sevennet")
@pytest.mark.parametrize("family", FAMILIES)
def test_family_on_sevennet(family: str, tmp_path: Path) -> None:
    sets = few(tmp_path, train=10, validation=3, calibration=3, test=3)
    options = ["model.noise=[readout, '0_convolution.weight_nn.layer.*']", "trainer.max_epochs=1"]
    own = [f"posterior.{key}" for key in options_class(family).model_fields]
    small = [o for o in SMALL if not o.startswith("posterior.") or o.partition("=")[0] in own]
    overrides = [f"output={tmp_path}", "name=small", *small, *sets, *FAMILIES[family], *options]
    assert main(["fit", "sio2_sevennet", *overrides]) == 0
    metrics = json.loads((tmp_path / "small/metrics.json").read_text())
    for model in ("pretrained", "blip"):
        for key in KEYS:
            assert math.isfinite(metrics[model]["seen"][key]), (model, key)
    predict(tmp_path)


@pytest.mark.backend("chgnet")
def test_sio2_chgnet(tmp_path: Path) -> None:
    run("sio2_chgnet", tmp_path)
    predict(tmp_path)


@pytest.mark.backend("diep")
def test_sio2_diep(tmp_path: Path) -> None:
    run("sio2_diep", tmp_path)
    predict(tmp_path)
    assert main(["export", str(tmp_path / "small"), "--draws", "2"]) == 0
    assert len(list((tmp_path / "small/export-native").glob("draw-*.pt"))) == 2


@pytest.mark.backend("orb")
def test_sio2_orb(tmp_path: Path) -> None:
    """The distilled stand-in for the foundation: only the path differs. Rotations are learned, not exact."""
    run("sio2_orb", tmp_path, f"model.checkpoint={STAND_INS / 'sio2_orb.ckpt'}")
    source, target = Path(__file__).parent / "quartz.extxyz", tmp_path / "out.extxyz"
    assert main(["predict", str(tmp_path / "small"), str(source), "-o", str(target)]) == 0
    frame = read(target)
    assert frame.info["energy_std"] > 0
    assert (frame.arrays["forces_std_norm"] > 0).all()
    assert main(["export", str(tmp_path / "small"), "--draws", "2", "-o", str(tmp_path / "native")]) == 0
    assert {p.name for p in (tmp_path / "native").glob("*.ckpt")} == {
        "mean.ckpt",
        "draw-00.ckpt",
        "draw-01.ckpt",
    }


@pytest.mark.backend("mace")
def test_sio2_mace_mp(tmp_path: Path) -> None:
    """On a small model in place of the foundation: only the checkpoint's path differs."""
    run("sio2_mace_mp", tmp_path, f"model.checkpoint={STAND_INS / 'sio2_mace.model'}")
    predict(tmp_path)
    assert main(["export", str(tmp_path / "small"), "--draws", "2"]) == 0
    assert len(list((tmp_path / "small/export-native").glob("draw-*.model"))) == 2


@pytest.mark.backend("fairchem")
def test_sio2_uma(tmp_path: Path) -> None:
    run(
        "sio2_uma",
        tmp_path,
        f"model.checkpoint={STAND_INS / 'sio2_uma.pt'}",
        "trainer.max_epochs=4",
        "trainer.limit_train_batches=4",
    )
    predict(tmp_path)


@pytest.mark.parametrize("name", sorted(OWN.values()))
def test_recipes_do_not_look_at_test_frames(name: str) -> None:
    """The embedded set's own split decides; a recipe that names test frames elsewhere is a defect."""
    recipe = load_recipe(name)
    assert recipe.data.train == "sio2_polymorphs"
    assert recipe.data.validation is None
    assert recipe.plain.enabled
