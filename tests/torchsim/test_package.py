"""Where TorchSim is not installed."""

from __future__ import annotations

import sys

import pytest

from blip_ft.errors import MissingBackendError
from blip_ft.torchsim import TorchSimModel
from blip_ft.torchsim.package import with_interface


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    with_interface.cache_clear()
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    with pytest.raises(MissingBackendError, match="torch-sim-atomistic") as raised:
        TorchSimModel(None)
    assert "blip-ft[torchsim]" in raised.value.remedy
