"""From a YAML file and ``key=value`` arguments to a validated recipe.

Whatever is wrong in them is a :class:`~blip_ft.errors.RecipeError` that names file and key, and what
would be right.
"""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from blip_ft.config.checks import check_recipe
from blip_ft.config.recipe import Recipe
from blip_ft.errors import RecipeError, nearest
from blip_ft.families.registry import DEFAULT, families_with, options_class, without_foreign_keys


def shipped() -> dict[str, Path]:
    """Shipped recipes: name -> file."""
    folder = Path(str(files("blip_ft.recipes")))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def recipe_summary(path: Path) -> tuple[str, str]:
    """``adapter:checkpoint`` of a recipe, and the first paragraph of the comment at its head."""
    text = path.read_text(encoding="utf-8")
    model = yaml.safe_load(text)["model"]
    words = takewhile(lambda line: line.startswith("# "), text.splitlines())
    return f"{model['adapter']}:{model['checkpoint']}", " ".join(line[2:].strip() for line in words)


def load_recipe(name_or_path: str, overrides: list[str] | None = None, *, finished: bool = False) -> Recipe:
    """Read a recipe and apply ``key.subkey=value`` overrides (values are YAML).

    Args:
        name_or_path: a shipped recipe or a YAML file.
        overrides: applied in turn.
        finished: it is that of a finished run, perhaps of an earlier version of the program, which wrote the keys of
            all posterior families: those of others are dropped.

    Raises:
        RecipeError: no such recipe, not YAML, unknown key (with the nearest valid name), or a
            value of the wrong type or range.
    """
    path = shipped().get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise RecipeError(
            f"there is no recipe '{name_or_path}'",
            remedy=f"give a YAML file or a shipped name: {', '.join(shipped())}",
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not a YAML file: {error}", file=path, remedy="mend the syntax") from error
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of keys", file=path, remedy="see docs/recipes.md")
    tree = _numbers(tree)
    tree.setdefault("name", path.stem)
    for override in overrides or []:
        apply_override(tree, override)
    if finished and isinstance(tree.get("posterior"), dict):
        tree["posterior"] = without_foreign_keys(tree["posterior"])
    return parse_recipe(tree, file=path)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``key.subkey=value`` in a nested mapping; the value is YAML.

    Raises:
        RecipeError: not of this form, or a parent key that holds a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"cannot read the override '{override}'", remedy="write key=value, for instance seed=1"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of '{key}' is not YAML: {error}", field=key) from error
    value = _numbers(value)
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"'{parent}' has no keys below it", field=key, remedy="check the key")
    tree[last] = value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as a string; take it as the number that everyone means, at any depth."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def parse_recipe(tree: dict[str, Any], *, file: Path | None = None) -> Recipe:
    """Validate a nested mapping; all errors are collected into one message."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for item in error.errors():
            location = _location(item["loc"], tree)
            key = ".".join(location)
            if item["type"] == "extra_forbidden":
                text = f"unknown key '{key}': {_nearest(location, tree)}"
            else:
                text = f"'{key}': {item['msg'].lower()} (got {item['input']!r})"
            # the branches of a union each complain; one line per key is enough
            problems[key] = f"{problems[key]}, or {item['msg'].lower()}" if key in problems else text
        raise RecipeError(
            "; ".join(problems.values()),
            file=file,
            field=", ".join(problems),
            remedy="all keys: docs/recipes.md",
        ) from error
    check_recipe(recipe, file)
    return recipe


def _location(parts: tuple[int | str, ...], tree: Any) -> list[str]:
    """Path of an error in the recipe, without the tags that pydantic adds for union branches."""
    out: list[str] = []
    for i, part in enumerate(parts):
        if isinstance(tree, dict) and (part in tree or i == len(parts) - 1):
            out.append(str(part))
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            out.append(str(part))
            tree = tree[part]
    return out or [str(p) for p in parts]


def _nearest(location: list[str], tree: Any) -> str:
    """The nearest valid name, and who has this one: a key of another posterior family is none of this."""
    key, name = location[-1], DEFAULT
    if location[:-1] != ["posterior"]:
        return nearest(key, _siblings(location, name))
    name = tree["posterior"].get("family", DEFAULT)
    found, others = nearest(key, _siblings(location, name)), families_with(key)
    return (
        f"it belongs to posterior.family={', '.join(others)}, not to '{name}'; {found}" if others else found
    )


def _siblings(location: list[str], family: str) -> list[str]:
    """Valid keys at the depth of an unknown key."""
    section: type[BaseModel] = Recipe
    if location[:1] == ["posterior"]:
        section, location = options_class(family), location[1:]
    for part in location[:-1]:
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            break
        if issubclass(field.annotation, BaseModel):
            section = field.annotation
    return list(section.model_fields)
