"""What the documents promise: their links lead somewhere, their commands and code run."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from blip_ft import bayesian, cli, load_backbone, load_frames
from blip_ft.cli import fit
from blip_ft.config import ModelConfig, PosteriorConfig, load_recipe
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import save_model
from blip_ft.testing.fake import FakeBackbone

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
names = [p.name for p in DOCUMENTS]


def blocks(document: Path, language: str = "") -> list[str]:
    """Fenced code of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_links_inside_the_project_lead_somewhere(document: Path):
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    local = [t for t in targets if "://" not in t]
    assert [t for t in local if not (document.parent / t).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_commands_are_understood(document: Path):
    lines = [line for block in blocks(document) for line in block.splitlines()]
    for line in lines:
        if line.startswith("blip-finetune "):
            args = cli.make_parser().parse_args(shlex.split(line, comments=True)[1:])
            if args.run is fit.run and Path(args.recipe).suffix != ".yaml":
                load_recipe(args.recipe, args.overrides)


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_make_targets_exist(document: Path):
    targets = set(re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    known = {name for line in targets for name in line.split()}
    used = re.findall(r"^make ([\w-]+)", "\n".join(blocks(document)), re.MULTILINE)
    assert set(used) <= known


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Commands") : text.index("## Backends")]
    names = [command.__name__.rpartition(".")[2] for command in cli.COMMANDS]
    assert [name for name in names if f"`{name}" not in section] == []


def test_the_readme_is_read_at_all():
    assert len(blocks(ROOT / "README.md")) >= 3
    assert "blip-finetune predict" in "".join(blocks(ROOT / "README.md"))


def save_fake(folder: Path) -> None:
    """The model of a run."""
    potential = BayesianPotential(
        FakeBackbone.load("tiny"),
        ModelConfig(adapter="fake", checkpoint="tiny"),
        PosteriorConfig(family="weight", prior_scale=0.1),
        n_draws=2,
    )
    save_model(potential, folder)


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_fake(tmp_path / "runs" / "mine" / "model")
    write(tmp_path / "start.cif", bulk("Si"))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    scope = runpy.run_path(str(tmp_path / "snippet.py"))
    assert scope["atoms"].calc.results["forces_std_norm"].shape == (2,)


def test_python_of_the_page_on_simulations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_fake(tmp_path / "runs" / "mine" / "model")
    write(tmp_path / "start.cif", bulk("Si", cubic=True))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / "simulate.md", "python")
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    scope = runpy.run_path(str(tmp_path / "snippet.py"))
    assert scope["outcome"].steps == 40 or scope["outcome"].reason


@pytest.mark.backend("torchsim")
def test_python_of_the_page_on_torchsim_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_fake(tmp_path / "runs" / "mine" / "model")
    write(tmp_path / "start.cif", bulk("Si", cubic=True))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / "torchsim.md", "python")
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    scope = runpy.run_path(str(tmp_path / "snippet.py"))
    assert scope["final"]["forces_std_norm"].shape == (24,)
    assert (tmp_path / "1.h5").stat().st_size


def test_python_of_the_library_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    save_fake(tmp_path / "runs" / "mine" / "model")
    for name, count in (("train", 12), ("calibration", 8), ("held_out", 4)):
        frames = []
        for _ in range(count):
            atoms = bulk("Si", cubic=True)
            atoms.rattle(0.1, rng=rng)
            atoms.calc = FakeBackbone.load("tiny", seed=1).stock_calculator()
            forces, energy = atoms.get_forces(), atoms.get_potential_energy()
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
            frames.append(atoms)
        write(tmp_path / f"{name}.extxyz", frames)
    monkeypatch.chdir(tmp_path)
    use, train, module = blocks(ROOT / "docs" / "python.md", "python")
    for name, text in (("use", use), ("train", train), ("module", module)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    scope = runpy.run_path(str(tmp_path / "module.py"))
    assert scope["draws"].shape == (16, 64, 1)
    assert (scope["std"] > 0).all()
    scope = runpy.run_path(str(tmp_path / "use.py"))
    assert scope["result"]["forces_std_norm"].shape == (8,)
    assert scope["metrics"]["n_structures"] == 4
    before = load_backbone("fake", "tiny", dtype="float64")
    scope = runpy.run_path(str(tmp_path / "train.py"))
    held_out = load_frames("held_out.extxyz")
    plain = bayesian(before, prior_scale=0.1)
    plain.fit_references(load_frames("train.extxyz"))
    trained, start = (p.evaluate(held_out)["force_mae_mev_per_ang"] for p in (scope["again"], plain))
    assert trained < 0.9 * start
    assert scope["again"].evaluate(held_out)["coverage90"] > 0.5


def test_python_of_the_page_on_properties_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ase.calculators.morse import MorsePotential

    import blip_ft
    from blip_ft.properties import Members

    def aluminium(depth: float) -> MorsePotential:
        return MorsePotential(epsilon=depth, rho0=4.0, r0=2.8, rcut1=1.6, rcut2=1.9)

    members = Members(aluminium(0.4), [aluminium(0.404), aluminium(0.396)], amplitude=0.03)
    monkeypatch.setattr(blip_ft, "load", lambda path: members)
    (code,) = blocks(ROOT / "docs" / "properties.md", "python")
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    scope = runpy.run_path(str(tmp_path / "snippet.py"))
    assert scope["crystal"].cell_lengths_and_angles.draws.shape == (2, 6)
    assert scope["stiffness"].mean.shape == (6, 6)
    assert scope["vacancy"].energy.std < scope["vacancy"].uncorrelated_std
