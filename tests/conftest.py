"""In which ring a test runs, and on which backends.

**Rings.** `make test-quick`, `make test` and `make test-full` run one ring more each:

- ``full``: marked so. What the default ring has in a smaller form: real weights through the whole contract,
  further architectures and families, the recipes of papers.
- ``default``: what needs a vendor's package, or is marked so because it takes long on the fake backbone too.
- ``quick``: the rest.

``gpu`` and ``outside_data`` stand apart: they need what a clone has not, and have commands of their own.
``pytest_collection_modifyitems`` gives every test the mark of its ring.

**Backends.** A test marked ``@pytest.mark.backend("NAME")`` needs the real package of that adapter, or peft if it
is named ``lora``, or LAMMPS, or TorchSim. The environment variable ``BLIP_FT_BACKENDS`` (names, comma-separated) says
which ones this environment must have: a marked test of a listed backend fails if the package is absent, others are
skipped. Without the variable, tests run on the packages that are installed.

What touches no vendor's code is the same in both families of environments. Tests that need no backend get the mark
``common``, and ``common_a`` or ``common_b`` for the family of the two that runs them, so that both take about as long;
those of the files in ``ENVIRONMENT``, whose subject is the environment, run in both.

**Examples.** hypothesis tries the same 15 examples per property in every run, so that a change that has nothing to
do with them does not fail by them; with ``--hypothesis-profile=full`` (`make test-full`) 100 new ones.
"""

import importlib.util
import os

import hypothesis
import pytest

# the contract of adapters lies in the package, and asserts as tests do
pytest.register_assert_rewrite(
    *(f"blip_ft.testing.{name}" for name in ("contract", "conservative", "variational", "vendor", "helpers"))
)

RINGS = ("quick", "default", "full")
#: marks of tests that belong to no ring
APART = ("gpu", "outside_data")
#: files that are tested in every environment
ENVIRONMENT = ("test_packaging.py", "test_doctor.py")
#: files whose common tests run in family b, as it has the shorter tests of its own
COMMON_OF_B = (
    "test_halving.py",
    "test_predict_resume.py",
    "test_ranks.py",
    "test_resume.py",
)
#: import name of every adapter's package
PACKAGES = {
    "sevennet": "sevenn",
    "chgnet": "chgnet",
    "mace": "mace",
    "fairchem": "fairchem",
    "orb": "orb_models",
    "diep": "diep",
    "lora": "peft",  # no adapters, but extras that are treated like one
    "lammps": "lammps",
    "phonopy": "phonopy",
    "torchsim": "torch_sim",
}

#: all tests of a session, also those that an expression leaves out
COLLECTED = pytest.StashKey[list[pytest.Item]]()

hypothesis.settings.register_profile("few", deadline=None, max_examples=15, derandomize=True)
hypothesis.settings.register_profile("full", deadline=None, max_examples=100)
hypothesis.settings.load_profile("few")


def _listed() -> set[str] | None:
    text = os.environ.get("BLIP_FT_BACKENDS")
    return None if text is None else {name.strip() for name in text.split(",") if name.strip()}


def pytest_configure(config: pytest.Config) -> None:
    unknown = (_listed() or set()) - PACKAGES.keys()
    if unknown:
        raise pytest.UsageError(f"BLIP_FT_BACKENDS: unknown {sorted(unknown)}, known {sorted(PACKAGES)}")


def ring_of(item: pytest.Item) -> str | None:
    """The ring of a test, by its marks; none for what stands apart."""
    marks = {mark.name for mark in item.iter_markers()}
    if marks.intersection(APART):
        return None
    if "full" in marks:
        return "full"
    return "default" if marks.intersection(("default", "backend")) else "quick"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = list(items)
    for item in items:
        ring = ring_of(item)
        if ring is not None and item.get_closest_marker(ring) is None:
            item.add_marker(ring)
        if item.get_closest_marker("backend") is None and item.path.name not in ENVIRONMENT:
            item.add_marker("common")
            item.add_marker("common_b" if item.path.name in COMMON_OF_B else "common_a")


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
