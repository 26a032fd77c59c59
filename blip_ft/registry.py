"""Things by name: the package's own, those of installed packages, and those that a program registers itself.

A posterior family or a term of the objective is found by its name in a recipe. Nobody has to list it: it is
registered where it is written (a decorator), and a package that is not this one names it as an entry point.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> thing; modules are imported when a name of theirs is asked for.

    Args:
        group: of entry points, for instance ``blip_ft.families``.
        own: gives {name: module} of the package's own; importing the module registers the name.
    """

    def __init__(self, group: str, own: Callable[[], Mapping[str, str]] = dict) -> None:
        self.group, self._own = group, own
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register; a class of the same module and name replaces itself, as when a module is loaded again.

        Raises:
            ValueError: another thing has this name.
        """
        known = self._items.get(name)
        if known is not None and known != item and _place(known) != _place(item):
            raise ValueError(f"{self.group} has a '{name}' already: {known!r}")
        self._items[name] = item
        return item

    def remove(self, name: str) -> None:
        """Forget what was registered under a name."""
        self._items.pop(name, None)

    def known(self) -> list[str]:
        """Names that need no import of another package: our own, and what is registered by now."""
        return sorted({*self._own(), *self._items})

    def names(self) -> list[str]:
        """All names, those of packages that were not asked for yet too; nothing is imported."""
        return sorted({*self.known(), *importlib.metadata.entry_points(group=self.group).names})

    def __contains__(self, name: object) -> bool:
        return name in self.known() or name in self.names()

    def __getitem__(self, name: str) -> T:
        """The thing of this name.

        Raises:
            KeyError: there is none.
        """
        if name not in self._items:
            module = self._own().get(name)
            if module is not None:
                importlib.import_module(module)
            else:
                for point in importlib.metadata.entry_points(group=self.group, name=name):
                    item = point.load()
                    self._items.setdefault(name, item)  # a decorator may have registered it
        return self._items[name]


def _place(item: object) -> tuple[str, str]:
    return getattr(item, "__module__", ""), getattr(item, "__qualname__", repr(item))


def resolve(place: Any) -> Any:
    """What ``module:attribute`` names; anything that is no text is itself."""
    if not isinstance(place, str):
        return place
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)
