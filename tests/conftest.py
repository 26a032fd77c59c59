"""Which backends the tests run on.

A test marked ``@pytest.mark.backend("NAME")`` needs the real package of that adapter, or peft if it
is named ``lora``. The environment variable ``BLIP_FT_BACKENDS`` (names, comma-separated) says which
ones this environment must have: a marked test of a listed backend fails if the package is absent, others are skipped. Without the
variable, tests run on the packages that are installed.

What touches no vendor's code is the same in both families of environments. Tests of the folders in ``COMMON`` that
need no backend get the mark ``common``, and `make test-a` leaves them to `make test-b`.
"""

import importlib.util
import os
from pathlib import Path

import pytest

#: folders whose tests use the fake backend or none, unless a mark names one
COMMON = ("cli", "data", "report", "training", "uncertainty")
#: import name of every adapter's package
PACKAGES = {
    "sevennet": "sevenn",
    "chgnet": "chgnet",
    "mace": "mace",
    "fairchem": "fairchem",
    "orb": "orb_models",
    "lora": "peft",  # no adapter, but an extra that is treated like one
}


def _listed() -> set[str] | None:
    text = os.environ.get("BLIP_FT_BACKENDS")
    return None if text is None else {name.strip() for name in text.split(",") if name.strip()}


def pytest_configure(config: pytest.Config) -> None:
    unknown = (_listed() or set()) - PACKAGES.keys()
    if unknown:
        raise pytest.UsageError(f"BLIP_FT_BACKENDS: unknown {sorted(unknown)}, known {sorted(PACKAGES)}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in COMMON and not any(item.iter_markers("backend")):
            item.add_marker("common")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in (mark.args[0] for mark in item.iter_markers("backend")):
        listed, installed = _listed(), importlib.util.find_spec(PACKAGES[name]) is not None
        if listed is not None and name not in listed:
            pytest.skip(f"backend {name} is not in BLIP_FT_BACKENDS")
        if not installed and listed is None:
            pytest.skip(f"backend {name} is not installed")
        if not installed:
            pytest.fail(f"BLIP_FT_BACKENDS lists {name}, but the package {PACKAGES[name]} is not installed")
