"""What random projections of the forces, in place of all components, do to a posterior: docs/theory.md."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from blip_ft.uncertainty.jacobian import random_signs

#: weights, prior scale, temperature, atoms of the structures
P, SCALE, T, ATOMS = 5, 0.8, 2.0, (2, 3, 4)
REPETITIONS = 4000
JACOBIANS = [np.random.default_rng(n).normal(size=(3 * n, P)) for n in ATOMS]
HESSIAN = sum(j.T @ j for j in JACOBIANS)


def covariance(hessian: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.eye(P) / SCALE**2 + hessian / T)


S = covariance(HESSIAN)


def projected(count: int) -> np.ndarray:
    """(REPETITIONS, P, P) Hessians from ``count`` projections per structure.

    Signs of all repetitions at once: those of one long structure, REPETITIONS times as many atoms.
    """
    sizes = torch.tensor(ATOMS) * REPETITIONS
    long = SimpleNamespace(keys=[100 + n for n in ATOMS], n_atoms=sizes)
    signs = torch.stack(random_signs(cast(Any, long), count, seed=0)).split(sizes.tolist(), dim=1)
    total = np.zeros((REPETITIONS, P, P))
    for v, j in zip(signs, JACOBIANS, strict=True):
        rows = v.reshape(count, REPETITIONS, len(j)).numpy() @ j
        total += np.einsum("kni,knj->nij", rows, rows)
    return total


def second_order(count: int) -> np.ndarray:
    """E[S X S X S] / T^2 for the error X of the Hessian."""
    out = np.zeros((P, P))
    for j in JACOBIANS:
        m = j @ S @ j.T
        inner = np.trace(m) * np.eye(len(m)) + m - 2 * np.diag(m.diagonal())
        out += S @ j.T @ inner @ j @ S
    return out / (count * T**2)


def excess(count: int) -> np.ndarray:
    """E[S_R] - S. The term -S X S/T, which has no mean, is left out: it is most of the scatter."""
    hessian = projected(count)
    first = S @ (hessian - HESSIAN) @ S / T
    return (covariance(hessian) - S + first).mean(axis=0)


@pytest.mark.parametrize("count", [1, 4, 32])
def test_the_hessian_has_no_bias_and_no_covariance_is_too_narrow(count: int) -> None:
    """In five standard errors: nothing is left of the Hessian's, and every direction has some width too much."""
    hessian = projected(count)
    error = hessian.std(axis=0) / REPETITIONS**0.5
    assert (np.abs(hessian.mean(axis=0) - HESSIAN) < 5 * error).all()
    _, axes = np.linalg.eigh(second_order(count))
    wider = np.einsum("pi,npq,qi->ni", axes, covariance(hessian) - S, axes)
    assert (wider.mean(axis=0) > 5 * wider.std(axis=0) / REPETITIONS**0.5).all()
    assert np.linalg.eigvalsh(excess(count)).min() > 0


def test_the_excess_is_as_derived_and_falls_as_the_number_of_projections() -> None:
    few, many = excess(32), excess(64)
    np.testing.assert_allclose(many, second_order(64), rtol=0, atol=0.04 * np.abs(many).max())
    assert np.trace(few) / np.trace(many) == pytest.approx(2, rel=0.06)
    # relative, a direction's mean: effective parameters over the number of projections
    effective = P - np.trace(S) / SCALE**2
    relative = np.trace(np.linalg.solve(S, many)) / P
    assert relative == pytest.approx(effective / (len(ATOMS) * 64), rel=0.15)


def test_what_no_projection_sees_keeps_the_priors_width() -> None:
    """Three projections of five weights, all of which the labels determine."""
    assert np.linalg.eigvalsh(S).max() < 0.5 * SCALE**2
    values = np.linalg.eigvalsh(covariance(projected(1)))
    np.testing.assert_allclose(values[:, 3:], SCALE**2, rtol=1e-9)
    assert (values[:, :3] < 0.9 * SCALE**2).mean() > 0.9
