"""The rings of the tests: every test has one, none is lost, and no backend is left to the last."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .conftest import COLLECTED, COMMON_OF_B, ENVIRONMENT, PACKAGES, RINGS, _listed, ring_of

MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")


@pytest.fixture
def everything(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All tests of the project, chosen or not."""
    if request.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        pytest.skip("only a part of the tests was collected")
    return request.config.stash[COLLECTED]


def marks(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


@pytest.mark.parametrize(
    ("given", "ring"),
    [
        ([], "quick"),
        (["parametrize"], "quick"),
        (["default"], "default"),
        (["backend"], "default"),
        (["backend", "full"], "full"),
        (["full"], "full"),
        (["default", "full"], "full"),
        (["gpu", "backend"], None),
        (["outside_data"], None),
    ],
)
def test_marks_decide(given: list[str], ring: str | None):
    item: Any = SimpleNamespace(iter_markers=lambda: [SimpleNamespace(name=name) for name in given])
    assert ring_of(item) == ring


def test_every_test_is_in_one_ring(everything: list[pytest.Item]):
    assert len(everything) > 2500
    for item in everything:
        rings = marks(item).intersection(RINGS)
        assert rings == {ring_of(item)} - {None}, item.nodeid
    counts = {ring: sum(ring_of(item) == ring for item in everything) for ring in (*RINGS, None)}
    assert sum(counts.values()) == len(everything)
    assert min(counts.values()) > 0, counts


def test_the_quick_ring_touches_no_vendor(everything: list[pytest.Item]):
    for item in everything:
        if ring_of(item) == "quick":
            assert "backend" not in marks(item)
            assert "common" in marks(item) or item.path.name in ENVIRONMENT


@pytest.mark.parametrize("name", PACKAGES)
def test_every_backend_has_a_contract_in_the_default_ring(name: str, everything: list[pytest.Item]):
    """A whole one, and one training through the program; of an extra that is no adapter, some tests."""
    own = [
        item.nodeid
        for item in everything
        if ring_of(item) == "default" and name in {m.args[0] for m in item.iter_markers("backend")}
    ]
    if name in ("lora", "lammps", "phonopy", "torchsim"):
        assert len(own) > (10 if name in ("lora", "lammps") else 0)
        return
    one_class = {node.rpartition("::")[0] for node in own if "test_step_zero_in_float64" in node}
    assert one_class
    for test in ("test_save_and_load_in_another_process", "test_a_file_is_as_good_as_a_name"):
        assert any(f"{c}::{test}" in own for c in one_class), test
    assert any("training/test_recipes.py::test_sio2_" in node for node in own)


def test_what_is_common_runs_in_one_family(everything: list[pytest.Item]):
    named = {item.path.name for item in everything}
    assert named.issuperset(COMMON_OF_B)
    for item in everything:
        families = marks(item).intersection(("common_a", "common_b"))
        assert len(families) == ("common" in marks(item)), item.nodeid


def test_backends_of_this_environment_are_there():
    """What the environment is to have is never skipped for want of it."""
    for name in _listed() or ():
        assert importlib.util.find_spec(PACKAGES[name]) is not None, name


def test_make_leaves_nothing_out():
    """The default ring's tests run in both families, what is common in one; the full command drops nothing."""
    assert re.search(r"^RING_test := \(quick or default\)$", MAKEFILE, re.MULTILINE)
    assert re.search(r"^RING_full := not outside_data$", MAKEFILE, re.MULTILINE)
    assert re.search(
        r"^SELECT = \$\(RING_\$\(1\)\) and \(common_\$\(2\) or not common\)$", MAKEFILE, re.MULTILINE
    )
    listed = "".join(re.findall(r"^BACKENDS_[ab] := (.*)$", MAKEFILE, re.MULTILINE))
    assert all(name in listed for name in PACKAGES)
    ci = (Path(__file__).parents[1] / ".ci/run").read_text(encoding="utf-8")
    assert re.findall(r"^make (.*)$", ci, re.MULTILINE)[-2:] == ["lint", "test"]
