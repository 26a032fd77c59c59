"""Divisions that are written down and followed; groups that leak."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write

from blip_ft.config import DataConfig, SplitConfig
from blip_ft.data.check.leaks import group_leaks
from blip_ft.data.split.splits import Splits, load_splits
from blip_ft.data.split.splits_file import keys, to_json
from blip_ft.errors import DataError

Frames = Callable[..., list[Atoms]]


@pytest.fixture
def source(frames: Frames, tmp_path: Path) -> Path:
    """40 frames of four runs."""
    some = frames(40)
    for i, atoms in enumerate(some):
        atoms.info["run"] = f"run-{i // 10}"
    path = tmp_path / "a.traj"
    write(path, some)
    return path


def saved(splits: Splits, tmp_path: Path) -> str:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(to_json(splits.roles(), splits.rule, splits.dropped)))
    return str(path)


def members(splits: Splits) -> dict[str, set[str]]:
    """Coarse keys, which survive the rounding of text formats."""
    return {role: {key[1] for key in keys(part)} for role, part in splits.roles().items()}


def test_the_same_division_of_a_shuffled_and_renamed_file(source: Path, tmp_path: Path) -> None:
    first = load_splits(DataConfig(train=str(source)))
    file = saved(first, tmp_path)
    shuffled = read(source, ":")
    order = np.random.default_rng(1).permutation(len(shuffled))
    write(tmp_path / "other.extxyz", [shuffled[i] for i in order])
    config = DataConfig(train=str(tmp_path / "other.extxyz"), split=SplitConfig(by="file", file=file, seed=9))
    again = load_splits(config)
    assert members(again) == members(first)
    assert again.rule.startswith(f"Divided as {file} says.")


def test_further_frames_are_left_out_and_listed(source: Path, frames: Frames, tmp_path: Path) -> None:
    first = load_splits(DataConfig(train=str(source)))
    more = frames(3, seed=5)
    for atoms in more:
        atoms.info["run"] = "run-9"
    write(tmp_path / "more.traj", [*more, *read(source, ":")])
    config = DataConfig(
        train=str(tmp_path / "more.traj"), split=SplitConfig(by="file", file=saved(first, tmp_path))
    )
    again = load_splits(config)
    assert members(again) == members(first)
    assert [d.partition(": ")[2] for d in again.dropped] == ["not in the written division"] * 3


def test_frames_that_the_source_lacks_are_an_error(source: Path, tmp_path: Path) -> None:
    file = saved(load_splits(DataConfig(train=str(source))), tmp_path)
    config = DataConfig(train=f"{source}@0:25", split=SplitConfig(by="file", file=file))
    with pytest.raises(DataError, match=r"splits\.json.*frames of \w+ are not in .*a\.traj@0:25"):
        load_splits(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a written division"),
        ('{"roles": [1]}', "not a written division"),
        ('{"roles": {}, "format": 7}', "of format 7"),
        ('{"roles": {"train": []}, "format": 1}', "no role 'validation'"),
        (None, "cannot be opened"),
    ],
)
def test_files_that_are_no_division(text: str | None, words: str, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=words):
        load_splits(DataConfig(train=str(source), split=SplitConfig(by="file", file=str(file))))
    with pytest.raises(DataError, match="needs a file"):
        load_splits(DataConfig(train=str(source), split=SplitConfig(by="file")))


def test_blocks_in_time_of_each_run(source: Path) -> None:
    splits = load_splits(DataConfig(train=str(source), split=SplitConfig(by="block")))
    for role, part in splits.roles().items():
        by_run: dict[str, list[int]] = {}
        for group, frame in zip(part["group"], part["frame"], strict=True):
            by_run.setdefault(group, []).append(frame)
        assert len(by_run) == 4, role
        for places in by_run.values():
            assert places == list(range(places[0], places[-1] + 1)), "contiguous"
    assert max(splits.train["frame"][:4]) < min(splits.test["seen"]["frame"][:2])
    assert "contiguous blocks in file order inside each of 4 groups" in splits.rule


def test_compositions_stay_together(frames: Frames, tmp_path: Path) -> None:
    some = frames(60)
    rng = np.random.default_rng(0)
    for i, atoms in enumerate(some):
        atoms.calc = None
        atoms.numbers[: i % 6] = 1
        if i % 2:  # twice as large, of the same reduced formula
            some[i] = atoms = atoms.repeat((1, 1, 2))
            atoms.positions += rng.normal(0, 0.01, atoms.positions.shape)
        atoms.info["energy"] = -1.0
    write(tmp_path / "a.traj", some)
    splits = load_splits(DataConfig(train=str(tmp_path / "a.traj"), split=SplitConfig(by="composition")))
    formulas = [
        {tuple(sorted(z)[:: 2 if len(z) > 6 else 1]) for z in part["numbers"]}
        for part in splits.roles().values()
    ]
    assert sum(map(len, formulas)) == len(set.union(*formulas)) == 6


def test_copies_of_a_structure_stay_together(frames: Frames, tmp_path: Path) -> None:
    some = frames(12) * 2
    write(tmp_path / "a.traj", some)
    splits = load_splits(DataConfig(train=str(tmp_path / "a.traj"), split=SplitConfig(by="structure")))
    assert sum(len(part) for part in splits.roles().values()) == 24
    assert not splits.dropped
    parts = list(members(splits).values())
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12


# ---- leaks -------------------------------------------------------------------------------------


def test_a_group_in_two_roles_is_a_leak(source: Path) -> None:
    splits = load_splits(DataConfig(train=str(source), split=SplitConfig(by="random")))
    found = {finding.message.partition(":")[0]: finding for finding in group_leaks(splits)}
    assert set(found) == {"validation", "calibration", "test/seen"}
    assert found["test/seen"].kind == "leak"
    assert found["test/seen"].severity == "warning"
    assert len(found["test/seen"].frames) == len(splits.test["seen"])
    assert found["validation"].severity == "info"


def test_whole_groups_do_not_leak(source: Path) -> None:
    assert group_leaks(load_splits(DataConfig(train=str(source), split=SplitConfig(by="group")))) == []


def test_the_embedded_set_warns_of_nothing() -> None:
    findings = group_leaks(load_splits(DataConfig(train="sio2_polymorphs")))
    assert {f.severity for f in findings} <= {"info"}
