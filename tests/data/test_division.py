from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.data.split.division import by_group, by_random, counts, fractions
from blip_ft.errors import DataError

SHARES = {"train": 0.5, "validation": 0.15, "calibration": 0.15, "test": 0.2}
shares = st.lists(st.floats(0.05, 0.3), min_size=1, max_size=3).map(
    lambda f: fractions(dict(zip(["validation", "calibration", "test"], f, strict=False)), 1000, "set")
)


def partition(roles: dict[str, list[int]], n: int) -> bool:
    return sorted(itertools.chain.from_iterable(roles.values())) == list(range(n))


def test_train_takes_what_the_others_leave() -> None:
    result = fractions({"validation": 0.15, "test": 0.2}, 100, "set")
    assert result == pytest.approx({"train": 0.65, "validation": 0.15, "test": 0.2})
    assert next(iter(result)) == "train"


def test_shares_that_leave_nothing_are_refused() -> None:
    with pytest.raises(DataError, match=r"validation, test take 110% of the frames.*data\.split|data\.split"):
        fractions({"validation": 0.6, "test": 0.5}, 100, "set")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_frames_than_roles_are_refused(n: int) -> None:
    with pytest.raises(DataError, match=f"set.xyz: {n} frames? cannot be divided into train, validation"):
        fractions({"validation": 0.1, "calibration": 0.1, "test": 0.1}, n, "set.xyz")


def test_twelve_frames() -> None:
    assert counts(12, SHARES) == {"train": 6, "validation": 2, "calibration": 2, "test": 2}


def test_four_frames_give_one_each() -> None:
    assert counts(4, SHARES) == dict.fromkeys(SHARES, 1)


@given(n=st.integers(4, 500), shares=shares)
def test_counts_are_complete_and_near_the_shares(n: int, shares: dict[str, float]) -> None:
    result = counts(n, shares)
    assert sum(result.values()) == n
    assert min(result.values()) >= 1
    if n >= 40:
        for role, share in shares.items():
            assert abs(result[role] - share * n) <= len(shares)


@given(n=st.integers(4, 200), shares=shares, seed=st.integers(0, 10))
def test_random_division_is_a_partition_and_repeatable(n: int, shares: dict[str, float], seed: int) -> None:
    roles, rule = by_random(n, shares, seed)
    assert partition(roles, n)
    assert all(roles.values())
    assert (roles, rule) == by_random(n, shares, seed)
    assert f"seed {seed}" in rule


def test_seeds_differ() -> None:
    assert by_random(50, SHARES, 0)[0] != by_random(50, SHARES, 1)[0]
    groups = [str(i // 2) for i in range(60)]
    assert by_group(groups, SHARES, 0)[0] != by_group(groups, SHARES, 1)[0]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=4, max_size=25),
    shares=shares,
    seed=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
def test_groups_stay_whole(sizes: list[int], shares: dict[str, float], seed: int, order: object) -> None:
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    order.shuffle(groups)  # type: ignore[attr-defined]
    roles, rule = by_group(groups, shares, seed)
    assert partition(roles, len(groups))
    assert all(roles.values())
    home: dict[str, str] = {}
    for role, indices in roles.items():
        for index in indices:
            assert home.setdefault(groups[index], role) == role
    assert "whole groups" in rule


def test_groups_meet_the_shares_where_they_can() -> None:
    groups = [str(i // 5) for i in range(200)]
    roles, _ = by_group(groups, SHARES, 0)
    assert {role: len(indices) for role, indices in roles.items()} == {
        "train": 100,
        "validation": 30,
        "calibration": 30,
        "test": 40,
    }


def test_one_dominant_group_is_trained_on_and_the_rest_held_out() -> None:
    groups = ["big"] * 90 + ["a"] * 4 + ["b"] * 3 + ["c"] * 3
    roles, _ = by_group(groups, SHARES, 0)
    assert roles["train"] == list(range(90))


def test_few_groups_are_cut_into_blocks_in_file_order() -> None:
    groups = ["a", "b"] * 20
    roles, rule = by_group(groups, SHARES, 0)
    assert "contiguous blocks in file order inside each group, since 2 groups" in rule
    assert partition(roles, 40)
    for group in ("a", "b"):
        members = [i for i, g in enumerate(groups) if g == group]
        cut = [[i for i in roles[role] if i in members] for role in SHARES]
        assert list(itertools.chain.from_iterable(cut)) == members, "blocks follow one another"
        assert [len(c) for c in cut] == [10, 3, 3, 4]


def test_groups_too_small_to_be_cut() -> None:
    roles, rule = by_group(["a", "a", "b", "b", "c"], SHARES, 0)
    assert partition(roles, 5)
    assert all(roles.values())
    assert "too small" in rule


def test_a_small_group_beside_a_large_one_is_trained_on() -> None:
    roles, _ = by_group(["a"] * 20 + ["b"] * 2, SHARES, 0)
    assert {20, 21} <= set(roles["train"])
    assert all(roles.values())
