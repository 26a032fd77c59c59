from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

from blip_ft.data.batch.sampler import EpochBatchSampler, PackedBatchSampler
from blip_ft.errors import DataError


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    world = draw(st.integers(1, 5))
    return (
        draw(st.integers(world, 80)),
        draw(st.integers(1, 9)),
        draw(st.integers(0, 3)),
        world,
        draw(st.integers(0, 4)),
    )


def epoch(n: int, batch_size: int, seed: int, world: int, rank: int, number: int) -> list[list[int]]:
    sampler = EpochBatchSampler(n, batch_size, seed, world, rank)
    sampler.set_epoch(number)
    return list(sampler)


@given(plans())
def test_ranks_together_do_what_one_process_does(plan: tuple[int, int, int, int, int]) -> None:
    n, batch_size, seed, world, number = plan
    ranks = [epoch(n, batch_size, seed, world, r, number) for r in range(world)]
    steps = max(1, min(math.ceil(n / (batch_size * world)), n // world))
    assert all(len(r) == steps == len(EpochBatchSampler(n, batch_size, seed, world, 0)) for r in ranks)
    together = [[i for r in ranks for i in r[step]] for step in range(steps)]
    assert sorted(i for batch in together for i in batch) == list(range(n)), "each structure once"
    assert all(len(r[step]) >= 1 for r in ranks for step in range(steps))
    sizes = [len(batch) for batch in together]
    assert max(sizes) - min(sizes) <= 1
    if math.ceil(n / (batch_size * world)) <= n // world:  # else fewer, larger steps
        assert max(len(r[step]) for r in ranks for step in range(steps)) <= batch_size
        alone = epoch(n, batch_size * world, seed, 1, 0, number)
        assert alone == together, "also in the same order"


@given(plans())
def test_an_epoch_is_a_function_of_seed_and_number(plan: tuple[int, int, int, int, int]) -> None:
    n, batch_size, seed, world, number = plan
    assert epoch(n, batch_size, seed, world, 0, number) == epoch(n, batch_size, seed, world, 0, number)
    if n >= 20 and world == 1:
        flat = [i for b in epoch(n, batch_size, seed, 1, 0, number) for i in b]
        for other in ((seed + 1, number), (seed, number + 1)):
            assert [i for b in epoch(n, batch_size, other[0], 1, 0, other[1]) for i in b] != flat


def test_repeated_iteration_without_set_epoch_repeats() -> None:
    sampler = EpochBatchSampler(10, 3, seed=2)
    assert list(sampler) == list(sampler)


def test_known_sizes() -> None:
    assert [len(b) for b in EpochBatchSampler(36, 4)] == [4] * 9
    assert [len(b) for b in EpochBatchSampler(10, 4)] == [4, 3, 3]
    assert [len(b) for b in EpochBatchSampler(3, 8)] == [3]
    assert [len(b) for b in EpochBatchSampler(5, 1, world=4, rank=0)] == [2]


def test_positions_are_uniform_over_epochs() -> None:
    sampler = EpochBatchSampler(6, 6, seed=0)
    counts = np.zeros((6, 6))
    for number in range(600):
        sampler.set_epoch(number)
        counts[np.arange(6), next(iter(sampler))] += 1
    assert np.abs(counts - 100).max() < 45  # 4.9 standard deviations


def test_fewer_structures_than_processes() -> None:
    with pytest.raises(DataError, match=r"3 training structures cannot be shared by 4 processes\n.*devices"):
        EpochBatchSampler(3, 2, world=4)
    with pytest.raises(DataError):
        EpochBatchSampler(0, 2)


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"batch_size": 2, "world": 0}, {"batch_size": 2, "world": 2, "rank": 2}]
)
def test_nonsense_is_a_programming_error(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="bad"):
        EpochBatchSampler(8, **bad)


# ---- batches of bounded size -------------------------------------------------------------------


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    world = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 200), min_size=world, max_size=60))
    return sizes, draw(st.integers(max(sizes), 600)), draw(st.integers(0, 3)), world


@given(packings(), st.integers(0, 3))
def test_packed_batches_hold_every_structure_once_and_never_too_much(
    packing: tuple[list[int], int, int, int], number: int
) -> None:
    sizes, limit, seed, world = packing
    try:
        samplers = [PackedBatchSampler(sizes, limit, seed, world, rank) for rank in range(world)]
    except DataError:  # each rank needs a structure in every step: there may be too few
        event("too few")
        assume(world == 1)
        raise
    batches = []
    for sampler in samplers:
        sampler.set_epoch(number)
        batches += list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(len(batch) >= 1 and sum(sizes[i] for i in batch) <= limit for batch in batches)
    assert len(batches) == world * len(samplers[0])


def test_packed_epochs_differ_and_are_of_one_length() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 120, 200).tolist()
    sampler = PackedBatchSampler(sizes, 400, seed=1)
    epochs = []
    for number in range(4):
        sampler.set_epoch(number)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler)
        sampler.set_epoch(number)
        assert list(sampler) == epochs[-1]
    assert len({str(sorted(map(sorted, e))) for e in epochs}) == 4
    filled = sum(sizes) / (400 * len(sampler))
    assert filled > 0.85, "little room is wasted"


def test_a_structure_that_is_too_large_is_named() -> None:
    with pytest.raises(DataError, match="structure 2 has 90 edges, a batch may have 50"):
        PackedBatchSampler([10, 20, 90], 50, name="edges")


def test_the_batch_plan_does_not_change_the_expected_gradient() -> None:
    """Sum over an epoch of (batch sum) / (N / steps), over steps, is the mean over structures."""
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=50)
    sizes = rng.integers(5, 60, 50).tolist()
    for sampler in (EpochBatchSampler(50, 7), EpochBatchSampler(50, 50), PackedBatchSampler(sizes, 150)):
        divisor = 50 / len(sampler)
        steps = [gradient[batch].sum() / divisor for batch in sampler]
        assert np.mean(steps) == pytest.approx(gradient.mean())
