"""The same frames through five formats: one fingerprint, and one loss of the first epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from blip_ft.cli import main
from blip_ft.data.frame import fingerprint
from blip_ft.data.read.sources import load_source
from blip_ft.data.write.convert import convert

ENDINGS = (".extxyz", ".traj", ".db", ".parquet", ".jsonl")


@pytest.mark.default
def test_same_frames_in_five_formats(tmp_path: Path) -> None:
    frames = load_source("sio2_polymorphs@0:64")
    convert(frames, tmp_path / "source.extxyz")  # text with eight decimals: every format can hold it
    source = load_source(str(tmp_path / "source.extxyz"))
    fingerprints, losses = set(), []
    for ending in ENDINGS:
        path = convert(source, tmp_path / f"frames{ending}")
        fingerprints.add(fingerprint(load_source(str(path))))
        tree = {
            "name": f"run{ending[1:]}",
            "output": str(tmp_path / "runs"),
            "data": {"train": str(path), "split": {"by": "random"}},
            "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
            "posterior": {"family": "weight", "prior_scale": 0.1},
            "objective": {"temperature": 1e-3},
            "plain": {"enabled": False},
            "uncertainty": {"n_draws": 2},
            "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        }
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        assert main(["fit", str(recipe)]) == 0
        history = json.loads((tmp_path / f"runs/run{ending[1:]}/history.json").read_text())
        losses.append(history["blip"][0]["train_loss"])
    assert len(fingerprints) == 1
    assert losses == pytest.approx([losses[0]] * len(ENDINGS), rel=1e-9)
