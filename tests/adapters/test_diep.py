"""DIEP fulfils the contract; both frames, ties and straight triplets, steps of the energy, files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from blip_ft.adapters.diep.backbone import DIEPBackbone
from blip_ft.backbones.protocol import Backbone
from blip_ft.testing.conservative import ConservativeContract
from blip_ft.testing.variational import VariationalContract
from blip_ft.testing.vendor import VendorContract

pytestmark = pytest.mark.backend("diep")


def folder() -> Path:
    import diep

    return Path(diep.__file__).parent / "pretrained_models/diep_fold1"


class TestDIEP(VendorContract, ConservativeContract, VariationalContract):
    package = "diep"
    suffix = ".pt"
    named = ("arguments", "activation_type")

    @classmethod
    def load(cls) -> Backbone:
        return DIEPBackbone.load("fold1")

    @classmethod
    def file(cls) -> Path:
        return folder() / "state.pt"

    @classmethod
    def reload(cls, path: Path, *, trust: bool = False) -> Backbone:
        if not path.with_name("model.pt").exists():
            shutil.copy(folder() / "model.pt", path.parent)
        return DIEPBackbone.load(str(path), trust=trust)
