"""``predict``: what it writes and what it refuses."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from blip_ft.config import PosteriorConfig
from blip_ft.potential.checkpoint import load_model, save_model
from blip_ft.potential.distance import FeatureDistance
from blip_ft.uncertainty import linearized
from blip_ft.uncertainty.draws import sampling_error
from blip_ft.uncertainty.outputs import IN_ARRAYS, IN_INFO
from blip_ft.uncertainty.predict import predict_atoms

from .structures import labelled, leftovers, potential_of, structure


def test_predict_writes_what_the_model_says(call: Any, run: Path, frames: Path, tmp_path: Path):
    out_file = tmp_path / "out.extxyz"
    code, out, _ = call("predict", run, frames, "-o", out_file, "--batch-size", "2")
    assert (code, out) == (0, f"{out_file}: 5 structures\n")
    inputs, outputs = read(frames, ":"), read(out_file, ":")
    expected = predict_atoms(load_model(run), inputs)
    assert len(outputs) == len(inputs)
    for before, after, want in zip(inputs, outputs, expected, strict=True):
        assert np.array_equal(before.numbers, after.numbers)
        np.testing.assert_allclose(after.positions, before.positions, atol=1e-7)
        np.testing.assert_allclose(after.get_potential_energy(), want["energy"], atol=1e-7)
        np.testing.assert_allclose(after.get_forces(), want["forces"], atol=1e-7)
        assert ("stress" in after.calc.results) == before.pbc.all() == ("stress_std" in after.info)
        if before.pbc.all():
            np.testing.assert_allclose(after.get_stress(), want["stress"], atol=1e-7)
        assert want["std_sampling_error"] == pytest.approx(sampling_error(4))
        np.testing.assert_allclose(after.calc.results["energies"], want["energies"], atol=1e-7)
        for key in IN_INFO:
            if key in want:
                np.testing.assert_allclose(after.info[key], want[key], atol=1e-7)
        for key in IN_ARRAYS:
            if key == "ood_score":  # this model has none
                assert key not in after.arrays
                continue
            np.testing.assert_allclose(after.arrays[key], want[key], atol=1e-7)
        assert after.arrays["forces_std"].shape == (len(before), 3)
        assert after.arrays["forces_std_norm"].shape == (len(before),)
        np.testing.assert_allclose(
            after.arrays["forces_std_norm"], np.linalg.norm(after.arrays["forces_std"], axis=1), atol=1e-6
        )
        assert after.info["energy_std_total"] > after.info["energy_std"] > 0
        parts = after.info["energy_std_aleatoric"], after.info["energy_std"]
        np.testing.assert_allclose(after.info["energy_std_total"], np.hypot(*parts), rtol=1e-6)
        # no calibration frame had a stress
        assert {"stress_std_aleatoric", "stress_std_total"}.isdisjoint(after.info)


@pytest.mark.parametrize(
    ("options", "error", "has"),
    [
        (("--method", "energy"), None, {"energy_std"}),
        (("--method", "linear"), 0.0, {"energy_std", "forces_std", "forces_std_norm", "stress_std"}),
        (("--method", "linear", "--draws", "4"), "directions", {"energy_std", "forces_std", "stress_std"}),
        (("--draws", "6"), sampling_error(6, paired=True), {"energy_std", "forces_std", "energies_std"}),
        (("--draws", "0"), None, set()),
    ],
)
def test_error_bars_can_be_chosen(
    call: Any, pathwise: Path, tmp_path: Path, options: tuple[str, ...], error: Any, has: set[str]
):
    write(tmp_path / "in.extxyz", structure())
    assert call("predict", pathwise, tmp_path / "in.extxyz", "-o", tmp_path / "out.extxyz", *options)[0] == 0
    out = read(tmp_path / "out.extxyz")
    assert has <= out.info.keys() | out.arrays.keys()
    assert ("forces_std" in out.arrays) == ("forces_std" in has)
    assert ("energy_std" in out.info) == ("energy_std" in has)
    if error == "directions":
        error = linearized.relative_error(4, load_model(pathwise).posterior.latent_numel)
        assert error > 0
    assert out.info.get("std_sampling_error") == (None if error is None else pytest.approx(error, abs=1e-12))


def test_exact_error_bars_of_too_many_numbers(
    monkeypatch: pytest.MonkeyPatch, call: Any, run: Path, frames: Path, tmp_path: Path
):
    monkeypatch.setattr(linearized, "MAX_DIRECTIONS", 100)
    code, _, err = call("predict", run, frames, "-o", tmp_path / "out.extxyz", "--method", "linear")
    assert code == 2
    assert "latent numbers" in err
    assert leftovers(tmp_path) == ["in.extxyz"]


def test_predict_writes_the_out_of_distribution_score(call: Any, tmp_path: Path):
    potential = potential_of(PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.05))
    training = np.random.default_rng(0).normal(size=(40, 8)), np.repeat([8, 14], 20), ["a", "b"] * 20
    potential.ood = FeatureDistance.fit(*training)
    save_model(potential, tmp_path / "model")
    alien = molecule("CO")
    alien.set_array("ood_score", np.zeros(2))
    write(tmp_path / "in.extxyz", [structure(), alien])
    assert call("predict", tmp_path / "model", tmp_path / "in.extxyz", "-o", tmp_path / "out.extxyz")[0] == 0
    known, unknown = read(tmp_path / "out.extxyz", ":")
    want = predict_atoms(potential, [structure()])[0]
    np.testing.assert_allclose(known.arrays["ood_score"], want["ood_score"], atol=1e-7)
    assert known.info["ood_score_max"] == pytest.approx(want["ood_score_max"])
    assert np.isinf(unknown.arrays["ood_score"]).tolist() == (unknown.numbers == 6).tolist()
    assert unknown.info["ood_score_max"] == np.inf


def test_predict_keeps_the_rest_of_a_frame_and_replaces_labels(call: Any, run: Path, tmp_path: Path):
    atoms = labelled(structure())
    atoms.info |= {"temperature_K": 300, "REF_energy": -1.0, "energy_std": 99.0}
    atoms.set_array("mark", np.arange(len(atoms)))
    atoms.set_array("forces_std", np.zeros((len(atoms), 3)))
    write(tmp_path / "in.extxyz", atoms)
    assert call("predict", run, tmp_path / "in.extxyz", "-o", tmp_path / "out.extxyz")[0] == 0
    out = read(tmp_path / "out.extxyz")
    want = predict_atoms(load_model(run), [atoms])[0]
    assert (out.info["temperature_K"], out.info["REF_energy"]) == (300, -1.0)
    assert np.array_equal(out.arrays["mark"], np.arange(len(atoms)))
    np.testing.assert_allclose(out.get_potential_energy(), want["energy"], atol=1e-7)
    np.testing.assert_allclose(out.info["energy_std"], want["energy_std"], atol=1e-7)
    np.testing.assert_allclose(out.arrays["forces_std"], want["forces_std"], atol=1e-7)


def test_predictions_rotate_with_the_structure(call: Any, run: Path, tmp_path: Path):
    atoms = structure()
    turned = atoms.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    write(tmp_path / "in.extxyz", [atoms, turned])
    assert call("predict", run, tmp_path / "in.extxyz", "-o", tmp_path / "out.extxyz")[0] == 0
    one, two = read(tmp_path / "out.extxyz", ":")
    rotation = np.linalg.solve(atoms.cell.array, turned.cell.array)
    np.testing.assert_allclose(one.get_forces() @ rotation, two.get_forces(), atol=1e-6)
    np.testing.assert_allclose(one.info["energy_std"], two.info["energy_std"], rtol=1e-4)
    np.testing.assert_allclose(one.arrays["forces_std_norm"], two.arrays["forces_std_norm"], rtol=1e-4)
    assert not np.allclose(one.arrays["forces_std"], two.arrays["forces_std"], rtol=1e-2)


def test_predict_reads_and_writes_packed_files(call: Any, run: Path, frames: Path, tmp_path: Path):
    write(tmp_path / "in.extxyz.gz", read(frames, ":"), format="extxyz")
    assert call("predict", run, tmp_path / "in.extxyz.gz", "-o", tmp_path / "out.extxyz.gz")[0] == 0
    assert (tmp_path / "out.extxyz.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert len(read(tmp_path / "out.extxyz.gz", ":")) == 5


def test_predict_reads_other_formats(call: Any, run: Path, tmp_path: Path):
    write(tmp_path / "POSCAR", structure(), format="vasp")
    assert call("predict", run, tmp_path / "POSCAR", "-o", tmp_path / "out.xyz")[0] == 0
    assert len(read(tmp_path / "out.xyz", ":")) == 1


def numbered(n: int) -> list[Atoms]:
    """Labelled structures that ASE and we must both read."""
    return [labelled(structure(seed=i), seed=i) for i in range(n)]


def test_predict_and_evaluate_read_the_same_frames(call: Any, run: Path, tmp_path: Path):
    """Blank lines between frames, six numbers of a stress, an empty text before the labels."""
    source, out_file = tmp_path / "in.xyz", tmp_path / "out.xyz"
    write(source, numbered(5), format="extxyz")
    lines = source.read_text().splitlines(keepends=True)
    lines[9] = re.sub('stress="[^"]*"', 'stress="1 2 3 4 5 6"', f'config_type="" {lines[9]}')
    source.write_text("".join([*lines[:8], "\n", *lines[8:16], "  \n\n", *lines[16:]]))
    assert call("predict", run, source, "-o", out_file)[:2] == (0, f"{out_file}: 5 structures\n")
    code, _, err = call("evaluate", run, source, "-o", tmp_path / "metrics.json")
    assert code == 0, err
    assert json.loads((tmp_path / "metrics.json").read_text())["n_structures"] == 5
    for before, after in zip(numbered(5), read(out_file, ":"), strict=True):
        np.testing.assert_allclose(after.positions, before.positions, atol=1e-7)
        assert "energy_std" in after.info


@pytest.mark.parametrize(
    "spec", ["in.xyz@1:4", "in.xyz@valid", "*.xyz@1:4", "in.parquet@1:4", "in.jsonl@1:4"]
)
def test_predict_reads_every_source(call: Any, run: Path, tmp_path: Path, spec: str):
    from blip_ft.data.read.sources import load_source
    from blip_ft.data.write.convert import convert

    some = numbered(5)
    for i, atoms in enumerate(some):
        atoms.info["split"] = "validation" if 0 < i < 4 else "train"
    write(tmp_path / "in.xyz", some, format="extxyz")
    if not spec.endswith(("xyz@1:4", "valid")):
        convert(load_source(str(tmp_path / "in.xyz")), tmp_path / spec.partition("@")[0])
    out_file = tmp_path / "out.extxyz"
    assert call("predict", run, f"{tmp_path}/{spec}", "-o", out_file)[:2] == (
        0,
        f"{out_file}: 3 structures\n",
    )
    for before, after in zip(some[1:4], read(out_file, ":"), strict=True):
        np.testing.assert_allclose(after.positions, before.positions, atol=1e-7)
        assert after.info["split"] == "validation"


def test_predict_reads_an_embedded_set(call: Any, run: Path, tmp_path: Path):
    assert call("predict", run, "sio2_polymorphs@0:2", "-o", tmp_path / "out.xyz")[0] == 0
    assert len(read(tmp_path / "out.xyz", ":")) == 2


def test_whatever_a_frame_holds_is_in_the_predicted_file(call: Any, run: Path, tmp_path: Path):
    atoms = structure()
    atoms.info |= {"config_type": "", "none": np.zeros(0), "note": "two\nlines", "number": "5", "one": [1.5]}
    atoms.info |= {"virial": np.arange(3.0), "energy_std": 9.0}
    atoms.set_array("label", np.array(["a", "", "c d", "e", "f", "g"]))
    atoms.set_array("fine", np.full(6, 1e-12) / 3)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, magmoms=np.arange(6.0), dipole=[1.0, 2.0, 3.0])
    write(tmp_path / "in.traj", [atoms, atoms])
    assert call("predict", run, tmp_path / "in.traj", "-o", tmp_path / "out.xyz")[0] == 0
    want = predict_atoms(load_model(run), [atoms])[0]
    outputs = read(tmp_path / "out.xyz", ":")
    assert len(outputs) == 2
    for out in outputs:
        assert out.get_potential_energy() == want["energy"]
        assert np.array_equal(out.get_forces(), want["forces"])
        assert out.info["energy_std"] == want["energy_std"]
        assert (out.info["config_type"], out.info["note"], out.info["number"]) == ("", "two\nlines", "5")
        assert (len(out.info["none"]), out.info["one"].tolist()) == (0, [1.5])
        assert out.info["info_virial"].tolist() == [0, 1, 2]
        assert out.calc.results["magmoms"].tolist() == list(range(6))
        assert out.calc.results["dipole"].tolist() == [1, 2, 3]
        assert np.array_equal(out.arrays["forces_std"], want["forces_std"])


def test_evaluate_leaves_isolated_atoms_out_and_says_so(call: Any, run: Path, tmp_path: Path):
    atom = Atoms("O", cell=[15, 15, 15], pbc=True)
    atom.calc = SinglePointCalculator(atom, energy=-430.0, forces=np.zeros((1, 3)))
    write(tmp_path / "in.xyz", [*numbered(5), atom], format="extxyz")
    code, _, err = call("evaluate", run, tmp_path / "in.xyz", "-o", tmp_path / "metrics.json")
    assert code == 0
    assert "in.xyz, frame 5: an isolated atom" in err
    assert json.loads((tmp_path / "metrics.json").read_text())["n_structures"] == 5


def test_predict_refuses_an_existing_file_unless_told(call: Any, run: Path, frames: Path, tmp_path: Path):
    out_file = tmp_path / "out.extxyz"
    out_file.write_text("precious")
    code, _, err = call("predict", run, frames, "-o", out_file)
    assert code == 2
    assert "--overwrite" in err
    assert out_file.read_text() == "precious"
    assert call("predict", run, frames, "-o", out_file, "--overwrite")[0] == 0
    assert len(read(out_file, ":")) == 5


def bad_element(frames: list[Atoms]) -> None:
    frames[3].numbers[0] = 79


def bad_position(frames: list[Atoms]) -> None:
    frames[3].positions[0, 0] = np.nan


def no_atoms(frames: list[Atoms]) -> None:
    del frames[3][:]


def flat_cell(frames: list[Atoms]) -> None:
    frames[3].pbc = True
    frames[3].cell[2] = 0


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (bad_element, "element Au is unknown"),
        (bad_position, "field 'positions': NaN or infinite value"),
        (no_atoms, "the frame has no atoms"),
        (flat_cell, "the lattice vectors do not span a cell"),
    ],
)
@pytest.mark.parametrize("batch_size", ["1", "16"])
def test_predict_names_the_frame_and_leaves_nothing(
    call: Any, run: Path, frames: Path, tmp_path: Path, damage: Any, text: str, batch_size: str
):
    damaged = read(frames, ":")
    damage(damaged)
    write(frames.with_suffix(".traj"), damaged)
    before = leftovers(tmp_path)
    code, out, err = call(
        "predict", run, frames.with_suffix(".traj"), "-o", tmp_path / "out.extxyz", "--batch-size", batch_size
    )
    assert (code, out) == (2, "")
    assert "in.traj, frame 3" in err
    assert text in err
    if batch_size == "16":  # no batch was finished
        assert leftovers(tmp_path) == before
    else:
        assert leftovers(tmp_path) == [*before, "out.extxyz.part", "out.extxyz.part.json"]
        assert "3 structures are done and kept" in err


@pytest.mark.parametrize("content", ["", "6\nLattice", "not a structure\n", "2\n\nSi 0 0 0\nO x y z\n"])
def test_predict_refuses_a_file_that_is_none(call: Any, run: Path, tmp_path: Path, content: str):
    (tmp_path / "bad.xyz").write_text(content)
    code, _, err = call("predict", run, tmp_path / "bad.xyz", "-o", tmp_path / "out.extxyz")
    assert code == 2
    assert "bad.xyz" in err
    assert "What to do" in err
    assert leftovers(tmp_path) == ["bad.xyz"]


def test_a_file_cut_short_is_refused(call: Any, run: Path, frames: Path, tmp_path: Path):
    frames.write_text(frames.read_text()[:-150])
    code, _, err = call("predict", run, frames, "-o", tmp_path / "out.extxyz", "--batch-size", "1")
    assert code == 2
    assert "in.extxyz, frame" in err
    assert not (tmp_path / "out.extxyz").exists()


@pytest.mark.parametrize(
    ("target", "text"),
    [("out.traj", "extended XYZ"), ("none/out.xyz", "mkdir -p"), ("out.xyz.zip", "extended XYZ")],
)
def test_predict_refuses_a_wrong_target(
    call: Any, run: Path, frames: Path, tmp_path: Path, target: str, text: str
):
    code, _, err = call("predict", run, frames, "-o", tmp_path / target)
    assert code == 2
    assert text in err
    assert leftovers(tmp_path) == ["in.extxyz"]


def test_an_output_that_cannot_be_renamed_is_kept(
    monkeypatch: pytest.MonkeyPatch, call: Any, run: Path, frames: Path, tmp_path: Path
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for rename in ("replace", "rename", "hardlink_to"):
        monkeypatch.setattr(Path, rename, full)
    code, _, err = call("predict", run, frames, "-o", tmp_path / "out.extxyz")
    assert code == 2
    assert "No space left on device" in err
    assert "free disk space" in err
    assert leftovers(tmp_path) == ["in.extxyz", "out.extxyz.part", "out.extxyz.part.json"]
    monkeypatch.undo()
    assert call("predict", run, frames, "-o", tmp_path / "out.extxyz", "--resume")[0] == 0
    assert len(read(tmp_path / "out.extxyz", ":")) == 5
    assert leftovers(tmp_path) == ["in.extxyz", "out.extxyz"]


@pytest.mark.parametrize("model", ["nowhere", "in.extxyz"])
def test_predict_without_a_model(call: Any, frames: Path, tmp_path: Path, model: str):
    code, _, err = call("predict", tmp_path / model, frames, "-o", tmp_path / "out.extxyz")
    assert code == 2
    assert model in err


@pytest.mark.parametrize("device", ["nonsense", "xpu:99"])
def test_a_device_that_is_not_there(call: Any, run: Path, frames: Path, tmp_path: Path, device: str):
    code, _, err = call("predict", run, frames, "-o", tmp_path / "out.extxyz", "--device", device)
    assert code == 2
    assert f"the device '{device}'" in err
    assert leftovers(tmp_path) == ["in.extxyz"]


def test_precision_can_be_chosen(call: Any, run: Path, frames: Path, tmp_path: Path):
    for dtype in ("float64", "float32"):
        assert call("predict", run, frames, "-o", tmp_path / f"{dtype}.xyz", "--dtype", dtype)[0] == 0
    double, single = (read(tmp_path / f"{dtype}.xyz") for dtype in ("float64", "float32"))
    difference = np.abs(double.get_forces() - single.get_forces()).max()
    assert 1e-9 < difference < 1e-4
