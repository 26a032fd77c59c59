"""The adapter of docs/adapters.md, as another package would bring it, in the contract that the package ships."""

from __future__ import annotations

import re
import runpy
import tempfile
from pathlib import Path

import torch

from blip_ft.backbones.protocol import Backbone
from blip_ft.library import bayesian
from blip_ft.testing.conservative import ConservativeContract

TEXT = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
(CODE,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "PairBackbone" in block)
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "pair.py").write_text(CODE, encoding="utf-8")
    SCOPE = runpy.run_path(str(Path(folder) / "pair.py"))


def make() -> Backbone:
    torch.manual_seed(0)
    backbone: Backbone = SCOPE["PairBackbone"].load("pair")
    return backbone


class TestThirdParty(ConservativeContract):
    @classmethod
    def load(cls) -> Backbone:
        return make()


def test_its_lines_are_few() -> None:
    assert len([line for line in CODE.splitlines() if line.strip()]) <= 75


def test_it_takes_variational_layers() -> None:
    potential = bayesian(make(), family="weight")
    assert potential.converted.report.counts["left"] == 0
    assert potential.converted.report.counts["noisy"] > 0
