"""The contract of adapters that load a vendor's files."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from blip_ft.backbones.protocol import Backbone
from blip_ft.backbones.registry import missing_backend
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.errors import CheckpointError, RecipeError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import load_model, save_model
from blip_ft.potential.checks import sealed
from blip_ft.testing.contract import AdapterContract
from blip_ft.testing.helpers import evaluate, same
from blip_ft.variational.convert import convert

#: a harmless class that no adapter knows
FOREIGN = "collections.OrderedDict"


class VendorContract(AdapterContract):
    """Files, trust and packages."""

    #: import name of the vendor's package
    package: ClassVar[str]
    #: how files in the vendor's format end
    suffix: ClassVar[str]
    #: where its configuration names a class, or whatever else is looked up by name
    named: ClassVar[tuple[str | int, ...]]

    # ---- to be given ---------------------------------------------------------------------
    @classmethod
    def file(cls) -> Path:
        """The file that ``load`` reads."""
        raise NotImplementedError

    @classmethod
    def reload(cls, path: Path, *, trust: bool = False) -> Backbone:
        """Load a file in the vendor's format."""
        raise NotImplementedError

    # ---- files ---------------------------------------------------------------------------
    def test_a_file_is_as_good_as_a_name(self, native, quartz):
        twin = self.reload(self.file())
        same(evaluate(twin, quartz), evaluate(native, quartz), 1e-6)
        assert twin.origin["checkpoint"] == str(self.file())

    def test_the_origin_is_the_files_fingerprint(self, native):
        assert native.origin["sha256"] == hashlib.sha256(self.file().read_bytes()).hexdigest()

    def test_a_file_cut_in_half(self, tmp_path):
        whole = self.file().read_bytes()
        half = tmp_path / f"half{self.suffix}"
        half.write_bytes(whole[: len(whole) // 2])
        for trust in (False, True):
            with pytest.raises(CheckpointError, match="damaged") as caught:
                self.reload(half, trust=trust)
            assert caught.value.file == str(half)

    @pytest.mark.parametrize("trust", [False, True])
    def test_a_file_of_another_kind(self, tmp_path, trust):
        text, other = tmp_path / f"text{self.suffix}", tmp_path / f"other{self.suffix}"
        text.write_text("these are not the weights you are looking for")
        torch.save({"weights": torch.ones(3)}, other)
        for path in (text, other):
            with pytest.raises(CheckpointError) as caught:
                self.reload(path, trust=trust)
            assert caught.value.file == str(path)

    def test_code_in_a_file_runs_only_if_trusted(self, tmp_path):
        bomb, traces = tmp_path / f"bomb{self.suffix}", tmp_path / "exploded"
        torch.save({"config": Bomb(str(traces)), "model": Bomb(str(traces))}, bomb)
        with pytest.raises(CheckpointError, match="trust"):
            self.reload(bomb)
        assert not traces.exists()
        with pytest.raises(CheckpointError):
            self.reload(bomb, trust=True)
        assert traces.exists()

    def test_a_model_folder_names_what_is_listed_only(self, native, tmp_path):
        """Our own format is JSON, in which a name that is looked up would be as good as code."""
        potential = BayesianPotential(
            copy.deepcopy(native),
            ModelConfig(adapter=native.name, checkpoint="-"),
            PosteriorConfig(family="channel"),
        )
        save_model(potential, tmp_path / "model")
        file = tmp_path / "model/model.json"
        meta = json.loads(file.read_text(encoding="utf-8"))
        entry = meta["backbone"]
        *parents, last = self.named
        for key in parents:
            entry = entry[key]
        assert last in entry
        entry[last] = FOREIGN
        file.write_text(json.dumps(sealed(meta)), encoding="utf-8")
        with pytest.raises(CheckpointError, match=f"names '{FOREIGN}', which is none of") as caught:
            load_model(tmp_path / "model")
        assert caught.value.file == str(file) or caught.value.file == native.origin["checkpoint"]

    def test_missing_file(self, native, tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            type(native).load(str(tmp_path / "gone.pth"))

    def test_unknown_option(self, native):
        with pytest.raises(RecipeError, match="no option 'colour'"):
            type(native).load(native.origin["checkpoint"], colour="red")

    # ---- the package ---------------------------------------------------------------------
    def test_a_missing_package_names_its_extra(self, native, monkeypatch):
        for module in [m for m in sys.modules if m.split(".")[0] == self.package]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"blip-ft\[{native.name}\]") as caught:
            type(native).load("any")
        assert str(caught.value) == str(missing_backend(native.name, self.package))

    def test_importing_the_adapter_imports_no_backend(self, elsewhere):
        assert "blip_ft" in elsewhere["imported"]
        assert self.package not in elsewhere["imported"]

    def test_the_stock_calculator_must_come_before_conversion(self, native):
        model = copy.deepcopy(native)
        convert(model)
        with pytest.raises(RuntimeError, match="before"):
            model.stock_calculator()


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))
