"""The command line: what it prints, writes and refuses. Runs on the fake backbone."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from blip_ft import cli, commands
from blip_ft.backbone import missing_backend
from blip_ft.checkpoint import load_model, save_model
from blip_ft.config import ModelConfig, PosteriorConfig, load_recipe
from blip_ft.errors import BlipError
from blip_ft.fake import FakeBackbone
from blip_ft.potential import BayesianPotential
from blip_ft.predict_file import PER_ATOM, PER_STRUCTURE
from blip_ft.uncertainty.calibration import Calibration, PropertyCalibration
from blip_ft.uncertainty.ood import FeatureDistance
from blip_ft.uncertainty.predict import predict_atoms

COMMANDS = ("fit", "check", "evaluate", "predict", "export", "inspect", "doctor", "recipes", "report")


def structure(n: int = 6, seed: int = 0, *, symbols: str = "SiO2SiO2", periodic: bool = True) -> Atoms:
    """A random but sensible structure of the fake's elements."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(2)] * 3), axis=-1).reshape(-1, 3)[:n]
    atoms = Atoms(symbols, positions=2.1 * grid + rng.normal(0, 0.1, (n, 3)), cell=np.diag([4.4, 4.6, 4.8]))
    atoms.pbc = periodic
    return atoms


def labelled(atoms: Atoms, seed: int = 0) -> Atoms:
    """The same structure with random labels."""
    rng = np.random.default_rng(seed)
    results = {"energy": rng.normal(), "forces": rng.normal(size=(len(atoms), 3))}
    if atoms.pbc.all():
        results["stress"] = rng.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a finished run leaves it, with a calibrated model that was never trained."""
    folder: Path = tmp_path_factory.mktemp("runs") / "fake"
    potential = BayesianPotential(
        FakeBackbone.load("tiny"),
        ModelConfig(adapter="fake", checkpoint="tiny", dtype="float64"),
        PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.05),
        n_draws=4,
    )
    potential.references = {8: -2.0, 14: -5.0}
    potential.calibration = Calibration(
        energy=PropertyCalibration(aleatoric=1e-3, scale=2.0),
        forces=PropertyCalibration(aleatoric=2e-2, scale=3.0),
    )
    save_model(potential, folder / "model")
    return folder


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Five structures without labels, one of them a molecule."""
    path = tmp_path / "in.extxyz"
    write(path, [structure(seed=i, periodic=i != 3) for i in range(5)])
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit code, standard output, standard error."""

    def run_main(*argv: str | Path) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        return code, *capsys.readouterr()

    return run_main


def leftovers(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(p.name for p in folder.iterdir())


# ---- the program as a whole ------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], *[[c, "--help"] for c in COMMANDS]])
def test_help_is_instant(argv: list[str]):
    code = (
        "import sys\nfrom blip_ft.cli import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'ase', 'lightning', 'pydantic', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: blip-finetune" in done.stdout


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert [c for c in COMMANDS if f"\n    {c} " not in out] == []


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["fit"], ["predict", "a", "b"], ["predict", "a", "b", "-o", "c", "--batch-size", "0"]],
)
def test_wrong_usage_is_exit_code_2(argv: list[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2


def test_installed_program_prints_its_version():
    program = Path(sys.executable).with_name("blip-finetune")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    import blip_ft

    assert done.stdout == f"blip-finetune {blip_ft.__version__}\n"


def raising(error: BaseException) -> Callable[[Any], None]:
    def command(args: Any) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            BlipError("no [bold]way[/]", remedy="go [home]"),
            2,
            "error: no [bold]way[/]\n  What to do: go [home]\n",
        ),
        (
            missing_backend("mace", "mace"),
            2,
            "with fairchem, sevennet, orb (different e3nn).\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "No space left on device: '/x'\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "Permission denied: '/x'\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_errors_of_the_user_are_one_message(
    monkeypatch: pytest.MonkeyPatch, call: Any, error: BaseException, code: int, text: str
):
    monkeypatch.setattr(commands, "doctor", raising(error))
    got, out, err = call("doctor")
    assert (got, out) == (code, "")
    assert err.endswith(text)
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    "error", [ValueError("x"), ImportError("libgomp.so.1"), OSError(errno.EIO, "broken disk"), KeyError("x")]
)
def test_defects_keep_their_trace_back(monkeypatch: pytest.MonkeyPatch, error: Exception):
    monkeypatch.setattr(commands, "doctor", raising(error))
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_a_missing_backend_names_its_extra(monkeypatch: pytest.MonkeyPatch, call: Any):
    monkeypatch.setitem(sys.modules, "sevenn", None)
    code, out, err = call("inspect", "sevennet:7net-0")
    assert (code, out) == (2, "")
    assert "pip install 'blip-ft[sevennet]'" in err
    assert "mace" in err


def test_a_reader_that_leaves_early_causes_no_complaint():
    process = subprocess.Popen(
        [sys.executable, "-m", "blip_ft.cli", "inspect", "fake:tiny", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


# ---- inspect, doctor, recipes ----------------------------------------------------------------


def test_inspect_bare_model(call: Any):
    code, out, _ = call("inspect", "fake:tiny", "model.noise=none", "--json")
    assert code == 0
    tree = json.loads(out)
    assert tree["adapter"] == "fake"
    assert "tiny" in tree["base"]["checkpoint"]
    rows = tree["modules"]
    assert tree["counts"]["converted"] == sum(r["n_weights"] for r in rows if r["action"] == "converted") > 0
    assert tree["counts"]["noisy"] == 0
    assert all(r["reason"] for r in rows if r["action"] == "left")


def test_inspect_recipe_run_and_model_agree(call: Any, run: Path, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {train: x}\nmodel: {adapter: fake, checkpoint: tiny, dtype: float64}\n")
    trees = [
        json.loads(call("inspect", spec, "--json")[1]) for spec in ("fake:tiny", recipe, run, run / "model")
    ]
    assert all(tree == trees[0] for tree in trees)


@pytest.mark.parametrize("flag", [[], ["--trust"]])
def test_trust_reaches_the_adapter(monkeypatch: pytest.MonkeyPatch, call: Any, flag: list[str]):
    seen: list[bool] = []
    load = FakeBackbone.load

    def watched(checkpoint: str, *, trust: bool = False, **options: Any) -> FakeBackbone:
        seen.append(trust)
        return load(checkpoint, trust=trust, **options)

    monkeypatch.setattr(FakeBackbone, "load", watched)
    assert call("inspect", "fake:tiny", *flag)[0] == 0
    assert seen == [bool(flag)]


def test_inspect_prints_every_module(call: Any):
    names = [m["name"] for m in json.loads(call("inspect", "fake:tiny", "--json")[1])["modules"]]
    _, out, _ = call("inspect", "fake:tiny")
    assert [n for n in names if n not in out] == []
    assert "converted, trained, noisy" in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["nonsense"], "neither a recipe nor a run nor a model"),
        (["fak:tiny"], "did you mean 'fake'?"),
        (["fake:nonsense"], "nonsense"),
        (["fake:tiny", "model.nois=all"], "did you mean 'noise'?"),
        (["fake:tiny", "model.noise=nothing_like_it"], "matches no convertible module"),
        (["."], "no trained model here"),
    ],
)
def test_inspect_refuses(call: Any, argv: list[str], text: str):
    code, out, err = call("inspect", *argv)
    assert (code, out) == (2, "")
    assert text in err


def test_doctor_prints_json_and_a_table(call: Any):
    tree = json.loads(call("doctor", "--json")[1])
    assert isinstance(tree["adapters"]["sevennet"]["available"], bool)
    assert "version" in tree["adapters"]["sevennet"]
    _, out, _ = call("doctor")
    assert [name for name in tree["adapters"] if name not in out] == []


def test_recipes_lists_every_recipe(call: Any):
    from blip_ft.config import load_recipe, shipped

    _, out, _ = call("recipes")
    for name in shipped():
        model = load_recipe(name).model
        assert any(name in row and f"{model.adapter}:{model.checkpoint}" in row for row in out.splitlines())


def test_every_recipe_says_what_it_is_for():
    from blip_ft.config import recipe_summary, shipped

    assert [name for name, path in shipped().items() if len(recipe_summary(path)[1]) < 20] == []


# ---- predict ---------------------------------------------------------------------------------


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
        for key in PER_STRUCTURE:
            if key in want:
                np.testing.assert_allclose(after.info[key], want[key], atol=1e-7)
        for key in PER_ATOM:
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


def test_predict_writes_the_out_of_distribution_score(call: Any, tmp_path: Path):
    potential = BayesianPotential(
        FakeBackbone.load("tiny"),
        ModelConfig(adapter="fake", checkpoint="tiny", dtype="float64"),
        PosteriorConfig(family="weight", prior_scale=0.1, init_std=0.05),
        n_draws=4,
    )
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
        (bad_position, "is not a number"),
        (no_atoms, "without atoms"),
        (flat_cell, "no volume"),
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
    assert leftovers(tmp_path) == before


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
    assert leftovers(tmp_path) == ["in.extxyz"]


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


def test_predict_on_a_full_disk_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, call: Any, run: Path, frames: Path, tmp_path: Path
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    code, _, err = call("predict", run, frames, "-o", tmp_path / "out.extxyz")
    assert code == 2
    assert "No space left on device" in err
    assert leftovers(tmp_path) == ["in.extxyz"]


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


# ---- evaluate --------------------------------------------------------------------------------


def test_evaluate_writes_metrics(call: Any, run: Path, tmp_path: Path):
    write(tmp_path / "in.extxyz", [labelled(structure(seed=i), seed=i) for i in range(5)])
    code, out, _ = call("evaluate", run, tmp_path / "in.extxyz", "-o", tmp_path / "metrics.json")
    assert code == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["n_structures"] == 5
    labels = read(tmp_path / "in.extxyz", ":")
    predicted = predict_atoms(load_model(run), labels)
    mae = np.mean(
        [np.abs(p["forces"] - a.get_forces()).mean() for p, a in zip(predicted, labels, strict=True)]
    )
    assert metrics["force_mae_mev_per_ang"] == pytest.approx(1e3 * mae)
    assert 0 <= metrics["coverage90"] <= 1
    assert [key for key in metrics if key not in out] == []


def test_evaluate_refuses_an_existing_file_first(call: Any, run: Path, tmp_path: Path):
    (tmp_path / "metrics.json").write_text("precious")
    code, _, err = call("evaluate", run, tmp_path / "none.xyz", "-o", tmp_path / "metrics.json")
    assert code == 2
    assert "--overwrite" in err
    assert (tmp_path / "metrics.json").read_text() == "precious"


def test_evaluate_needs_labels(call: Any, run: Path, frames: Path, tmp_path: Path):
    code, _, err = call("evaluate", run, frames, "-o", tmp_path / "metrics.json")
    assert code == 2
    assert "in.extxyz" in err
    assert leftovers(tmp_path) == ["in.extxyz"]


# ---- fit and report --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``fake.yaml``, its frames, and ``runs/first``, which the program made from them."""
    folder: Path = tmp_path_factory.mktemp("fit")
    calculator = FakeBackbone.load("tiny").stock_calculator()
    frames = []
    for i in range(16):
        atoms = structure(seed=i)
        atoms.calc = calculator
        labels = {"energy": atoms.get_potential_energy() - 3.0, "forces": 1.1 * atoms.get_forces()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        atoms.info["trajectory"] = f"t{i // 2}"
        frames.append(atoms)
    write(folder / "frames.extxyz", frames)
    recipe = {
        "output": str(folder / "runs"),
        "data": {"train": str(folder / "frames.extxyz")},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {"family": "weight", "prior_scale": 0.1},
        "objective": {"temperature": 1e-3},
        "uncertainty": {"n_draws": 3},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1},
    }
    (folder / "fake.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert cli.main(["fit", str(folder / "fake.yaml"), "name=first"]) == 0
    return folder


def test_fit_writes_the_run(fitted: Path):
    run = fitted / "runs" / "first"
    expected = {"metrics.json", "metrics.csv", "report.html", "receipt.json", "recipe.yaml", "model"}
    assert expected <= set(leftovers(run))
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"pretrained", "plain", "blip"}
    rows = (run / "metrics.csv").read_text().splitlines()
    assert {"step", "train/loss"} <= set(rows[0].split(","))
    assert load_recipe(str(run / "recipe.yaml")).name == "first"


def test_fit_refuses_an_existing_run_and_leaves_it(call: Any, fitted: Path):
    before = (fitted / "runs/first/metrics.json").read_bytes()
    code, _, err = call("fit", fitted / "fake.yaml", "name=first")
    assert code == 2
    assert "overwrite=true" in err
    assert (fitted / "runs/first/metrics.json").read_bytes() == before


def test_fit_replaces_a_run_if_told_and_says_so(call: Any, fitted: Path):
    shutil.copytree(fitted / "runs/first", fitted / "runs/second")
    (fitted / "runs/second/old").touch()
    options = ("name=second", "overwrite=true", "plain.enabled=false")
    code, _, err = call("fit", fitted / "fake.yaml", *options)
    assert code == 0
    assert "replacing the earlier run" in err
    assert not (fitted / "runs/second/old").exists()
    assert set(json.loads((fitted / "runs/second/metrics.json").read_text())) == {"pretrained", "blip"}


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("objectve.temperature=1", "did you mean 'objective'?"),
        ("data.train=nowhere.extxyz", "nowhere.extxyz"),
        ("model.adapter=fak", "did you mean 'fake'?"),
        ("model.noise=nothing_like_it", "matches no convertible module"),
        ("data.units={forces: kcal/mol}", "units"),
    ],
)
def test_fit_refuses_bad_input_before_writing(call: Any, fitted: Path, override: str, text: str):
    code, _, err = call("fit", fitted / "fake.yaml", "name=third", override)
    assert code == 2
    assert text in err
    assert "Traceback" not in err
    assert not (fitted / "runs/third").exists()


def test_evaluate_and_predict_take_the_run(call: Any, fitted: Path, tmp_path: Path):
    frames = fitted / "frames.extxyz"
    assert call("predict", fitted / "runs/first", frames, "-o", tmp_path / "out.extxyz")[0] == 0
    assert call("evaluate", fitted / "runs/first", f"{frames}@0:3", "-o", tmp_path / "m.json")[0] == 0
    assert json.loads((tmp_path / "m.json").read_text())["n_structures"] == 3


def test_report_is_the_same_when_made_again(call: Any, fitted: Path):
    def without_ids(text: str) -> str:
        return re.sub(r"\b[a-z][0-9a-f]{10}\b", "", text)  # matplotlib's, random

    report = fitted / "runs/first/report.html"
    first = report.read_text()
    report.unlink()
    assert call("report", fitted / "runs/first")[:2] == (0, f"{report}\n")
    assert without_ids(report.read_text()) == without_ids(first)


@pytest.mark.parametrize("name", ["metrics.json", "receipt.json", "calibration.json"])
def test_report_of_an_unfinished_run(call: Any, fitted: Path, tmp_path: Path, name: str):
    shutil.copytree(fitted / "runs/first", tmp_path / "run")
    (tmp_path / "run" / name).write_text("{")
    code, _, err = call("report", tmp_path / "run")
    assert code == 2
    assert name in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trust", "model.noise=scalar", "model.dtype=float64"],
        ["model.noise=scalar", "--trust", "model.dtype=float64"],
        ["model.noise=scalar", "model.dtype=float64", "--trust"],
    ],
)
def test_options_may_stand_anywhere_among_overrides(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        commands, "_conversion", lambda spec, overrides: seen.append((spec, overrides)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "fake:tiny", *arguments])
    ((spec, overrides),) = seen
    assert spec == "fake:tiny"
    assert set(overrides) == {"model.noise=scalar", "model.dtype=float64", "model.trust=true"}


def test_an_unknown_option_is_still_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["inspect", "fake:tiny", "a=1", "--trsut", "b=2"], ["report", "here", "there"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert "unrecognized arguments" in capsys.readouterr().err
