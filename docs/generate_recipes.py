"""Write docs/recipes.md from the recipe's schema: ``python docs/generate_recipes.py [--check]``.

One definition (``blip_ft/config``) gives validation, defaults and this page. ``--check`` only
compares; the exit code is 1 where the page is not current (``tests/test_config.py``).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from blip_ft.config import Recipe, recipe_summary, shipped
from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.registry import DEFAULT, FAMILIES

PAGE = Path(__file__).with_name("recipes.md")

HEAD = """\
<!-- Written by docs/generate_recipes.py from blip_ft/config: do not edit. `make docs` -->
# Recipes

A recipe is a YAML file with the keys below. `blip-finetune fit` takes a file or the name of a
shipped recipe, and `key=value` arguments that replace single values (values are YAML):

```
blip-finetune fit sio2_sevennet name=mine data.train=frames.extxyz trainer.max_epochs=40
```

Unknown keys are refused at every depth, with the nearest valid name. A key without a default is
required. Units are eV, Å, eV/Å and eV/Å³.
"""

TAIL = """
## `trainer`

Every keyword argument of `lightning.Trainer` under its own name, for instance

| key | meaning |
|---|---|
| `trainer.max_epochs` | passes over the training set |
| `trainer.accelerator` | `cpu`, `gpu`, `mps`, `auto` |
| `trainer.devices` | number of processes or devices |
| `trainer.gradient_clip_val` | largest norm of the gradient |
| `trainer.logger` | beside `metrics.csv`: `tensorboard` (default), `wandb`, `mlflow`, a list of these, or a mapping to arguments of Lightning's class: `{wandb: {project: sio2, offline: true}}`. The service's package is yours to install; `false` for none |
"""

#: JSON Schema's bounds in words
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def main() -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE} is not what the schema says: run `make docs`", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page as Markdown."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    source = section(definitions["SourceConfig"], definitions, prefix="data.train.")
    source += "\nThe type *source* is a path (text), this mapping, or a list of both: see [data](data.md).\n"
    return HEAD + shipped_table() + section(schema, definitions, prefix="") + source + TAIL


def shipped_table() -> str:
    """The shipped recipes with their model and what they are for."""
    lines = ["", "## Shipped recipes", "", "| name | model | about |", "|---|---|---|"]
    for name, path in shipped().items():
        model, about = recipe_summary(path)
        lines.append(f"| `{name}` | `{model}` | {about} |")
    return "\n".join(lines) + "\n"


def section(node: dict[str, Any], definitions: dict[str, Any], prefix: str, family: str = "") -> str:
    """One heading with a table of the keys of a section, then its subsections; or of those of a family."""
    heading = f"## `{prefix.rstrip('.')}`" if prefix else "## Top level"
    lines = ["", f"### `posterior.family: {family}`" if family else heading, ""]
    lines += [
        one_line(node.get("description", "")),
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    nested: list[tuple[str, dict[str, Any]]] = []
    for key, field in node["properties"].items():
        if prefix + key == "posterior.family":
            field |= {"enum": FAMILIES.known(), "default": DEFAULT}
        if "$ref" in field:
            nested.append((f"{prefix}{key}.", definitions[field["$ref"].rpartition("/")[2]]))
            continue
        if prefix + key == "trainer":
            continue
        for option in alternatives(field):  # a section that may be left out
            part = definitions.get(str(option.get("$ref", "")).rpartition("/")[2], {})
            if "properties" in part and "discriminator" not in field and not is_source(option):
                nested.append((f"{prefix}{key}.", part))
        required = key in node.get("required", []) and "default" not in field
        cells = [
            f"`{prefix}{key}`",
            type_text(field),
            "**required**" if required else f"`{json.dumps(field.get('default'), ensure_ascii=False)}`",
            one_line(field.get("description", "")),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    more = families(prefix) if prefix == "posterior." and not family else ""
    return "\n".join(lines) + "\n" + more + "".join(section(d, definitions, p) for p, d in nested)


def families(prefix: str) -> str:
    """One heading with a table of its own keys for every family of the package."""
    common = FamilyOptions.model_fields
    out = ""
    for name in FAMILIES.known():
        options = FAMILIES[name]
        if not options.__module__.startswith("blip_ft."):
            continue
        schema = options.model_json_schema()
        own = {k: v for k, v in schema["properties"].items() if k not in common}
        out += section(schema | {"properties": own}, schema.get("$defs", {}), prefix, family=name)
    return out


def type_text(field: dict[str, Any]) -> str:
    """The type of a key in words: ``number > 0``, ``one of a, b``, ``text or list of text``."""
    if "anyOf" in field or "oneOf" in field:
        options = alternatives(field)
        if any(is_source(option) for option in options):
            rest = [o for o in options if not is_source(o) and o.get("type") not in ("string", "array")]
            return " or ".join(["source", *(type_text(option) for option in rest)])
        return " or ".join(type_text(option) for option in options)
    if "$ref" in field:
        return "section"
    if "enum" in field:
        return "one of " + ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    match field.get("type"):
        case "array":
            return f"list of {type_text(field['items'])}"
        case "object":
            values = field.get("additionalProperties")
            return f"mapping of name to {type_text(values)}" if isinstance(values, dict) else "mapping"
        case kind:
            words = {"string": "text", "integer": "whole number", "boolean": "true or false", "null": "null"}
            limits = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
            return " ".join([words.get(str(kind), str(kind or "anything")), ", ".join(limits)]).strip()


def alternatives(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The forms that a value may have, those of nested choices too."""
    for key in ("anyOf", "oneOf"):
        if key in field:
            return [part for option in field[key] for part in alternatives(option)]
    return [field]


def is_source(option: dict[str, Any]) -> bool:
    """The mapping that may stand for a path."""
    return str(option.get("$ref", "")).endswith("/SourceConfig")


def one_line(text: str) -> str:
    """Docstring text for a table cell: one line, Markdown's code marks."""
    return " ".join(text.replace("``", "`").split())


if __name__ == "__main__":
    sys.exit(main())
