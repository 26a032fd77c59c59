"""The house as CONTRIBUTING draws it: every room on the map, no circle, and arrows that run down only."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: what users import from: hands names on, and is imported by nobody inside
DOOR = {"blip_ft", "blip_ft.bayesian_module", "blip_ft.library"}


@cache
def modules() -> dict[str, Path]:
    """Name as it is imported -> file."""
    out = {}
    for folder, package in ((ROOT / "blip_ft", "blip_ft"), (ROOT / "adapters", "blip_ft.adapters")):
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


@cache
def arrows() -> dict[str, set[str]]:
    """What each module imports of ours, at the top, inside functions, and for types alone."""
    out: dict[str, set[str]] = {}
    for name, path in modules().items():
        found = out.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in modules() else node.module)
        out[name] = (found & modules().keys()) - {name}
    return out


def room(module: str) -> str:
    """Folder of a module."""
    if module in DOOR:
        return "the door"
    return module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]


def circle(successors: dict[str, set[str]]) -> list[str]:
    """One circle, empty if there is none."""
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> list[str]:
        if state.get(node) == 1:
            return [*path[path.index(node) :], node]
        if state.get(node) == 2:
            return []
        state[node] = 1
        for other in sorted(successors.get(node, ())):
            if found := visit(other, [*path, node]):
                return found
        state[node] = 2
        return []

    return next((found for node in sorted(successors) if (found := visit(node, []))), [])


def between_rooms() -> dict[str, set[str]]:
    out: dict[str, set[str]] = {}
    for module, others in arrows().items():
        out.setdefault(room(module), set()).update(room(other) for other in others)
    return {name: others - {name} for name, others in out.items()}


def drawn() -> list[str]:
    """Folders and root files of the map, as paths, in its order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"## The house\n.*?```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    out, parents = [], []
    for line in block[1].splitlines():
        if not (match := re.match(r"( *)([\w.]+(?:/| |$)(?:[\w./]*))", line)):
            continue
        name = line.split()[0].rstrip("/")
        depth = len(match[1]) // 2
        if line.startswith(" " * 12):  # the text of the line before goes on
            continue
        parents[depth:] = [name]
        out.append("/".join(parents))
    return out


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert circle(arrows()) == []


def test_no_room_imports_itself_by_way_of_others() -> None:
    assert circle(between_rooms()) == []


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize("top", ["blip_ft", "adapters"])
def test_every_room_is_on_the_map(top: str) -> None:
    folders = {str(p.parent.relative_to(ROOT)) for p in (ROOT / top).rglob("__init__.py")}
    files = {str(p.relative_to(ROOT)) for p in (ROOT / top).glob("*.py") if p.name not in ("__init__.py",)}
    shown = {path for path in drawn() if path.split("/")[0] == top}
    # families, adapters and the embedded set are named in the text of a room's line
    nested = {
        f
        for f in folders
        if f.startswith(("blip_ft/families/", "blip_ft/data/read/", "adapters/")) and f not in shown
    }
    assert {f.split("/")[-1] for f in nested} <= set(
        re.findall(r"\w+", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    )
    assert shown == (folders | files) - nested


def test_arrows_run_down_the_map() -> None:
    """The map is in the order of floors: a room imports from those above its own line only."""
    order = [path for path in drawn() if path.startswith("blip_ft")]
    floor = {path.replace("/", ".").removesuffix(".py"): i for i, path in enumerate(order)}
    wrong = [
        f"{module} -> {other}"
        for module, others in arrows().items()
        for other in others
        if module not in DOOR
        and not module.startswith("blip_ft.adapters")
        and (a := _floor(module, floor)) is not None
        if (b := _floor(other, floor)) is not None and b > a
    ]
    assert wrong == []


def _floor(module: str, floor: dict[str, int]) -> int | None:
    """Line of a module's room on the map."""
    if module in floor and modules()[module].name != "__init__.py":
        return floor[module]
    name = module
    while name and name not in floor:
        name = name.rpartition(".")[0]
    return floor.get(name)
