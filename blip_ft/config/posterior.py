"""The section ``posterior``, whose keys are those of the family that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import SerializeAsAny, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import InitErrorDetails, PydanticCustomError

from blip_ft.families.base.options import FamilyOptions
from blip_ft.families.registry import DEFAULT, FAMILIES, family_options

#: ``PosteriorConfig(family="weight", init_std=0.01)``: options of that family
PosteriorConfig = family_options


def _of_its_family(value: Any, handler: ValidatorFunctionWrapHandler) -> FamilyOptions:
    """Validate a mapping as the options of the family that it names."""
    if isinstance(value, FamilyOptions) or not isinstance(value, Mapping):
        options: FamilyOptions = handler(value)
        return options
    name = value.get("family", DEFAULT)
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(f"'{n}'" for n in FAMILIES.names())
        problem = PydanticCustomError(
            "family", "there is no such family; valid names: {known}", {"known": known}
        )
        raise ValidationError.from_exception_data(
            "posterior", [InitErrorDetails(type=problem, loc=("family",), input=name)]
        )
    return FAMILIES[name].model_validate(dict(value))


#: type of the section in a recipe
PosteriorSection = SerializeAsAny[Annotated[FamilyOptions, WrapValidator(_of_its_family)]]
