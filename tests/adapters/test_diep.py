"""DIEP fulfils the contract; both frames, ties and straight triplets, steps of the energy, files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ase import Atoms

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
    step = 1e-5  # at 1e-4 Å two sides of a triplet of the slab change places

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

    @pytest.mark.parametrize("name", ["quartz", "no_ties"])
    def test_stress_is_the_strain_derivative(
        self, backbone: Backbone, structures: dict[str, Atoms], name: str
    ) -> None:
        """Not where lattice vectors are equally long: the energy has a kink there (``test_at_a_tie``)."""
        no_ties = structures["periodic_atom"].copy()
        no_ties.set_cell(no_ties.cell.array * [1.0, 1.02, 1.05], scale_atoms=True)
        super().test_stress_is_the_strain_derivative(backbone, structures | {"no_ties": no_ties}, name)
