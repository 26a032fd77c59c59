"""What every section of a recipe is made of."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def expanded(text: str) -> str:
    """A path with ``~`` and ``$VARIABLES`` replaced as a shell does it; one that exists as it is written stays.

    Raises:
        ValueError: a variable is not set.
    """
    if not text.startswith("~") and "$" not in text:
        return text
    if os.path.lexists(text):
        return text
    out = os.path.expanduser(os.path.expandvars(text))  # noqa: PTH111 (Path would drop a slash at the end)
    unset = re.search(r"\$(\w+|\{\w+\})", out)
    if unset:
        raise ValueError(f"the variable {unset[0]} is not set")
    return out


def expanded_if_set(text: str) -> str:
    """The same without an error: of a model that was trained where a variable was set, the name is kept as it was."""
    try:
        return expanded(text)
    except ValueError:
        return text


#: a path, or a name that may be one
PathText = Annotated[str, AfterValidator(expanded)]
#: one that is only a record once the model is trained
OriginText = Annotated[str, AfterValidator(expanded_if_set)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, values are checked when they are set."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
