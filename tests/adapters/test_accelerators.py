"""Options that ask for vendors' fused kernels are refused with the reason."""

from __future__ import annotations

import pytest

from blip_ft.adapters.shared.vendor import refuse_options
from blip_ft.backbones.registry import get_adapter
from blip_ft.errors import RecipeError

OPTIONS = {
    "enable_cueq": "cuequivariance",
    "cuequivariance_config": "cuequivariance",
    "enable_oeq": "openequivariance",
    "use_flash_tp": "FlashTP",
    "enable_flash": "FlashTP",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_kernels_and_the_reason_are_named(option: str):
    with pytest.raises(RecipeError, match=f"kernels of {OPTIONS[option]}.*weights of its own") as caught:
        refuse_options({option: True}, "sevennet", known=("modal",))
    assert caught.value.field == f"model.options.{option}"


@pytest.mark.parametrize("option", ["modla", "flashing", "cueqs"])
def test_other_options_are_unknown(option: str):
    with pytest.raises(RecipeError, match="has no option"):
        refuse_options({option: True}, "sevennet", known=("modal",))


@pytest.mark.parametrize(
    ("adapter", "option"),
    [
        pytest.param(name, option, marks=pytest.mark.backend(name))
        for name, option in (
            ("sevennet", "enable_flash"),
            ("sevennet", "enable_cueq"),
            ("mace", "enable_cueq"),
            ("mace", "enable_oeq"),
            ("chgnet", "enable_cueq"),
            ("fairchem", "enable_cueq"),
            ("orb", "enable_cueq"),
        )
    ],
)
def test_every_adapter_refuses_before_it_opens_a_file(adapter: str, option: str):
    with pytest.raises(RecipeError, match=f"leave '{option}' out"):
        get_adapter(adapter).load("none", **{option: True})
