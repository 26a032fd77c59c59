"""Recipes for the published sets, on small files of the same form: extended XYZ in kcal/mol."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from blip_ft.cli import main
from blip_ft.config import load_recipe
from blip_ft.data.read.sources import load_source

KCAL = units.kcal / units.mol
SMALL = [
    "posterior.rank=3",
    "posterior.projections=1",
    "posterior.perturbed_share=0.1",
    "uncertainty.n_draws=2",
    "uncertainty.calibration_draws=2",
    "uncertainty.linearity_frames=1",
    "uncertainty.linearity_draws=2",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=1",
]


def write_set(
    path: Path,
    prototype: Atoms,
    calculator: object,
    n: int,
    *,
    offset: float = 0.0,
    unread: range = range(0),
) -> None:
    """Rattled copies with a vendor's energies and forces, slightly changed, as the published files hold them.

    Frames ``unread`` get no labels, which the checks would refuse if the recipe took them.
    """
    rng = np.random.default_rng(len(path.name))
    out = []
    for i in range(n):
        atoms = prototype.copy()
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        if i in unread:
            out.append(atoms)
            continue
        atoms.calc = calculator
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = SinglePointCalculator(
            atoms, energy=1.02 * energy / KCAL + offset, forces=1.02 * forces / KCAL
        )
        out.append(atoms)
    write(path, out, format="extxyz")


def check(folder: Path, groups: set[str]) -> dict:
    metrics = json.loads((folder / "runs/small/metrics.json").read_text())
    for model in ("pretrained", "plain", "blip"):
        assert groups <= set(metrics[model])
        for group in groups:
            assert math.isfinite(metrics[model][group]["force_mae_mev_per_ang"])
    return metrics


def test_an_offset_is_taken_off_in_the_unit_of_the_source(tmp_path: Path) -> None:
    atoms = Atoms("O2", positions=[(0, 0, 0), (1.2, 0, 0)])
    atoms.calc = SinglePointCalculator(atoms, energy=1000.0 + 23.0, forces=np.zeros((2, 3)))
    write(tmp_path / "a.xyz", atoms, format="extxyz")
    spec = str(tmp_path / "a.xyz")
    (row,) = load_source(spec, units={"energy": "kcal/mol"}, energy_offset=1000.0)
    assert row["energy"] == pytest.approx(23.0 * KCAL, abs=1e-9)
    (row,) = load_source(spec, units={"energy": "kcal/mol"})  # not the same entry of the cache
    assert row["energy"] == pytest.approx(1023.0 * KCAL, abs=1e-9)


def test_the_published_division_and_offset() -> None:
    ammonia, silica = load_recipe("ammonia_paper").data, load_recipe("silica_glass_paper").data
    assert ammonia.train == "ammonia_train.xyz@:64"
    assert ammonia.test == {"seen": "ammonia_train.xyz@66::3", "far": "ammonia_test.xyz"}
    assert silica.train == "silica_train.xyz@:32"
    assert silica.energy_offset == pytest.approx(125667.97, abs=0.01)
    assert silica.energy_offset * KCAL == pytest.approx(5449.5, abs=0.1)  # eV


def test_absent_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "ammonia_paper", "model.adapter=fake", "model.checkpoint=tiny"]) == 2
    assert "ammonia_train.xyz" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.backend("sevennet")
def test_ammonia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blip_ft.adapters.sevennet.backbone import SevenNetBackbone

    calculator = SevenNetBackbone.load("7net-0").stock_calculator()
    write_set(tmp_path / "ammonia_train.xyz", molecule("NH3"), calculator, 73)
    write_set(tmp_path / "ammonia_test.xyz", molecule("NH3"), calculator, 4)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "ammonia_paper", "name=small", "model.noise=readout", *SMALL]) == 0
    metrics = check(tmp_path, {"seen", "far"})
    # labels are 1.02 times the model's: in other units they would not be
    assert metrics["pretrained"]["seen"]["force_mae_mev_per_ang"] < 100


@pytest.mark.full
@pytest.mark.backend("orb")
def test_silica_glass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blip_ft.adapters.orb.backbone import OrbBackbone

    from ..adapters.orb_files import write_orb

    name = "orb-v3-direct-20-omat"
    path = write_orb(tmp_path / "small.ckpt", name, num_message_passing_steps=3)
    calculator = OrbBackbone.load(str(path), architecture=name).stock_calculator()
    glass = bulk("SiO", "zincblende", 4.4, cubic=True)
    offset = 125667.96875
    write_set(tmp_path / "silica_train.xyz", glass, calculator, 1030, offset=offset, unread=range(32, 1024))
    write_set(tmp_path / "silica_test.xyz", glass, calculator, 3, offset=offset)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "silica_glass_paper", "name=small", f"model.checkpoint={path}", *SMALL]) == 0
    metrics = check(tmp_path, {"seen"})
    assert metrics["pretrained"]["seen"]["energy_mae_mev_per_atom"] < 200
    receipt = json.loads((tmp_path / "runs/small/receipt.json").read_text())
    assert max(abs(e) for e in receipt["references"]["shift"].values()) < 10  # eV: the constant is gone
