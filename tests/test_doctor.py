"""What `blip-finetune doctor` says about environments that it did not see before."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points, version
from io import StringIO

import pytest
from rich.console import Console

from blip_ft.cli import environment


class Distribution:
    """As much of importlib.metadata.Distribution as the doctor reads."""

    def __init__(self, name: str, requires: list[str] | None, version: str = "1.2.3") -> None:
        self.name, self.requires, self.version = name, requires, version


def point(name: str, requires: list[str] | None, module: str = "blip_ft.adapters.x") -> EntryPoint:
    made = EntryPoint(name=name, value=f"{module}:X", group="blip_ft.adapters")
    object.__setattr__(made, "dist", Distribution("their-package", requires))
    return made


def test_installed_package_of_the_right_version_is_ready():
    state = environment.examine_adapter(point("x", ['numpy>=1 ; extra == "x"', "rich"]))
    assert state == {
        "available": True,
        "version": version("numpy"),
        "packages": {"numpy": version("numpy")},
        "family": "either",
    }


def test_missing_package_names_the_extra():
    state = environment.examine_adapter(
        point("x", ['no-such-thing>=1 ; extra == "x"', 'numpy ; extra == "x"'])
    )
    assert state["available"] is False
    assert state["version"] is None
    assert state["packages"] == {"no-such-thing": None, "numpy": version("numpy")}
    assert state["problem"] == "no-such-thing is not installed"
    assert state["remedy"] == "pip install 'their-package[x]'"


def test_package_of_the_wrong_version_is_not_ready():
    state = environment.examine_adapter(point("x", ['numpy>=9999 ; extra == "x"']))
    assert state["available"] is False
    assert state["problem"] == f"numpy {version('numpy')} is installed, >=9999 is needed"


@pytest.mark.parametrize(
    ("adapter", "clash"),
    [("mace", "fairchem, sevennet, orb"), ("sevennet", "mace"), ("chgnet", None)],
)
def test_remedy_says_what_the_extra_clashes_with(adapter: str, clash: str | None):
    state = environment.examine_adapter(point(adapter, [f'no-such-thing ; extra == "{adapter}"']))
    assert state["remedy"].startswith(f"pip install 'their-package[{adapter}]'")
    assert (f"not in one environment with {clash}" in state["remedy"]) == (clash is not None)


def test_requirements_of_other_extras_and_other_systems_do_not_count():
    found = environment.extra_requirements(
        point(
            "my_model",
            [
                "torch",
                'numpy ; extra == "test"',
                'pywin32 ; sys_platform == "nowhere" and extra == "my-model"',
                'scipy ; extra == "my-model"',
            ],
        )
    )
    assert [r.name for r in found] == ["scipy"]


@pytest.mark.parametrize("requires", [None, [], ["torch"]])
def test_adapter_without_an_extra_is_there_if_its_module_is(requires: list[str] | None):
    there = environment.examine_adapter(point("x", requires, module="blip_ft.testing.fake"))
    assert there == {"available": True, "version": "1.2.3", "packages": {}, "family": "either"}
    gone = environment.examine_adapter(point("x", requires, module="no_such_package.module"))
    assert gone["available"] is False
    assert "no_such_package.module" in gone["problem"]


@pytest.mark.parametrize(
    ("ready", "e3nn", "family"),
    [
        ({"b"}, "0.5.1", "b"),
        ({"a", "either"}, "0.4.4", "a"),
        ({"either"}, "0.4.4", "a"),
        ({"either"}, "0.6.0", "b"),
        ({"either"}, None, "either"),
    ],
)
def test_environment_family(monkeypatch: pytest.MonkeyPatch, ready: set[str], e3nn: str | None, family: str):
    monkeypatch.setattr(environment, "_installed", lambda package: e3nn)
    adapters = {f: {"available": True, "family": f} for f in ready}
    adapters["absent"] = {"available": False, "family": "a" if family == "b" else "b"}
    assert environment.environment_family(adapters) == family


def test_report_of_this_environment():
    report = environment.examine()
    names = {p.name for p in entry_points(group="blip_ft.adapters")}
    assert set(report["adapters"]) == names - {"fake"}
    assert report["torch"] == version("torch")
    assert report["device"].split(" ")[0] in ("cpu", "cuda", "mps")


def test_table_shows_state_and_remedy():
    report = environment.examine() | {
        "adapters": {
            "good": {"available": True, "version": "1.0", "packages": {"good": "1.0"}, "family": "b"},
            "bad": {
                "available": False,
                "version": None,
                "packages": {"bad": None},
                "family": "a",
                "problem": "bad is not installed",
                "remedy": "pip install 'blip-ft[bad]'",
            },
        }
    }
    out = StringIO()
    Console(file=out, width=200).print(environment.render(report))
    good, bad = (
        next(line for line in out.getvalue().splitlines() if f" {n} " in line) for n in ("good", "bad")
    )
    assert "ready" in good
    assert "good 1.0" in good
    assert "not available" in bad
    assert "bad is not installed: pip install 'blip-ft[bad]'" in bad
