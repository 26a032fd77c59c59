from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from ase import Atoms

from blip_ft.config import DataConfig
from blip_ft.data.frame import fingerprint
from blip_ft.data.read.sources import load_source
from blip_ft.data.split.splits import Splits, load_splits
from blip_ft.errors import DataError

Frames = Callable[..., list[Atoms]]
Save = Callable[..., str]


def sizes(splits: Splits) -> dict[str, int]:
    return {name: len(frames) for name, frames in splits.roles().items()}


def members(splits: Splits) -> dict[str, list[int]]:
    return {name: frames["frame"][:] for name, frames in splits.roles().items()}


def marked(frames: list[Atoms], key: str, values: list[Any]) -> list[Atoms]:
    for atoms, value in zip(frames, values, strict=True):
        if value is not None:
            atoms.info[key] = value
    return frames


# ---- the embedded set --------------------------------------------------------------------------


def test_embedded_set_has_the_splits_of_its_readme() -> None:
    splits = load_splits(DataConfig(train="sio2_polymorphs"))
    assert sizes(splits) == {
        "train": 36,
        "validation": 15,
        "calibration": 16,
        "test/seen": 30,
        "test/tridymite": 20,
        "test/stishovite": 58,
        "test/hot_quartz": 20,
    }
    assert "sio2_polymorphs names its own splits" in splits.rule
    assert "train 36, validation 15" in splits.rule
    assert splits.dropped == []


def test_embedded_set_shares_no_run_between_training_and_calibration_or_test() -> None:
    splits = load_splits(DataConfig(train="sio2_polymorphs"))
    runs = {role: set(frames["group"]) for role, frames in splits.roles().items()}
    assert all(run.endswith("-0") for run in runs["train"] | runs["validation"])
    assert all(run.endswith("-1") for run in runs["calibration"] | runs["test/seen"])


# ---- given roles -------------------------------------------------------------------------------


def test_all_roles_given(frames: Frames, save: Save) -> None:
    path = save(frames(10))
    config = DataConfig(
        train=f"{path}@0:4",
        validation=f"{path}@4:6",
        calibration=[f"{path}@6", f"{path}@7"],
        test={"seen": f"{path}@8", "far": f"{path}@9"},
    )
    splits = load_splits(config)
    assert members(splits) == {
        "train": [0, 1, 2, 3],
        "validation": [4, 5],
        "calibration": [6, 7],
        "test/seen": [8],
        "test/far": [9],
    }
    assert set(splits.test) == {"seen", "far"}


def test_one_test_source_is_the_seen_one(frames: Frames, save: Save) -> None:
    path = save(frames(12))
    splits = load_splits(DataConfig(train=f"{path}@0:9", test=f"{path}@9:"))
    assert members(splits)["test/seen"] == [9, 10, 11]
    assert sizes(splits)["train"] + sizes(splits)["validation"] + sizes(splits)["calibration"] == 9


def test_fields_and_units_apply_to_every_role(frames: Frames, renamed: Frames, save: Save) -> None:
    path = save(renamed(frames(4), energy="E", forces="F"))
    roles = {"train": "@0", "validation": "@1", "calibration": "@2", "test": "@3"}
    config = DataConfig(
        **{role: path + part for role, part in roles.items()},
        fields={"energy": "E", "forces": "F"},
        units={"energy": "kcal/mol"},
    )
    expected = [a.calc.results["energy"] / 23.0605 for a in frames(4)]
    splits = load_splits(config)
    assert [r["energy"][0] for r in splits.roles().values()] == pytest.approx(expected, rel=1e-4)


# ---- leaks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["validation", "calibration", "test"])
def test_a_frame_in_train_and_another_role_is_refused(frames: Frames, save: Save, role: str) -> None:
    path = save(frames(30))
    config = DataConfig(train=f"{path}@0:20", **{role: f"{path}@18:24"})
    with pytest.raises(
        DataError, match=rf"the frame stands in {role}.*frame 1[89] .*in train; 2 such frames in all"
    ):
        load_splits(config)


def test_validation_and_calibration_may_not_share_either(frames: Frames, save: Save) -> None:
    path = save(frames(30))
    config = DataConfig(train=f"{path}@0:20", validation=f"{path}@20:25", calibration=f"{path}@24:")
    with pytest.raises(DataError, match=r"stands in calibration and.* in validation"):
        load_splits(config)


def test_a_copy_in_another_format_cell_image_and_order_is_found(frames: Frames, save: Save) -> None:
    all_frames = frames(8)
    copy = all_frames[2].copy()[[5, 1, 0, 2, 4, 3]]
    copy.positions += [1, -2, 1] @ copy.cell.array
    copy.wrap()
    copy.info["REF_energy"] = -1.0
    config = DataConfig(train=save(all_frames, "a.xyz"), validation=save([copy], "b.traj"))
    with pytest.raises(
        DataError, match=r"b\.traj, frame 0: the frame stands in validation and, as frame 2 of .*a\.xyz"
    ):
        load_splits(config)


def test_test_sets_may_share_frames_with_one_another(frames: Frames, save: Save) -> None:
    path = save(frames(12))
    splits = load_splits(DataConfig(train=f"{path}@:8", test={"both": f"{path}@8:", "last": f"{path}@11"}))
    assert sizes(splits)["test/both"] == 4
    assert sizes(splits)["test/last"] == 1


# ---- own column --------------------------------------------------------------------------------


NAMES = ["train"] * 6 + ["valid"] * 2 + ["calibration"] * 2 + ["test"] * 2 + ["glass"] * 2


@pytest.mark.parametrize("by", ["auto", "given"])
def test_own_column(frames: Frames, save: Save, by: str) -> None:
    path = save(marked(frames(14), "split", NAMES))
    splits = load_splits(DataConfig(train=path, split={"by": by}))
    assert members(splits) == {
        "train": [0, 1, 2, 3, 4, 5],
        "validation": [6, 7],
        "calibration": [8, 9],
        "test/seen": [10, 11],
        "test/glass": [12, 13],
    }


def test_roles_that_the_column_lacks_are_divided_off_its_train_frames(frames: Frames, save: Save) -> None:
    path = save(marked(frames(14), "split", ["train"] * 10 + ["val"] * 4))
    splits = load_splits(DataConfig(train=path))
    got = members(splits)
    assert got["validation"] == [10, 11, 12, 13]
    assert sorted(got["train"] + got["calibration"] + got["test/seen"]) == list(range(10))
    assert min(len(m) for m in got.values()) >= 1


def test_given_needs_the_column_to_name_the_roles(frames: Frames, save: Save) -> None:
    path = save(marked(frames(6), "split", ["train"] * 4 + ["val"] * 2))
    with pytest.raises(DataError, match="no frames for calibration; it names train, validation"):
        load_splits(DataConfig(train=path, split={"by": "given"}))
    splits = load_splits(DataConfig(train=f"{path}@0:5", calibration=f"{path}@5", split={"by": "given"}))
    assert members(splits) == {"train": [0, 1, 2, 3], "validation": [4], "calibration": [5]}
    assert splits.test == {}


def test_given_without_a_column_is_refused(frames: Frames, save: Save) -> None:
    with pytest.raises(DataError, match="no column that names splits") as error:
        load_splits(DataConfig(train=save(frames(9)), split={"by": "given"}))
    assert error.value.field == "data.split.by"
    assert "data.fields: {split: my_key}" in error.value.remedy


def test_frames_without_a_split_beside_others_are_refused(frames: Frames, save: Save) -> None:
    path = save(marked(frames(9), "split", ["train"] * 5 + ["val"] * 3 + [None]))
    with pytest.raises(DataError, match="frame 8, field 'split': the frame names no split"):
        load_splits(DataConfig(train=path))
    assert sum(sizes(load_splits(DataConfig(train=path, split={"by": "random"}))).values()) == 9


def test_a_column_of_other_names_says_nothing(frames: Frames, save: Save) -> None:
    path = save(marked(frames(20), "split", ["fold-1", "fold-2"] * 10))
    assert "at random" in load_splits(DataConfig(train=path)).rule


def test_marked_frames_never_become_training_frames_of_a_recipe_that_gives_the_role(
    frames: Frames, save: Save
) -> None:
    path = save(marked(frames(14), "split", NAMES))
    other = save(frames(2, seed=5), "other.xyz")
    splits = load_splits(DataConfig(train=path, test=other))
    assert fingerprint(splits.test["seen"]) == fingerprint(load_source(other))
    assert set(splits.test) == {"seen"}
    assert members(splits)["train"] == [0, 1, 2, 3, 4, 5]
    assert len(splits.dropped) == 4
    assert splits.dropped[0] == f"{path}, frame 10: marked 'test', and the recipe gives test otherwise"
    assert "4 frames are in no role" in splits.rule


# ---- groups and chance -------------------------------------------------------------------------


def test_by_group(frames: Frames, save: Save) -> None:
    path = save(marked(frames(40), "trajectory", [f"run-{i % 8}" for i in range(40)]))
    for by in ("auto", "group"):
        splits = load_splits(DataConfig(train=path, split={"by": by}))
        groups = [set(part["group"]) for part in splits.roles().values()]
        assert sum(len(g) for g in groups) == len(set.union(*groups)) == 8
        assert "whole groups (8 groups, seed 0)" in splits.rule


def test_explicit_group_key(frames: Frames, save: Save) -> None:
    path = save(marked(frames(20), "batch", [i // 4 for i in range(20)]))
    splits = load_splits(DataConfig(train=path, fields={"group": "batch"}))
    assert "whole groups (5 groups" in splits.rule


def test_group_without_groups_is_refused(frames: Frames, save: Save) -> None:
    with pytest.raises(DataError, match=r"name no groups\n.*group: my_key"):
        load_splits(DataConfig(train=save(frames(9)), split={"by": "group"}))


def test_files_are_groups_where_frames_name_none(frames: Frames, save: Save, tmp_path: Any) -> None:
    for i in range(5):
        save(frames(4, seed=i), f"run-{i}.xyz")
    splits = load_splits(DataConfig(train=f"{tmp_path}/run-*.xyz"))
    assert "whole groups (5 groups" in splits.rule
    sources = [set(part["source"]) for part in splits.roles().values()]
    assert sum(len(s) for s in sources) == 5


def test_one_group_is_cut_into_blocks(frames: Frames, save: Save) -> None:
    path = save(marked(frames(20), "config_type", ["zeolite"] * 20))
    splits = load_splits(DataConfig(train=path))
    assert members(splits) == {
        "train": list(range(10)),
        "validation": [10, 11, 12],
        "calibration": [13, 14, 15],
        "test/seen": [16, 17, 18, 19],
    }
    assert "contiguous blocks in file order" in splits.rule


@pytest.mark.parametrize("n", [4, 12, 50])
def test_at_random(frames: Frames, save: Save, n: int) -> None:
    config = DataConfig(train=save(frames(n)))
    splits, again = load_splits(config), load_splits(config)
    assert sorted(itertools.chain.from_iterable(members(splits).values())) == list(range(n))
    assert min(sizes(splits).values()) >= 1
    assert members(splits) == members(again)
    assert "Divided at random (seed 0)" in splits.rule
    if n == 50:
        other = load_splits(DataConfig(train=config.train, split={"seed": 1}))
        assert members(other) != members(splits)


def test_shares_are_those_of_the_recipe(frames: Frames, save: Save) -> None:
    config = DataConfig(train=save(frames(40)), split={"validation": 0.1, "calibration": 0.2, "test": 0.3})
    assert sizes(load_splits(config)) == {"train": 16, "validation": 4, "calibration": 8, "test/seen": 12}


def test_too_few_frames(frames: Frames, save: Save) -> None:
    with pytest.raises(
        DataError, match="3 frames cannot be divided into train, validation, calibration, test"
    ):
        load_splits(DataConfig(train=save(frames(3))))


def test_copies_do_not_leak_through_a_division(frames: Frames, save: Save) -> None:
    some = frames(12)
    path = save([*some, *[a.copy() for a in some]])
    with pytest.raises(DataError, match="neither energy nor forces"):  # copies lose their labels
        load_splits(DataConfig(train=path))
    path = save([*some, *frames(12)], "twice.xyz")
    splits = load_splits(DataConfig(train=path, split={"by": "random"}))
    place: dict[int, str] = {}
    for role, indices in members(splits).items():
        for index in indices:
            assert place.setdefault(index % 12, role) == role
    assert len(splits.dropped) + sum(sizes(splits).values()) == 24
    assert splits.dropped
    assert all("same structure as a frame of" in text for text in splits.dropped)


def test_a_role_emptied_by_copies_is_refused(frames: Frames, save: Save) -> None:
    with pytest.raises(DataError, match="no frame is left for"):
        load_splits(DataConfig(train=save(frames(1) * 8)))


def test_an_empty_source_is_refused(frames: Frames, save: Save) -> None:
    path = save(frames(6))
    with pytest.raises(DataError, match="selects no frame"):
        load_splits(DataConfig(train=f"{path}@0:4", validation=f"{path}@10:"))


@pytest.mark.parametrize("name", ["all", "unseen", "train"])
def test_reserved_names_of_test_sets(frames: Frames, save: Save, name: str) -> None:
    path = save(frames(9))
    with pytest.raises(DataError, match=f"a test set cannot be called '{name}'"):
        load_splits(DataConfig(train=f"{path}@:8", test={name: f"{path}@8"}))
