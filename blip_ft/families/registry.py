"""Posterior families by their names in a recipe; imports no torch.

A folder beside this file is a family if it has an ``options.py``. Another package gives its own as an entry point::

    [project.entry-points."blip_ft.families"]
    toy = "toy_family.options:ToyOptions"

and a program on the fly, by putting :func:`family` over the class.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from blip_ft.errors import RecipeError, nearest
from blip_ft.families.base.options import FamilyOptions
from blip_ft.registry import Registry, resolve

if TYPE_CHECKING:
    from blip_ft.families.base.posterior import Posterior

Options = TypeVar("Options", bound=type[FamilyOptions])

#: the family of a recipe that names none
DEFAULT = "pathwise"


def _folders() -> dict[str, str]:
    """{family: module of its options} of the folders beside this file."""
    return {
        path.parent.name: f"{__package__}.{path.parent.name}.options"
        for path in Path(__file__).parent.glob("*/options.py")
        if path.parent.name != "base"
    }


FAMILIES: Registry[type[FamilyOptions]] = Registry("blip_ft.families", _folders)


def family(options: Options) -> Options:
    """Register a class of options, a decorator; its name is the default of the key ``family``."""
    FAMILIES.add(options.name(), options)
    return options


def options_class(name: str) -> type[FamilyOptions]:
    """Keys and capabilities of a family.

    Raises:
        RecipeError: there is none of this name.
    """
    if name not in FAMILIES:
        raise RecipeError(
            f"there is no posterior family '{name}'",
            field="posterior.family",
            remedy=nearest(name, FAMILIES.names()),
        )
    return FAMILIES[name]


def posterior_class(name: str) -> type[Posterior]:
    """The mathematics of a family."""
    found: type[Posterior] = resolve(options_class(name).law)
    return found


def family_options(**keys: Any) -> FamilyOptions:
    """Options from the keys below ``posterior``, those of the family ``family``.

    Raises:
        RecipeError: there is no such family.
        pydantic.ValidationError: a key that the family does not have, or a wrong value.
    """
    return options_class(keys.get("family", DEFAULT)).model_validate(keys)


def families_with(key: str) -> list[str]:
    """Families that have a key of this name; of other packages only those in use: no message has to import them."""
    return [name for name in FAMILIES.known() if key in FAMILIES[name].model_fields]


#: keys that had other names in earlier versions
RENAMED = {"context": "perturbed_share"}


def todays_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """A flat mapping of the keys below ``posterior`` with the names that they have now."""
    return {RENAMED.get(key, key): value for key, value in keys.items()}


def without_foreign_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """A flat mapping of the keys below ``posterior`` without those that only other families have.

    Model folders of formats 1 and 2, and recipes of runs from then, hold the keys of all families.
    """
    own = options_class(keys.get("family", DEFAULT)).model_fields
    keys = todays_keys(keys)
    return {key: value for key, value in keys.items() if key in own or not families_with(key)}
