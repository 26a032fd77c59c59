"""From a YAML file and ``key=value`` arguments to a validated recipe.

Whatever is wrong in them is a :class:`~blip_ft.errors.RecipeError` that names file and key, and what
would be right.
"""

from __future__ import annotations

import logging
import re
import typing
from collections.abc import Iterator
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
from blip_ft.families.registry import RENAMED as RENAMED_OF_POSTERIOR

#: a YAML file with more values, or nested deeper, is no recipe
MAX_VALUES, MAX_DEPTH = 100_000, 50


#: {section: {name of a key in earlier versions: its name now}}
RENAMED = {"objective": {"replay": "frames"}, "posterior": RENAMED_OF_POSTERIOR}

log = logging.getLogger("blip_ft")


def shipped() -> dict[str, Path]:
    """Shipped recipes: name -> file."""
    folder = Path(str(files("blip_ft.recipes")))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def recipe_summary(path: Path) -> tuple[str, str]:
    """``adapter:checkpoint`` of a recipe, and the first paragraph of the comment at its head."""
    text = path.read_text(encoding="utf-8")
    model = yaml.safe_load(text)["model"]
    words = takewhile(lambda line: line.startswith("# "), text.splitlines())
    about = " ".join(line[2:].strip() for line in words)
    return f"{model['adapter']}:{model['checkpoint']}", re.sub(r",? then$", ".", about)


def load_recipe(
    name_or_path: str, overrides: list[str] | None = None, *, finished: bool = False, frames: bool = True
) -> Recipe:
    """Read a recipe and apply ``key.subkey=value`` overrides (values are YAML).

    Args:
        name_or_path: a shipped recipe or a YAML file.
        overrides: applied in turn.
        finished: it is that of a finished run, perhaps of an earlier version of the program, which wrote the keys of
            all posterior families: those of others are dropped.
        frames: it must say what to train on, which recipes for a user's own system leave open.

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
        tree = _yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"cannot be opened: {error.strerror or error}", file=path, remedy="check that you may read it"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # what is no date, and undecodable text, are ValueErrors
        raise RecipeError(f"not a YAML file: {error}", file=path, remedy="mend the syntax") from error
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of keys", file=path, remedy="see docs/recipes.md")
    tree = _numbers(tree)
    tree.setdefault("name", path.stem)
    for override in overrides or []:
        apply_override(tree, override)
    if isinstance(data := tree.setdefault("data", {}), dict) and data.get("train") is None:
        if frames:
            raise RecipeError(
                "the recipe does not say what to train on",
                file=path,
                field="data.train",
                remedy=f"blip-finetune fit {name_or_path} data.train=frames.extxyz (any file that ASE reads)",
            )
        data["train"] = "-"
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
        value = _yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"the value of '{key}' is not YAML: {error}", field=key) from error
    value = _numbers(value)
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"'{parent}' has no keys below it", field=key, remedy="check the key")
    tree[last] = value


def _yaml(text: str) -> Any:
    """The content of a YAML text that is no larger than a recipe can be.

    Aliases of aliases stand for exponentially many values, and nothing limits how deep brackets are nested: both are
    counted before anything is built.

    Raises:
        yaml.YAMLError: bad syntax, or too many values.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise yaml.YAMLError(f"the alias '*{event.anchor}' stands inside what it stands for")
            total += sizes.get(str(event.anchor), 0)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before + 1
        if total > MAX_VALUES:
            raise yaml.YAMLError(f"more than {MAX_VALUES:,} values, aliases counted: no recipe has so many")
        if len(open_nodes) > MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels: no recipe is")
    return yaml.safe_load(text)


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
    """Validate a nested mapping; all errors are collected into one message.

    Keys that had other names in earlier versions are taken, with a note.
    """
    tree = _todays_names(tree)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems = problems_of(error, tree)
        raise RecipeError(
            "; ".join(problems.values()),
            file=file,
            field=", ".join(problems),
            remedy="all keys: docs/recipes.md",
        ) from error
    check_recipe(recipe, file)
    return recipe


def _todays_names(tree: dict[str, Any]) -> dict[str, Any]:
    """With keys as they are called now.

    Raises:
        RecipeError: a key is given by both names.
    """
    tree = dict(tree)
    for section, names in RENAMED.items():
        given = tree.get(section)
        if not isinstance(given, dict):
            continue
        for old in names.keys() & given.keys():
            new = names[old]
            if new in given:
                raise RecipeError(
                    f"'{section}.{old}' is the earlier name of '{section}.{new}', and both are given",
                    field=f"{section}.{new}",
                    remedy=f"remove {section}.{old}",
                )
            log.warning("%s.%s is called %s.%s now", section, old, section, new)
        tree[section] = {names.get(key, key): value for key, value in given.items()}
    return tree


def problems_of(
    error: ValidationError, tree: dict[str, Any], section: type[BaseModel] = Recipe
) -> dict[str, str]:
    """What is wrong with each key, in words.

    Args:
        error: of validation.
        tree: what was validated.
        section: as what.
    """
    problems: dict[str, str] = {}
    for item in error.errors():
        location = _location(item["loc"], tree)
        key = ".".join(location)
        if item["type"] == "extra_forbidden":
            text = f"unknown key '{key}': {_nearest(location, tree, section)}"
        else:
            text = f"'{key}': {_words(item['msg'])}"
            if item["type"] != "missing":
                text += f" (got {_short(item['input'])})"
        # where a value may be of several kinds each of them complains; one line per key is enough
        problems[key] = f"{problems[key]}, or {_words(item['msg'])}" if key in problems else text
    return problems


def _words(message: str) -> str:
    """A message of pydantic's without its terms."""
    text = message.removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    for theirs, ours in (("valid string", "text"), ("valid dictionary", "mapping"), ("valid list", "list")):
        text = text.replace(theirs, ours)
    return text.replace("input should", "should")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _location(parts: tuple[int | str, ...], tree: Any) -> list[str]:
    """Path of an error in the recipe, without the tags that pydantic adds for union branches."""
    out: list[str] = []
    parts = tuple(part for part in parts if part != "[key]")  # of a mapping whose keys are checked
    for i, part in enumerate(parts):
        if isinstance(tree, dict) and (part in tree or i == len(parts) - 1):
            out.append(str(part))
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            out.append(str(part))
            tree = tree[part]
    return out or [str(p) for p in parts]


def _nearest(location: list[str], tree: Any, section: type[BaseModel]) -> str:
    """The nearest valid name, and who has this one: a key of another posterior family is none of this."""
    key = location[-1]
    if section is not Recipe or location[:1] != ["posterior"]:
        return nearest(key, _siblings(location, section))
    name = tree["posterior"].get("family", DEFAULT)
    found = nearest(key, _siblings(location[1:], options_class(name)))
    others = families_with(key) if len(location) == 2 else []
    return (
        f"it belongs to posterior.family={', '.join(others)}, not to '{name}'; {found}" if others else found
    )


def _siblings(location: list[str], section: type[BaseModel]) -> list[str]:
    """Valid keys at the depth of an unknown key, below ``section``."""
    for part in location[:-1]:
        field = section.model_fields.get(part)
        if field is None:
            break
        section = next(_models(field.annotation), section)
    return list(section.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value of a type may be: itself, or members of unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)
