"""What this environment can do: adapters, their packages, and what to install for the others.

Nothing is imported but torch (to ask for the device): the state of a backend is read from the
metadata of the installed packages. An adapter's packages are those of the extra that bears its
name, in the distribution that registered it, so adapters of third parties are described too.
"""

from __future__ import annotations

import importlib.metadata
import platform
from importlib.metadata import EntryPoint, PackageNotFoundError
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from blip_ft.backbones.registry import ENTRY_POINT_GROUP, FAMILIES
from blip_ft.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

#: adapters that exist for tests and have no pretrained weights
_NOT_FOR_USERS = frozenset({"fake"})


def examine() -> dict[str, Any]:
    """The state of the environment, JSON-serialisable.

    Returns:
        ``adapters`` (name -> :func:`examine_adapter`), the versions of ``blip_ft``, ``python``,
        ``torch`` and ``e3nn``, ``device`` (``cpu``, ``cuda (name)``, ``mps``) and ``environment_family`` (``a``, ``b``,
        or ``either`` while nothing decides it).
    """
    points = sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name)
    adapters = {p.name: examine_adapter(p) for p in points if p.name not in _NOT_FOR_USERS}
    return {
        "adapters": adapters,
        "blip_ft": __version__,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "e3nn": _installed("e3nn"),
        "device": device(),
        "environment_family": environment_family(adapters),
    }


def examine_adapter(point: EntryPoint) -> dict[str, Any]:
    """The state of one adapter.

    Args:
        point: its entry point.

    Returns:
        ``available``; ``version`` of its main package (the first of its extra), ``None`` where
        that is missing; ``packages``, name -> version or ``None``; ``family``; and, where it is
        not available, ``problem`` and ``remedy``.
    """
    requirements = extra_requirements(point)
    packages: dict[str, str | None] = {}
    problems = []
    for requirement in requirements:
        found = _installed(requirement.name)
        packages[requirement.name] = found
        if found is None:
            problems.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is installed, {requirement.specifier} is needed")
    if not requirements and find_spec(point.module.partition(".")[0]) is None:
        problems.append(f"its module {point.module} is not installed")
    own = point.dist.version if point.dist is not None else None
    state: dict[str, Any] = {
        "available": not problems,
        "version": packages[requirements[0].name] if requirements else own,
        "packages": packages,
        "family": FAMILIES.get(point.name, "either"),
    }
    if problems:
        state |= {"problem": "; ".join(problems), "remedy": _remedy(point)}
    return state


def extra_requirements(point: EntryPoint) -> list[Requirement]:
    """Requirements of the extra that bears the adapter's name, in its distribution's order."""
    declared = (point.dist.requires if point.dist is not None else None) or []
    found = []
    for text in declared:
        requirement = Requirement(text)
        marker = requirement.marker
        only_here = marker is not None and not marker.evaluate({"extra": ""})
        if only_here and marker is not None and marker.evaluate({"extra": canonicalize_name(point.name)}):
            found.append(requirement)
    return found


def environment_family(adapters: dict[str, dict[str, Any]]) -> str:
    """Which family of backends this environment belongs to.

    mace-torch pins e3nn 0.4.4, the others need 0.5 or later: an available adapter that needs
    one of the two decides, then the installed e3nn.
    """
    taken = {s["family"] for s in adapters.values() if s["available"]} - {"either"}
    if len(taken) == 1:
        return str(taken.pop())
    e3nn = _installed("e3nn")
    if e3nn is None:
        return "either"
    return "a" if e3nn.startswith("0.4.") else "b"


def device() -> str:
    """The fastest device that torch can use."""
    import torch

    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def render(report: dict[str, Any]) -> Table:
    """The report as a table for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    facts = ("blip_ft", "python", "torch", "device")
    table = Table(
        title=", ".join(f"{key} {report[key]}" for key in facts),
        caption=f"environment family: {report['environment_family']}",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("adapter", "state", "version", "packages", "what to do"):
        table.add_column(column)
    for name, state in report["adapters"].items():
        packages = ", ".join(f"{k} {v or 'missing'}" for k, v in state["packages"].items())
        table.add_row(
            name,
            "[green]ready[/]" if state["available"] else "[red]not available[/]",
            state["version"] or "",
            escape(packages),
            escape(f"{state['problem']}: {state['remedy']}" if not state["available"] else ""),
        )
    return table


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except PackageNotFoundError:
        return None


def _remedy(point: EntryPoint) -> str:
    owner = point.dist.name if point.dist is not None else "blip-ft"
    family = FAMILIES.get(point.name, "either")
    clash = [n for n, f in FAMILIES.items() if {f, family} == {"a", "b"}]
    note = f" (not in one environment with {', '.join(clash)}: different e3nn)" if clash else ""
    return f"pip install '{owner}[{point.name}]'{note}"
