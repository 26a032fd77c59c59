"""Greedy batches against brute force and a linear Gaussian model in the space of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from blip_ft.select.budget import Budget
from blip_ft.select.greedy import Information, farthest, largest, most_informative

Floats = NDArray[np.float64]
T = 0.7


class Held:
    """Rows in memory; counts how often they are asked for."""

    def __init__(self, rows: list[Floats]) -> None:
        self.rows, self.asked = rows, 0

    def __getitem__(self, i: int) -> Floats:
        self.asked += 1
        return self.rows[i]

    def blocks(self) -> Iterator[tuple[slice, Floats]]:
        for start in range(0, len(self.rows), 4):
            block = np.concatenate(self.rows[start : start + 4])
            yield slice(start, start + len(block)), block


def candidates(n: int, width: int, seed: int = 0, most: int = 4) -> list[Floats]:
    """Frames of different numbers of labels and very different lengths, some of them almost alike."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(3, width))
    out = []
    for _ in range(n):
        k = int(rng.integers(1, most + 1))
        along = rng.normal(size=(k, 3)) @ directions + 0.2 * rng.normal(size=(k, width))
        out.append(along * 10.0 ** rng.uniform(-1, 1))
    return out


def precision(rows: list[Floats], width: int) -> Floats:
    """Of the weights, N(0, 1) before, given the labels of frames."""
    return np.eye(width) + sum((r.T @ r for r in rows), np.zeros((width, width))) / T


def nats(rows: list[Floats], width: int) -> float:
    """Entropy of the weights that the labels of frames take away."""
    return 0.5 * float(np.linalg.slogdet(precision(rows, width))[1])


def batch(
    rows: list[Floats], keys: NDArray[np.int64] | None = None, **limits: object
) -> tuple[list[int], list[float], Held]:
    held, n = Held(rows), len(rows)
    keys = np.arange(n) if keys is None else keys
    limits = {"frames": 4} | limits
    budget = Budget(limits.pop("sizes", np.full(n, 3)), limits.pop("groups", ["a"] * n), **limits)  # type: ignore[arg-type]
    information = Information(rows[0].shape[1], T)
    found = list(most_informative(held, information.gains(rows), keys, budget, information))
    return [i for i, _ in found], [g for _, g in found], held


class TestInformation:
    def test_is_the_exact_posterior(self) -> None:
        """Covariance of other outputs, and gains as differences of entropies of the weights; also with more labels than
        weights.
        """
        width = 6
        frames = candidates(7, width)
        found = Information(width, T)
        for n, frame in enumerate(frames):
            known = frames[:n]
            inverse = np.linalg.inv(precision(known, width))
            np.testing.assert_allclose(
                found.covariance(frames[-1], frame), frames[-1] @ inverse @ frame.T, rtol=1e-8, atol=1e-9
            )
            expected = nats([*known, frame], width) - nats(known, width)
            assert found.gains([frame])[0] == pytest.approx(expected, rel=1e-8)
            found.take(frame)

    def test_a_copy_is_worth_next_to_nothing(self) -> None:
        """The noise of one label is all that a second label of the same frame can still take away: ln 2 / 2 at most."""
        frame = 300 * np.random.default_rng(1).normal(size=(3, 20))
        found = Information(20, T)
        before = found.gains([frame])[0]
        found.take(frame)
        after = found.gains([frame, frame + 1e-3])
        assert before > 15
        assert (after <= 3 * 0.5 * np.log(2) + 1e-3).all()
        assert (np.diag(found.covariance(frame)) <= T).all()


class TestGreedy:
    def test_each_choice_is_the_best_one(self) -> None:
        """Of all, by brute force in the space of the weights; gains sum to the information of the batch."""
        width = 8
        frames = candidates(30, width, seed=3)
        chosen, gains, held = batch(frames, frames=6)
        for n, i in enumerate(chosen):
            known = [frames[k] for k in chosen[:n]]
            values = [
                -1.0 if k in chosen[:n] else nats([*known, frames[k]], width) for k in range(len(frames))
            ]
            assert i == int(np.argmax(values))
        assert sum(gains) == pytest.approx(nats([frames[i] for i in chosen], width))
        assert gains == sorted(gains, reverse=True)
        assert held.asked < 6 * 30

    @pytest.mark.parametrize("seed", range(5))
    def test_is_near_the_best_batch(self, seed: int) -> None:
        width = 5
        frames = candidates(9, width, seed=seed)
        chosen, _, _ = batch(frames, frames=3)
        best = max(nats([frames[i] for i in some], width) for some in combinations(range(9), 3))
        assert nats([frames[i] for i in chosen], width) >= (1 - 1 / np.e) * best

    def test_few_are_computed_anew(self) -> None:
        frames = candidates(2000, 12, seed=4)
        _, _, held = batch(frames, frames=8)
        assert held.asked < 0.25 * 8 * len(frames)

    @given(st.permutations(range(12)), st.integers(0, 3))
    @settings(max_examples=25, deadline=None)
    def test_order_of_candidates(self, order: list[int], seed: int) -> None:
        """With two pairs of copies, which are ties."""
        frames = candidates(10, 6, seed=seed)
        frames += [frames[0].copy(), frames[1].copy()]
        keys = np.random.default_rng(seed).permutation(12)
        chosen, gains, _ = batch(frames, keys, frames=5)
        again, other, _ = batch([frames[i] for i in order], keys[order], frames=5)
        assert [keys[i] for i in chosen] == [keys[order[i]] for i in again]
        np.testing.assert_allclose(gains, other, rtol=1e-9)

    def test_copies_are_not_taken_before_others(self) -> None:
        frames = [20 * np.eye(6)[[k, k + 1]] for k in (0, 2, 4)]
        chosen, _, _ = batch([*frames, *frames], frames=3)
        assert sorted(i % 3 for i in chosen) == [0, 1, 2]

    def test_gain_per_atom(self) -> None:
        """A frame of ten times the atoms has to teach ten times as much."""
        frames = [np.full((1, 1), 1.0), np.full((1, 1), 3.0)]
        frames = [np.pad(frames[0], ((0, 0), (0, 1))), np.pad(frames[1], ((0, 0), (1, 0)))]
        assert batch(frames, frames=1, sizes=np.array([1, 10]))[0] == [1]
        assert batch(frames, frames=1, atoms=20, sizes=np.array([1, 10]))[0] == [0]
        assert batch(frames, frames=None, atoms=10, sizes=np.array([1, 10]))[0] == [0]
        assert batch(frames, frames=None, atoms=11, sizes=np.array([1, 10]))[0] == [0, 1]

    def test_limit_of_groups(self) -> None:
        frames = candidates(12, 6, seed=2)
        groups = [f"run{i % 3}" for i in range(12)]
        chosen, _, _ = batch(frames, frames=6, groups=groups, per_group=2)
        assert len(chosen) == 6
        assert max(sum(groups[i] == g for i in chosen) for g in groups) == 2


class TestControls:
    def test_farthest(self) -> None:
        """By brute force, from the origin and a frame that is chosen already."""
        rng = np.random.default_rng(0)
        points = rng.normal(size=(15, 3))
        budget = Budget(np.ones(15, dtype=int), ["a"] * 15, frames=4)
        budget._free[2] = False
        found = list(farthest(Held(list(points[:, None])), np.arange(15), budget, [2]))
        known = [np.zeros(3), points[2]]
        for i, distance in found:
            least = [min(np.linalg.norm(p - k) for k in known) for p in points]
            assert i == int(np.argmax(least))
            assert distance == pytest.approx(max(least))
            known.append(points[i])

    def test_largest(self) -> None:
        scores = np.array([1.0, 3.0, 3.0 * (1 + 1e-9), 2.0])
        budget = Budget(np.array([5, 5, 5, 1]), ["a"] * 4, atoms=6)
        assert list(largest(scores, np.array([9, 4, 7, 1]), budget)) == [1, 3]


def test_budget_counts_what_could_be_taken() -> None:
    budget = Budget(np.ones(5, dtype=int), ["a", "a", "a", "b", "b"], per_group=2)
    assert budget.most == 4
    budget.take(0)
    assert budget.most == 3
