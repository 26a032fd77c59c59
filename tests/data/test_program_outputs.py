"""Steps that ORCA and Quantum ESPRESSO call not converged are named and left out, whatever ASE makes of them."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.units import Hartree, create_units

from blip_ft import cli
from blip_ft.config import DataConfig
from blip_ft.data.read.set_aside import SetAside
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.sample import rows_of
from blip_ft.data.split.splits import load_splits

from .program_outputs import espresso, orca, water_energies

RY = create_units("2006")["Ry"]  # pw.x computes with these constants, and ASE with it
SILICON = [-15.80, -15.81, -15.82, -15.83, -15.84]
ORCA_4 = {"note": "Wavefunction not fully converged!"}

CASES: dict[str, tuple[Callable[..., str], list[float], float, dict[str, Any]]] = {
    "orca-5": (orca, water_energies(5), Hartree, {}),
    "orca-4": (orca, water_energies(5), Hartree, ORCA_4),
    "espresso": (espresso, SILICON, RY, {}),
    "espresso-without-forces": (espresso, SILICON, RY, {"forces": False}),
}


@pytest.mark.parametrize("failed", [[], [0], [2], [0, 3], [4]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_steps_are_named_and_left_out(case: str, failed: list[int], tmp_path: Path) -> None:
    make, energies, unit, options = CASES[case]
    path = tmp_path / "run.out"
    path.write_text(make(energies, failed=failed, **options))
    aside = SetAside()
    kept = aside.examples(load_source(str(path)))
    assert aside.places == [f"{path}, frame {i}: not converged, as the file itself says" for i in failed]
    good = [i for i in range(5) if i not in failed]
    assert kept["frame"] == good
    np.testing.assert_allclose(kept["energy"], [energies[i] * unit for i in good], rtol=1e-7)
    z = {"orca": 3, "espr": 2}[case[:4]]
    assert {len(numbers) for numbers in kept["numbers"]} == {z}


@pytest.mark.parametrize("case", CASES)
def test_compressed_and_as_a_stream(case: str, tmp_path: Path) -> None:
    make, energies, _, options = CASES[case]
    path = tmp_path / "run.out.gz"
    path.write_bytes(gzip.compress(make(energies, failed=[1], **options).encode()))
    config = DataConfig.model_validate({"train": str(path), "stream": {"frames": 4}})
    assert [row["frame"] for row in rows_of(config)()] == [0, 2, 3, 4]


@pytest.mark.parametrize("case", CASES)
def test_every_command_leaves_them_out(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, energies, _, options = CASES[case]
    path = tmp_path / "run.out"
    path.write_text(make(energies, failed=[1], **options))
    target = tmp_path / "good.extxyz"
    assert cli.main(["data", "convert", str(path), str(target)]) == 0
    assert f"left out: {path}, frame 1: not converged" in capsys.readouterr().err
    assert len(load_source(str(target))) == 4
    splits = load_splits(DataConfig(train=str(path)))
    assert sum(len(part) for part in splits.roles().values()) == 4


def test_an_scf_that_converged_in_the_end(tmp_path: Path) -> None:
    """ORCA may try again in the same step: the last word counts."""
    first = "               *           SCF NOT CONVERGED AFTER   8 CYCLES      *\n"
    text = orca(water_energies(3)).replace("SCF ITERATIONS\n", f"SCF ITERATIONS\n{first}", 1)
    assert "NOT CONVERGED" in text
    (tmp_path / "run.out").write_text(text)
    aside = SetAside()
    assert len(aside.examples(load_source(str(tmp_path / "run.out")))) == 3
    assert aside.places == []
