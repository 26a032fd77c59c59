"""The sketched posterior where its law is known: linear models, hashes that are counted, sums that come and go."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from blip_ft.errors import BlipError, CheckpointError, DataError
from blip_ft.families.base.linear import PRIOR_SCALES, ClosedFormData, LinearizedModel, widest_as_good
from blip_ft.families.base.spectrum import left_out_nll
from blip_ft.families.pathwise.posterior import PathwisePosterior
from blip_ft.families.sketch import buckets as hashing
from blip_ft.families.sketch import statistics as sums
from blip_ft.families.sketch.options import SketchOptions
from blip_ft.families.sketch.posterior import SketchPosterior
from blip_ft.families.sketch.statistics import FOLDS, ridge
from blip_ft.variational import Block, PretrainedPrior, Site

DOUBLE = torch.float64
P, RMS = 240, 1.7
SITES = {
    "a": Site("a", (140,), (Block(0, (140, 1), output_axis=1),)),
    "b": Site("b", (20, 5), (Block(0, (20, 5), output_axis=0),)),
}


def make(
    buckets: int | str = P, rank: int = 2 * P, dtype: torch.dtype = DOUBLE, seed: int = 0, **options: Any
) -> SketchPosterior:
    weights = {n: torch.full(s.shape, RMS, dtype=dtype) for n, s in SITES.items()}
    prior = PretrainedPrior(SITES, weights, 0.3)
    wanted = SketchOptions(buckets=buckets, rank=rank, **options)
    return SketchPosterior(list(SITES.values()), prior, wanted=wanted, seed=seed)


def problem(m: int, seed: int = 0, groups: int = 3) -> tuple[LinearizedModel, np.ndarray]:
    """m labels that are linear in P weights; rows over their noise, four to a frame."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, P)) * 10.0 ** rng.uniform(-1, 1, (m, 1))
    y = x @ (0.4 * rng.normal(size=P)) + rng.normal(size=m)
    return rows_of(x, y, np.arange(m) // 4, groups), x


def rows_of(x: np.ndarray, y: np.ndarray, frames: np.ndarray, groups: int = 3) -> LinearizedModel:
    names = np.array([f"g{f % groups}" for f in frames])
    return LinearizedModel(torch.from_numpy(x), y, names, np.ones(len(x), dtype=bool), y, frames)


def features(posterior: SketchPosterior, rows: LinearizedModel, inside: Any = slice(None)) -> LinearizedModel:
    """Some of the rows as they are added."""
    assert rows.keys is not None
    found = posterior.features(rows.gradients[inside])
    return LinearizedModel(
        found, rows.targets[inside], rows.groups[inside], rows.scored[inside], keys=rows.keys[inside]
    )


def exact(x: np.ndarray, s: float, t: float) -> np.ndarray:
    """Of the weights in units of their rms."""
    return np.linalg.inv(np.eye(P) / s**2 + x.T @ x / t)


def covariance(posterior: SketchPosterior) -> np.ndarray:
    """Of the weights, from what ``sample`` does to unit vectors."""
    unit = torch.eye(posterior.latent_numel, dtype=posterior.prior_std.dtype)
    flat = torch.cat([w.flatten(1) for w in posterior.sample(unit).values()], dim=1).double()
    return (flat.T @ flat).numpy()


def variance(posterior: SketchPosterior, x: np.ndarray) -> np.ndarray:
    found = posterior.features(torch.from_numpy(x).to(posterior.prior_std))
    return posterior.covariance(found).diagonal().numpy()


class TestWithoutSketch:
    """As many buckets as weights: the identity, and the exact posterior."""

    @settings(max_examples=20)
    @given(
        m=st.integers(1, 400), s=st.floats(0.05, 2.0), t=st.sampled_from([1.0, 7.0]), seed=st.integers(0, 99)
    )
    def test_the_exact_posterior_of_a_linear_model(self, m: int, s: float, t: float, seed: int) -> None:
        rows, x = problem(m, seed)
        posterior = make()
        report = posterior.fit(ClosedFormData(rows, prior_scale=s, temperature=t))
        want = exact(x, s, t)
        np.testing.assert_allclose(covariance(posterior), RMS**2 * want, rtol=1e-7, atol=1e-10 * s**2)
        assert report["absorbed"] == 0
        std = torch.cat([v.flatten() for v in posterior.std().values()]).numpy()
        np.testing.assert_allclose(std, RMS * np.sqrt(want.diagonal()), rtol=1e-7)

    def test_variance_of_outputs(self) -> None:
        rows, x = problem(50)
        posterior = make()
        posterior.fit(ClosedFormData(rows, prior_scale=0.4, temperature=2.0))
        g = torch.randn(5, P, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        parts = {"a": g[:, :140] / RMS, "b": g[:, 140:].reshape(-1, 20, 5) / RMS}
        want = g.numpy() @ exact(x, 0.4, 2.0) @ g.numpy().T
        np.testing.assert_allclose(posterior.linear_variance(parts).numpy(), want.diagonal(), rtol=1e-9)
        found = posterior.features(g)
        np.testing.assert_allclose(posterior.covariance(found).numpy(), want, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            posterior.covariance(found[:2], found).numpy(), want[:2], rtol=1e-9, atol=1e-12
        )

    @pytest.mark.parametrize("m", [12, 300])
    def test_kl_against_torch(self, m: int) -> None:
        rows, x = problem(m)
        posterior = make(rank=2)
        posterior.fit(ClosedFormData(rows, prior_scale=0.4))
        q = MultivariateNormal(torch.zeros(P, dtype=DOUBLE), torch.from_numpy(exact(x, 0.4, 1.0)))
        p = MultivariateNormal(torch.zeros(P, dtype=DOUBLE), 0.4**2 * torch.eye(P, dtype=DOUBLE))
        torch.testing.assert_close(posterior.kl(), kl_divergence(q, p), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("m", [40, 300])
    def test_scale_by_the_left_out_rule(self, m: int) -> None:
        """The same scores as from the rows, with each group taken off the sums."""
        rows, x = problem(m)
        report = make().fit(ClosedFormData(rows))
        table = left_out_nll(x @ x.T, rows.targets, rows.groups, rows.scored, scales=PRIOR_SCALES)
        np.testing.assert_allclose(
            [n for _, n in report["left_out_nll"]], [v.mean() for v in table.values()], rtol=1e-6
        )
        assert report["prior_scale"] == widest_as_good(table)
        mu = report["prior_scale"] ** 2 * np.linalg.eigvalsh(x.T @ x).clip(min=0)
        assert report["effective_parameters"] == pytest.approx(float((mu / (1 + mu)).sum()), rel=1e-6)

    def test_outputs_that_the_labels_fix_survive_single_precision(self) -> None:
        """Labels known a thousand times better than the prior: their std is a small difference."""
        rows, x = problem(8)
        x *= 1e3 / np.linalg.norm(x, axis=1, keepdims=True)
        rows.gradients = torch.from_numpy(x).float()
        posterior = make(dtype=torch.float32)
        posterior.fit(ClosedFormData(rows, prior_scale=1.0))
        np.testing.assert_allclose(
            variance(posterior, x), (x @ exact(x, 1.0, 1.0) @ x.T).diagonal(), rtol=0.01
        )


#: of the sites with 1000 buckets: places of the first weights, and mark of all
KNOWN_PLACES = [19, 1022, 739, 1486, 1404, 1825]
KNOWN_MARK = 3478845650483622749


class TestHash:
    def test_is_this_one(self) -> None:
        """A model file needs it as it was: another hash is another version."""
        assert hashing.places(list(SITES.values()), 1000)[:6].tolist() == KNOWN_PLACES
        assert hashing.mark(hashing.places(list(SITES.values()), 1000)) == KNOWN_MARK

    def test_is_the_same_in_another_process(self) -> None:
        code = (
            "from blip_ft.families.sketch.buckets import mark, places; from blip_ft.variational import Block, Site;"
            "print(mark(places([Site('a', (140,), (Block(0, (140, 1), output_axis=1),)),"
            "Site('b', (20, 5), (Block(0, (20, 5), output_axis=0),))], 1000)))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(out.stdout) == KNOWN_MARK

    def test_is_keyed(self) -> None:
        sites = list(SITES.values())
        whole = hashing.places(sites, 64)
        assert torch.equal(hashing.places(sites[1:], 64), whole[140:]), "a site's places are its own"
        assert not torch.equal(hashing.places(sites, 64, seed=1), whole)
        renamed = [Site("c", (140,), SITES["a"].blocks), sites[1]]
        assert not torch.equal(hashing.places(renamed, 64)[:140], whole[:140])

    def test_fewer_buckets_are_sums_of_more(self) -> None:
        sites, x = (
            list(SITES.values()),
            torch.randn(3, P, generator=torch.Generator().manual_seed(0), dtype=DOUBLE),
        )
        many, few = (hashing.to_buckets(x, hashing.places(sites, m), m) for m in (128, 32))
        torch.testing.assert_close(hashing.folded(many, 32), few, rtol=1e-12, atol=1e-12)

    def test_derivatives(self) -> None:
        place = hashing.places(list(SITES.values()), 16)
        v = torch.randn(2, 16, dtype=DOUBLE, generator=torch.Generator().manual_seed(0), requires_grad=True)
        w = torch.randn(2, P, dtype=DOUBLE, generator=torch.Generator().manual_seed(1), requires_grad=True)
        torch.testing.assert_close(
            (hashing.to_weights(v, place) * w).sum(), (v * hashing.to_buckets(w, place, 16)).sum()
        )
        for function, x in (
            (lambda v: hashing.to_weights(v, place), v),
            (lambda w: hashing.to_buckets(w, place, 16), w),
        ):
            assert torch.autograd.gradcheck(function, (x,))
            assert torch.autograd.gradgradcheck(function, (x,))

    def test_law_of_the_kernel(self) -> None:
        """phi.phi' over 4,000 hashes: mean g.g' and the variance of docs/theory.md."""
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(2, P)) * rng.uniform(0.1, 2, P)
        m, pair = 32, torch.from_numpy(np.stack([x, y]))
        found = []
        for seed in range(4000):
            a, b = hashing.to_buckets(pair, hashing.places(list(SITES.values()), m, seed), m)
            found.append(float(a @ b))
        want = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)) / m
        assert np.mean(found) == pytest.approx(x @ y, abs=4 * math.sqrt(want / 4000))
        assert np.var(found) == pytest.approx(want, rel=0.1)


class TestLaw:
    """Fewer buckets than weights, over many hashes."""

    @pytest.mark.parametrize("m", [48, 96, 160])
    def test_mean_variance_is_that_of_all_weights(self, m: int) -> None:
        """Near the labels and far from them; the narrower prior that is not given back would fail far away."""
        rows, x = problem(24)
        far = np.random.default_rng(1).normal(size=(30, P))
        near = x[:10] + 0.05 * far[:10]
        found: dict[str, list[np.ndarray]] = {"far": [], "near": []}
        absorbed = []
        for seed in range(40):
            posterior = make(m, rank=2, seed=seed)
            absorbed.append(posterior.fit(ClosedFormData(rows, prior_scale=0.5))["absorbed"])
            for name, z in (("far", far), ("near", near)):
                found[name].append(variance(posterior, z) / (z @ exact(x, 0.5, 1.0) @ z.T).diagonal())
        for values in found.values():
            assert np.mean(values) == pytest.approx(1.0, abs=0.05)
        mu = 0.25 * np.linalg.eigvalsh(x @ x.T)
        assert np.mean(absorbed) == pytest.approx(np.sum(mu / (1 + mu)) / m, rel=0.1)
        assert np.mean(found["far"]) * (1 - np.mean(absorbed)) < 0.93
        scatter = math.sqrt(2 / (m * (1 - np.mean(absorbed))))
        assert np.std(found["far"], axis=0).mean() == pytest.approx(scatter, rel=0.3)

    def test_ridge_is_the_root(self) -> None:
        values = np.array([1e4, 30.0, 1.0, 0.0, 0.0])
        x = ridge(values, 2.0, 5)
        assert x == pytest.approx(2.0 * (1 - np.sum(values / (values + x)) / 5), rel=1e-9)
        assert ridge(values, 2.0, 5, exact=True) == 2.0
        assert ridge(np.zeros(5), 2.0, 5) == 2.0
        assert ridge(np.full(5, 1e9), 2.0, 5) == pytest.approx(0.5), "what is given back has a bound"

    def test_beside_pathwise(self) -> None:
        """Its samples have an error of their own, 1/sqrt(2r); that of the sketch is the law's."""
        rows, x = problem(24)
        sketch = make(192, rank=4)
        sketch.fit(ClosedFormData(rows, prior_scale=0.5))
        sampled = PathwisePosterior(sketch.sites, sketch.prior, rank=2000)
        sampled.fit(ClosedFormData(rows, prior_scale=0.5))
        z = np.concatenate([x, np.random.default_rng(1).normal(size=(40, P))])
        g = torch.from_numpy(z) / RMS
        parts = {"a": g[:, :140], "b": g[:, 140:].reshape(-1, 20, 5)}
        ratio = (sketch.linear_variance(parts) / sampled.linear_variance(parts)).sqrt().numpy()
        assert np.abs(ratio - 1).max() < 4 * math.sqrt(1 / (2 * 192) + 1 / (2 * 2000))

    def test_samples_are_of_the_covariance(self) -> None:
        rows, _ = problem(24)
        posterior = make(32, rank=31)
        posterior.fit(ClosedFormData(rows, prior_scale=0.5))
        posterior.wanted = SketchOptions(buckets=32, rank=32)
        few = posterior.samples.clone()
        posterior.set_covariance(sums.mirrored(posterior.known.matrix.copy(order="F")), 0.5, 1.0)
        whole = posterior.samples.T @ posterior.samples
        torch.testing.assert_close(whole, posterior.factor @ posterior.factor.T)
        error = ((whole.diagonal()[:, None] * whole.diagonal() + whole**2) / 31).sqrt()
        assert ((few.T @ few - whole).abs() < 5.5 * error).all()


class TestSums:
    def test_rows_come_in_pieces(self) -> None:
        rows, _ = problem(200)
        at_once, piecewise = (make(64) for _ in range(2))
        report = at_once.fit(ClosedFormData(rows))
        statistics = piecewise.collect()
        for start in range(0, 200, 12):
            part = slice(start, start + 12)
            statistics.add(
                LinearizedModel(
                    statistics.features(rows.gradients[part]),
                    rows.targets[part],
                    rows.groups[part],
                    rows.scored[part],
                    rows.targets[part],
                    np.arange(200)[part] // 4,
                )
            )
        again = piecewise.fit(ClosedFormData(statistics))
        assert again["prior_scale"] == report["prior_scale"]
        torch.testing.assert_close(piecewise.factor, at_once.factor, rtol=1e-9, atol=1e-12)

    def test_frames_without_labels_add_nothing(self) -> None:
        rows, _ = problem(40)
        statistics = make(64).collect()
        rows.gradients = statistics.features(rows.gradients)
        statistics.add(rows)
        before = statistics.matrix(64)
        rows.targets[:] = np.nan
        statistics.add(rows)
        np.testing.assert_array_equal(statistics.matrix(64), before)
        assert (statistics.rows, statistics.labelled) == (80, 40)
        assert sum(statistics.frames.values()) == 40

    def test_many_groups_share_a_bounded_number_of_sums(self) -> None:
        rows, x = problem(320, groups=40)
        statistics = make().collect()
        statistics.add(rows)
        assert len(statistics._folds) == FOLDS
        assert len(set(rows.groups)) == 40
        fold = np.array([f"{statistics._fold_of[g]}" for g in rows.groups])
        want = left_out_nll(x @ x.T, rows.targets, fold, rows.scored, scales=[0.3])[0.3]
        np.testing.assert_allclose(statistics.left_out([0.3], 1.0)[0.3], want, rtol=1e-6)

    def test_rows_to_score_are_bounded_and_evenly_spread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sums, "SCORED", 20)
        sample = sums._Sample()
        for start in range(0, 300, 7):
            n = min(7, 300 - start)
            sample.add(torch.arange(start, start + n)[:, None], np.arange(start, start + n))
        assert 10 < len(sample.rows) <= 20
        assert set(np.diff(sample.targets)) == {sample.every}
        assert [int(r) for r in sample.rows] == sample.targets

    def test_energies_alone_are_scored(self) -> None:
        rows, _ = problem(60)
        rows.scored[:] = False
        table = make().fit(ClosedFormData(rows))["left_out_nll"]
        rows.scored[:] = True
        assert table == make().fit(ClosedFormData(rows))["left_out_nll"]

    def test_more_groups_than_labels(self) -> None:
        rows, _ = problem(12, groups=3)
        rows.targets[2:] = np.nan
        with pytest.raises(DataError, match=r"3 groups have 2 labels") as caught:
            make().fit(ClosedFormData(rows))
        assert caught.value.field == "posterior.prior_scale"

    def test_buckets_follow_what_the_labels_determine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Eight for every direction, as far as the bound allows; few and many of one sum are the same fit."""
        monkeypatch.setattr("blip_ft.families.sketch.budget.LEAST", 16)
        rows, _ = problem(7)
        posterior = make("auto", rank=4)
        report = posterior.fit(ClosedFormData(rows, prior_scale=0.5))
        assert report["buckets"] == posterior.buckets == 64
        assert report["effective_parameters"] == pytest.approx(6.5, abs=0.5)
        explicit = make(64, rank=4)
        explicit.fit(ClosedFormData(rows, prior_scale=0.5))
        torch.testing.assert_close(posterior.factor, explicit.factor, rtol=1e-10, atol=1e-12)
        bounded = make("auto", rank=4, max_bytes=8 * (32 * 33 // 2 + 4 * 32))
        report = bounded.fit(ClosedFormData(rows, prior_scale=0.5))
        assert bounded.buckets == 32
        assert "posterior.max_bytes=18688 there would be 64" in bounded.describe(report)


class TestUpdates:
    @pytest.mark.parametrize("m", [64, P])
    def test_added_and_removed_frames_are_a_fresh_fit(self, m: int) -> None:
        rows, _ = problem(120)
        first, last = np.arange(120) < 80, np.arange(120) >= 80
        posterior, fresh, half = (make(m) for _ in range(3))
        data = ClosedFormData(rows, prior_scale=0.5)
        fresh.fit(data)
        for p in (posterior, half):
            p.fit(ClosedFormData(part(rows, first), prior_scale=0.5))
        report = posterior.add(features(posterior, rows, last))
        assert report["n_train_rows"] == 120
        assert report["effective_parameters"] == pytest.approx(fresh.effective_parameters(), rel=1e-9)
        for name in ("factor", "samples", "spread_kl", "determined"):
            torch.testing.assert_close(getattr(posterior, name), getattr(fresh, name), rtol=1e-8, atol=1e-11)
        assert not torch.allclose(posterior.factor, half.factor, rtol=1e-3)
        posterior.remove(features(posterior, rows, last))
        torch.testing.assert_close(posterior.factor, half.factor, rtol=1e-8, atol=1e-10)
        assert posterior.known.frames == half.known.frames

    def test_frames_twice_and_frames_that_are_not_there(self) -> None:
        rows, _ = problem(40)
        posterior = make(64)
        posterior.fit(ClosedFormData(part(rows, np.arange(40) < 32), prior_scale=0.5))
        before = posterior.factor.clone()
        new = features(posterior, rows, slice(32, 40))
        for change, wrong, match in (
            (posterior.add, features(posterior, rows, slice(28, 36)), "already"),
            (posterior.remove, new, "is not in the posterior"),
            (posterior.remove, features(posterior, rows, slice(0, 2)), "with 4 labels, and 2"),
        ):
            with pytest.raises(BlipError, match=match) as caught:
                change(wrong)
            assert caught.value.remedy
        double = features(posterior, rows, [*range(32, 36), *range(32, 36)])
        double.scored[[0, 4]] = False
        with pytest.raises(BlipError, match="given twice"):
            posterior.add(double)
        other = features(posterior, rows, slice(0, 4))
        other.gradients *= 3
        with pytest.raises(BlipError, match="not those that were added"):
            posterior.remove(other)
        assert torch.equal(posterior.factor, before)
        assert posterior.known.rows == 32
        posterior.add(new)
        with pytest.raises(BlipError, match="already"):
            posterior.add(new)

    def test_without_statistics(self) -> None:
        rows, _ = problem(40)
        posterior = make(64)
        posterior.fit(ClosedFormData(rows, prior_scale=0.5))
        posterior.known = None
        with pytest.raises(BlipError, match="folder of the run"):
            posterior.add(features(posterior, rows))

    def test_tensors_and_back(self) -> None:
        rows, _ = problem(40)
        posterior, again = make(64), make(64)
        posterior.fit(ClosedFormData(part(rows, np.arange(40) < 32), prior_scale=0.5, temperature=2.0))
        again.load_state_dict(posterior.state_dict())
        again.set_statistics(posterior.statistics())
        for p in (posterior, again):
            p.add(features(p, rows, slice(32, 40)))
        assert torch.equal(again.factor, posterior.factor)
        other = make(64, seed=1)
        other.fit(ClosedFormData(rows, prior_scale=0.5))
        with pytest.raises(ValueError, match="other buckets"):
            other.set_statistics(posterior.statistics())


def part(rows: LinearizedModel, inside: np.ndarray) -> LinearizedModel:
    assert rows.errors is not None
    assert rows.keys is not None
    return LinearizedModel(
        rows.gradients[torch.from_numpy(inside)],
        rows.targets[inside],
        rows.groups[inside],
        rows.scored[inside],
        rows.errors[inside],
        rows.keys[inside],
    )


class TestFile:
    def test_holds_a_triangle(self) -> None:
        rows, x = problem(40)
        posterior = make(64, rank=5, dtype=torch.float32)
        posterior.fit(ClosedFormData(rows, prior_scale=0.5))
        state = posterior.state_dict()
        assert state["factor"].shape == (64 * 65 // 2,)
        assert sum(t.numel() for t in state.values()) < 64 * 65 // 2 + 5 * 64 + 10
        again = make("auto", rank=5, dtype=torch.float32)
        again.load_state_dict(state)
        np.testing.assert_array_equal(variance(again, x), variance(posterior, x))

    def test_of_another_hash_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows, _ = problem(40)
        posterior = make(64)
        posterior.fit(ClosedFormData(rows, prior_scale=0.5))
        monkeypatch.setattr("blip_ft.families.sketch.posterior.VERSION", 2)
        with pytest.raises(CheckpointError, match="version 1 of the sketch") as caught:
            make(64).load_state_dict(posterior.state_dict())
        assert "train again" in caught.value.remedy
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match="other buckets"):
            make(64, seed=1).load_state_dict(posterior.state_dict())

    def test_seeds(self) -> None:
        rows, _ = problem(40)
        posteriors = [make(64, rank=3, seed=seed) for seed in (0, 0, 1)]
        for posterior in posteriors:
            posterior.fit(ClosedFormData(rows, prior_scale=0.5))
        assert torch.equal(posteriors[0].samples, posteriors[1].samples)
        assert not torch.allclose(posteriors[0].samples, posteriors[2].samples)
