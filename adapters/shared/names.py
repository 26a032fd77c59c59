"""What a model's configuration may name.

A configuration, in a vendor's checkpoint or in our own JSON, says which classes a model is made of. A name that is
looked up is as good as code. So each adapter has a closed list of what may be named, with the full name that each
object gives itself, by its own module and name: the two are compared before anything is called.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from blip_ft.errors import CheckpointError


def own_name(found: Any) -> str:
    """Module and name that a class or function gives itself, ``module.name``."""
    return f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"


def check_listed(name: Any, names: Collection[str], kind: str, *, file: Path | str | None = None) -> str:
    """The name, if it is in a closed list.

    Args:
        name: as the configuration has it.
        names: the list.
        kind: what is listed, in words: ``UMA or eSEN classes``.
        file: for the message.

    Raises:
        CheckpointError: it is not in the list.
    """
    if isinstance(name, str) and name in names:
        return name
    raise CheckpointError(
        f"its configuration names '{name}', which is none of the {kind} that this adapter knows",
        remedy="use a model as its vendor publishes or trains it; if this is one, it needs a newer blip-ft",
        file=file,
    )


def check_object(
    found: Any, name: str, names: Mapping[str, str], kind: str, *, file: Path | str | None = None
) -> Any:
    """What a listed name has led to, if that calls itself as the list says.

    Args:
        found: a class or function, not called yet.
        name: of the list.
        names: {name in configurations: the object's own full name}.
        kind: as for :func:`check_listed`.
        file: for the message.

    Raises:
        CheckpointError: it is another object.
    """
    if own_name(found) == names[name]:
        return found
    raise CheckpointError(
        f"its configuration names '{name}', which here is {own_name(found)}, none of the {kind} that this "
        f"adapter knows",
        remedy="see 'blip-finetune doctor' for the version of the package; another module may have replaced the class",
        file=file,
    )
