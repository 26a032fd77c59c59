"""One decomposition for all scales, and blockwise products, against the formulas written down plainly."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import cho_solve, cholesky

from blip_ft.families.base import gram
from blip_ft.families.base.gram import as_many_threads_as_torch, combine, gram_matrix
from blip_ft.families.base.linear import PRIOR_SCALES, LinearizedModel
from blip_ft.families.base.spectrum import left_out_nll, left_out_scores

#: outputs and weights: more weights, about as many, far fewer
SHAPES = [(12, 40), (30, 24), (60, 7), (40, 40)]


def problem(m: int, p: int, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """LinearizedModel of different lengths, targets, and which of them count."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(m, p)) * 10.0 ** rng.uniform(-spread, spread, (m, 1))
    return g, g @ (0.3 * rng.normal(size=p)) + rng.normal(size=m), rng.random(m) < 0.8


def plain(
    k: np.ndarray, y: np.ndarray, groups: np.ndarray, scored: np.ndarray, s: float, t: float
) -> list[float]:
    """Left-out groups by a factorisation for each group and scale (Rasmussen and Williams, eq. 2.25, 2.26)."""
    scores = []
    for name in np.unique(groups):
        outside, wanted = groups != name, (groups == name) & scored
        if not wanted.any():
            continue
        factor = (cholesky(s * s * k[np.ix_(outside, outside)] + t * np.eye(outside.sum()), lower=True), True)
        cross = s * s * k[np.ix_(outside, wanted)]
        error = y[wanted] - cross.T @ cho_solve(factor, y[outside])
        variance = s * s * k.diagonal()[wanted] + t - (cross * cho_solve(factor, cross)).sum(axis=0)
        scores.append(np.mean(0.5 * np.log(2 * math.pi * variance) + 0.5 * error**2 / variance))
    return scores


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("n_groups", [2, 3, 12])
def test_left_out_groups_are_those_of_a_factorisation_each(
    shape: tuple[int, int], temperature: float, n_groups: int
) -> None:
    g, y, scored = problem(*shape)
    groups = np.arange(len(y)) % n_groups
    scored[groups == 1] = False  # a group that does not count still informs the others
    rows = LinearizedModel(torch.from_numpy(g), y, groups.astype(str), scored)
    assert rows.spectrum.of_weights == (2 * shape[1] < shape[0])
    table = left_out_scores(
        rows.spectrum,
        y,
        groups,
        scored,
        scales=PRIOR_SCALES,
        temperature=temperature,
        rows=rows.labelled,
    )
    for s, scores in table.items():
        np.testing.assert_allclose(scores, plain(g @ g.T, y, groups, scored, s, temperature), rtol=1e-8)


def test_rows_that_repeat_leave_a_null_space() -> None:
    """Symmetry makes rows that are the same or nothing; s^2 times the largest eigenvalue is 10^11 here."""
    g, y, _ = problem(16, 30)
    g = 1e5 * np.concatenate([g, g[:6], np.zeros((4, 30)), -g[:3]])
    y = np.concatenate([y, y[:6], np.zeros(4), -y[:3]])
    groups, scored = np.arange(len(y)) % 4, np.ones(len(y), bool)
    table = left_out_nll(g @ g.T, y, groups, scored, scales=[0.01, 0.3, 3.0])
    assert np.isfinite([*table.values()]).all()
    np.testing.assert_allclose(
        table[0.01], plain(g @ g.T, y, groups, scored, 0.01, 1.0), rtol=1e-3
    )  # both are rounded: one in 10^11


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_and_solves_are_the_plain_ones(shape: tuple[int, int]) -> None:
    g, y, _ = problem(*shape)
    rows = LinearizedModel(torch.from_numpy(g), y, np.full(len(y), ""), np.ones(len(y), bool), y)
    scales = [0.02, 0.3, 2.0]
    for step, s in zip(rows.steps(scales), scales, strict=True):
        want = np.linalg.solve(g.T @ g + np.eye(g.shape[1]) / s**2, g.T @ y)
        np.testing.assert_allclose(step.numpy(), want, rtol=1e-8, atol=1e-9 * np.abs(want).max())


@settings(deadline=None, max_examples=30)
@given(
    m=st.integers(0, 9),
    p=st.integers(0, 300),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    turned=st.booleans(),
    seed=st.integers(0, 100),
)
def test_products_by_blocks(m: int, p: int, dtype: torch.dtype, turned: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*((p, m) if turned else (m, p)), generator=generator, dtype=dtype)
    rows = rows.T if turned else rows
    exact = rows.double().numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "BLOCK_BYTES", 8 * m * 100)  # several blocks
        product = gram_matrix(rows)
        mix = np.random.default_rng(seed).normal(size=(3, m))
        combined = combine(mix, rows, torch.float64)
    np.testing.assert_allclose(product, exact @ exact.T, rtol=1e-12, atol=1e-10)
    np.testing.assert_array_equal(product, product.T)
    np.testing.assert_allclose(combined.numpy(), mix @ exact, rtol=1e-12, atol=1e-10)


def test_products_are_summed_in_float64() -> None:
    rows = torch.full((2, 100_000), 1e-4)
    rows[:, 0] = 1e4
    want = float(rows[0].double().square().sum())
    np.testing.assert_allclose(gram_matrix(rows), want, rtol=1e-12)


def test_no_copy_of_the_rows_in_double_precision() -> None:
    rows = torch.ones(64, 400_000)  # 100 MB, and 200 in float64
    tracemalloc.start()  # sees numpy's arrays alone; torch's blocks have the size that `blocks` gives them
    gram_matrix(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    widths = [len(range(*b.indices(rows.shape[1]))) for b in gram.blocks(rows)]
    assert sum(widths) == rows.shape[1]
    assert max(widths) * len(rows) * 8 <= gram.BLOCK_BYTES


def test_threads_are_those_of_torch() -> None:
    found = gram._libraries()
    before, had = [get() for get, _ in found], torch.get_num_threads()
    try:
        torch.set_num_threads(2 if had == 1 else 1)
        with as_many_threads_as_torch():
            assert {get() for get, _ in found} <= {torch.get_num_threads()}
    finally:
        torch.set_num_threads(had)
    assert [get() for get, _ in found] == before
