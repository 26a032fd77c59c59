"""A run that is killed and resumed is the uninterrupted one, bit for bit."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase.io import write

from blip_ft.data.frame import to_atoms
from blip_ft.data.read.sources import load_source
from blip_ft.training import pieces

from .labelled import frames

PROGRAM = Path(__file__).with_name("survival.py")

STEP = "blip_ft.training.module:FineTuneModule.training_step after"
KEEP = "blip_ft.training.pieces:Pieces.keep after"
ASK = "blip_ft.data.batch.ledger:Ledger._predict"
ROWS = "blip_ft.closed_form.gradients:GradientRows._fill"
DRAWS = "blip_ft.training.evaluate:predict_set after"
WRITE = "blip_ft.training.fit:whole_file"
FINISH = "blip_ft.training.run_folder:RunFolder.finish"
MANIFEST = "blip_ft.training.pieces:whole_file"

PATHWISE: dict[str, Any] = {
    "posterior": {"rank": 8, "projections": 2},
    "optimizer": {"ema_decay": 0.9, "learning_rate": 0.01},
    "plain": {"enabled": True},
}
ADAPTIVE: dict[str, Any] = {
    "posterior": {"family": "adaptive", "prior_scale": 0.1, "init_std": 0.05},
    "objective": {"kind": "elbo+crps", "temperature": 1e-3, "learn_noise": False},
    "data": {"batch_by": "atoms", "batch_size": 8, "num_workers": 1},
}
REPLAY: dict[str, Any] = {
    "posterior": {"family": "channel", "prior_scale": 0.1, "init_std": 0.05, "empirical_bayes": True},
    "objective": {"temperature": 1e-3, "learn_noise": True},
    "data": {"batch_size": 2, "replay": {"source": "replay.extxyz", "probe": "replay.extxyz"}},
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "accumulate_grad_batches": 2},
}
SKETCH: dict[str, Any] = {
    "posterior": {"family": "sketch", "buckets": 128, "rank": 8},
    "optimizer": {"learning_rate": 0.01},
}
SUBSPACE: dict[str, Any] = {
    "posterior": {"family": "subspace", "prior_scale": 0.3, "rank": 8, "projections": 4, "start": 0.0},
    "optimizer": {"learning_rate": 0.01},
}
POSTHOC: dict[str, Any] = {"posterior": {"family": "posthoc_laplace"}, "optimizer": {"learning_rate": 0.01}}


def prepare(folder: Path, sections: dict[str, Any]) -> Path:
    """A recipe of the fake backend, with frames that it has to learn."""
    write(folder / "train.extxyz", frames(24, other=True))
    write(folder / "replay.extxyz", frames(6, seed=5))
    tree: dict[str, Any] = {
        "output": str(folder / "runs"),
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "uncertainty": {"n_draws": 4, "calibration_draws": 4, "batch_size": 2},
        "trainer": {"max_epochs": 4, "accelerator": "cpu"},
    } | sections
    data = {"batch_size": 2, "train": "train.extxyz"} | tree.get("data", {})
    tree["data"] = data | {"train": str(folder / data["train"])}
    for key, name in data.get("replay", {}).items():
        data["replay"][key] = str(folder / Path(name).name)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def survive(folder: Path, chains: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Run the chains, the whole run first; signals and exit codes of their starts."""
    spec = folder / "spec.json"
    spec.write_text(json.dumps([{"name": "whole"}, *chains]))
    done = subprocess.run([sys.executable, PROGRAM, spec], capture_output=True, text=True, check=False)
    logs = "".join(p.read_text()[-1500:] for p in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    codes: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    assert all(c[-1] == 0 and set(c[:-1]) <= {-9} for c in codes.values()), f"{codes}\n{logs}"
    assert codes.pop("whole") == [0]
    return codes


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def differences(one: Path, other: Path) -> list[str]:
    """What of two runs is not the same to the last bit, but times."""
    out = [
        n
        for n in (
            "model/model.safetensors",
            "posterior.safetensors",
            "metrics.json",
            "calibration.json",
            "splits.json",
            "linearity.json",
            "drift.json",
        )
        if (one / n).exists() and (one / n).read_bytes() != (other / n).read_bytes()
    ]
    histories, receipts = (
        [json.loads((p / n).read_text()) for p in (one, other)] for n in ("history.json", "receipt.json")
    )
    for tree in [*receipts, *(row for h in histories for part in h.values() for row in part)]:
        tree.pop("seconds")
        tree.pop("blip_ft", None)
    out += [name for name, (a, b) in {"history": histories, "receipt": receipts}.items() if a != b]
    for path in (one / "predictions").iterdir():
        with np.load(path) as a, np.load(other / "predictions" / path.name) as b:
            out += [f"{path.name} {k}" for k in a.files if a[k].tobytes() != b[k].tobytes()]
    for name in ("metrics.csv", "plain/metrics.csv"):
        if (one / name).exists() and (not (other / name).exists() or rows(one / name) != rows(other / name)):
            out.append(name)
    if sorted(p.name for p in one.iterdir()) != sorted(p.name for p in other.iterdir()):
        out.append("files")
    return out


def compare(folder: Path, chains: list[dict[str, Any]]) -> None:
    codes = survive(folder, chains)
    for one in chains:
        assert len(codes[one["name"]]) > one.get("least", 1), (
            f"{one['name']} was not killed often enough: {codes}"
        )
        assert differences(folder / "runs/whole", folder / "runs" / one["name"]) == [], one["name"]


@pytest.mark.default
def test_killed_in_every_stage(tmp_path: Path) -> None:
    """The default family, the moving average and plain training, at a few points."""
    prepare(tmp_path, PATHWISE)
    chains = [
        {"name": "steps", "hook": STEP, "kills": 3, "first": 3, "step": 7},
        {"name": "pieces", "hook": KEEP, "kills": 3, "first": 4, "step": 9},
        {"name": "rows", "hook": ROWS, "kills": 2, "first": 2},
    ]
    compare(tmp_path, chains)


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param(PATHWISE, id="pathwise", marks=pytest.mark.default),
        pytest.param(ADAPTIVE, id="adaptive", marks=pytest.mark.full),
        pytest.param(REPLAY, id="replay", marks=pytest.mark.default),
        pytest.param(SKETCH, id="sketch", marks=pytest.mark.full),
        pytest.param(SUBSPACE, id="subspace", marks=pytest.mark.full),
        pytest.param(POSTHOC, id="posthoc", marks=pytest.mark.full),
    ],
)
def test_killed_at_ten_points_of_every_stage(sections: dict[str, Any], tmp_path: Path) -> None:
    prepare(tmp_path, sections)
    closed = sections["posterior"].get("family", "pathwise") in (
        "pathwise",
        "sketch",
        "subspace",
        "posthoc_laplace",
    )
    chains: list[dict[str, Any]] = [
        {"name": "pretrained", "hook": ASK, "kills": 10},
        {"name": "steps", "hook": STEP, "kills": 10, "least": 4},
        {"name": "pieces", "hook": KEEP, "kills": 10, "least": 5},
        {"name": "between", "hook": MANIFEST, "kills": 10, "first": 2, "least": 4},
        {"name": "draws", "hook": DRAWS, "kills": 10, "least": 2},
        {"name": "writing", "hook": WRITE, "kills": 10, "least": 5},
        {"name": "last", "hook": FINISH, "kills": 1},
    ]
    if closed:
        chains.append({"name": "rows", "hook": ROWS, "kills": 10})
    compare(tmp_path, chains)


@pytest.mark.default
def test_a_sketch_is_killed_between_its_pieces(tmp_path: Path) -> None:
    """What a posterior is updated with is kept beside it."""
    prepare(tmp_path, SKETCH | {"plain": {"enabled": False}})
    compare(tmp_path, [{"name": "pieces", "hook": KEEP, "kills": 2, "first": 5, "step": 3}])


@pytest.mark.default
def test_few_checkpoints_are_as_good(tmp_path: Path) -> None:
    """With the share of the time that they may take by default, and with none at all."""
    prepare(tmp_path, PATHWISE)
    chains = [
        {"name": "default", "hook": STEP, "kills": 2, "first": 5, "share": pieces.SHARE},
        {"name": "none", "hook": STEP, "kills": 2, "first": 5, "share": 0.0},
    ]
    compare(tmp_path, chains)


@pytest.mark.backend("chgnet")
def test_chgnet_is_killed(tmp_path: Path) -> None:
    """Real weights in float32: after a checkpoint between two steps, within the last rows, after predictions."""
    roles = {
        role: str(tmp_path / f"{role}.extxyz") for role in ("train", "validation", "calibration", "test")
    }
    for role, path in roles.items():
        rows_ = load_source(f"sio2_polymorphs@{role}").select(range(4))
        write(path, [to_atoms(row) for row in rows_])
    prepare(
        tmp_path,
        {
            "data": roles | {"batch_size": 2},
            "model": {"adapter": "chgnet", "checkpoint": "0.3.0"},
            "posterior": {"rank": 8, "projections": 1, "perturbed_share": 0.0},
            "uncertainty": {"n_draws": 2, "calibration_draws": 2, "linearity_frames": 0},
            "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        },
    )
    compare(tmp_path, [{"name": "pieces", "hook": KEEP, "kills": 2, "first": 3, "step": 2, "least": 2}])
