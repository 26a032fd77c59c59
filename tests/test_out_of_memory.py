"""Work that does not fit into memory: by halves, with the same result."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.errors import DataError
from blip_ft.system.out_of_memory import by_halves, is_out_of_memory
from blip_ft.uncertainty.batch_limits import bounded, default_atoms, ranges
from blip_ft.uncertainty.predict import predict_atoms

from .potential.around_fake import make, structures
from .small_memory import ERRORS, memory_for

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=20)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_memory_errors_are_told_from_others(error: Exception):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("not enough memory"), KeyError("x")]
)
def test_other_errors_are_none(error: Exception):
    assert not is_out_of_memory(error)


def test_torch_says_what_is_expected():
    """The real allocator, asked for more than any machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@given(SIZES, st.integers(1, 60))
def test_halves_are_in_order_and_fit(sizes: list[int], limit: int):
    said: list[str] = []

    def work(some: range) -> list[int]:
        if sum(sizes[i] for i in some) > limit:
            raise MemoryError
        return list(some)

    if max(sizes) > limit:
        with pytest.raises(MemoryError):
            by_halves(work, range(len(sizes)), sizes, what="x", said=said.append)
        return
    out = by_halves(work, range(len(sizes)), sizes, what="x", said=said.append)
    assert [i for part in out for i in part] == list(range(len(sizes)))
    assert len(said) == len(out) - 1


def test_other_errors_are_raised_at_once():
    calls = []

    def work(some: range) -> None:
        calls.append(some)
        raise ValueError(some)

    with pytest.raises(ValueError, match="range"):
        by_halves(work, range(4), [1] * 4, what="x")
    assert len(calls) == 1


@given(SIZES, st.integers(1, 6), st.integers(1, 60))
def test_batches_are_bounded(sizes: list[int], structures: int, atoms: int):
    made = ranges(sizes, structures=structures, atoms=atoms)
    assert [i for r in made for i in r] == list(range(len(sizes)))
    for r in made:
        assert len(r) <= structures
        assert len(r) == 1 or sum(sizes[i] for i in r) <= atoms
    for one, other in pairwise(made):  # as large as they may be
        assert len(one) == structures or sum(sizes[i] for i in one) + sizes[other[0]] > atoms


def test_batches_are_made_as_items_come():
    read = []

    def items() -> Any:
        for n in range(10):
            read.append(n)
            yield n

    first = next(bounded(items(), lambda n: 1, structures=3, atoms=100))
    assert first == [0, 1, 2]
    assert read == [0, 1, 2, 3]


def test_the_default_bound_is_that_of_the_device():
    assert default_atoms("cuda") > default_atoms("cpu") >= 128


# ---- predictions -------------------------------------------------------------------------------


def crystals(n: int = 9) -> list[Atoms]:
    return [structures()[i % 2] for i in range(n)]


def test_predictions_of_large_structures_come_in_small_batches():
    potential = make()
    with memory_for(10**9) as seen:
        predict_atoms(potential, crystals(), n_draws=0, batch_atoms=11)
    assert seen.fitted == [10, 10, 10, 10, 4]  # of 4 and 6 atoms
    with memory_for(10**9) as seen:
        predict_atoms(potential, crystals(60), n_draws=0)
    assert max(seen.fitted) <= default_atoms("cpu")


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", ["draws", "energy", "linear"])
def test_predictions_by_halves_are_the_same(error: str, method: Any, caplog: pytest.LogCaptureFixture):
    potential = make(family="subspace", init_std=0.2)
    want = predict_atoms(potential, crystals(), method=method)
    with memory_for(12, error=error) as seen:
        got = predict_atoms(potential, crystals(), method=method)
    assert seen.failed
    assert max(seen.fitted) <= 12
    assert "going on with halves" in caplog.text
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if value is not None:
                np.testing.assert_allclose(a[key], value, rtol=1e-8, atol=1e-11, err_msg=key)


def test_draws_of_one_structure_one_after_the_other():
    """Several draws in one call are copies of the structure."""
    potential = make(n_draws=8)
    (want,) = predict_atoms(potential, crystals(1))
    with memory_for(4) as seen:
        (got,) = predict_atoms(potential, crystals(1))
    assert seen.failed == [32]
    assert seen.fitted == [4] * 8
    np.testing.assert_allclose(got["forces_std"], want["forces_std"], rtol=1e-8)


def test_a_structure_that_does_not_fit_alone_is_an_error_with_a_remedy():
    with (
        memory_for(3),
        pytest.raises(DataError, match=r"4 atoms do not fit into memory.*\n.*--method energy"),
    ):
        predict_atoms(make(), crystals(1))
