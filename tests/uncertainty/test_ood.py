"""The out-of-distribution score: known answers, laws, and its way through a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st

from blip_ft.backbones.protocol import Prediction
from blip_ft.config import ModelConfig, PosteriorConfig
from blip_ft.data.batch.dataset import Item
from blip_ft.potential import distance
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.distance import FeatureDistance, ledoit_wolf
from blip_ft.testing.fake import FakeBackbone
from blip_ft.uncertainty import ood
from blip_ft.uncertainty.ood import fit_distance


def atoms(n: int = 400, f: int = 5, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Gaussian features of two elements with means and covariances of their own, in five groups."""
    rng = np.random.default_rng(seed)
    z = rng.choice([8, 14], size=n)
    mix = {k: size * (np.eye(f) + 0.3 * rng.normal(size=(f, f))) for k, size in ((8, 1.0), (14, 0.4))}
    x = np.stack([rng.normal(size=f) @ mix[k] + (3.0 if k == 8 else -1.0) for k in z])
    return x, z, [f"g{i % 5}" for i in range(n)]


def score(distance: FeatureDistance, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    return distance.score(torch.from_numpy(x), torch.from_numpy(z)).numpy()


class TestDistance:
    def test_many_atoms_give_the_mahalanobis_distance_of_their_element(self) -> None:
        x, z, groups = atoms(40_000)
        model = FeatureDistance.fit(x, z, groups)
        new = np.random.default_rng(1).normal(size=(50, 5)) * 3
        for element in (8, 14):
            own = x[z == element]
            precision = np.linalg.inv(np.cov(own.T))
            off = new - own.mean(axis=0)
            exact = np.sqrt(np.einsum("ni,ij,nj->n", off, precision, off))
            found = score(model, new, np.full(50, element))
            np.testing.assert_allclose(found / found.mean(), exact / exact.mean(), rtol=0.02)
            # and the scale is the median distance of such atoms
            known = np.sqrt(np.einsum("ni,ij,nj->n", own - own.mean(0), precision, own - own.mean(0)))
            np.testing.assert_allclose(found, exact / np.median(known), rtol=0.03)

    def test_left_out_groups_have_a_median_of_one(self) -> None:
        """Groups with centres of their own: atoms of a group that was seen are much nearer."""
        rng = np.random.default_rng(2)
        group = np.repeat(np.arange(12), 30)
        x = rng.normal(size=(360, 6)) * 0.1 + rng.normal(size=(12, 6))[group]
        z = np.full(360, 14)
        names = [str(g) for g in group]
        model = FeatureDistance.fit(x[group < 8], z[group < 8], names[: int((group < 8).sum())])
        seen, unseen = (np.median(score(model, x[m], z[m])) for m in (group < 8, group >= 8))
        assert seen < 0.8 * unseen
        assert 0.6 < unseen < 1.7

    def test_an_unknown_element_is_infinitely_far(self) -> None:
        x, z, groups = atoms()
        model = FeatureDistance.fit(x, z, groups)
        found = score(model, x[:2], np.array([8, 79]))
        assert np.isfinite(found[0])
        assert np.isinf(found[1])

    def test_a_rare_element_has_the_tied_covariance_and_the_common_scale(self) -> None:
        x, z, groups = atoms()
        x, z, groups = np.vstack([x, x[:1] + 5]), np.append(z, 1), [*groups, "g0"]
        model = FeatureDistance.fit(x, z, groups)
        i = model.numbers.tolist().index(1)
        assert model.numbers.tolist() == [1, 8, 14]
        tied = ledoit_wolf(np.vstack([x[z == k] - x[z == k].mean(axis=0) for k in (1, 8, 14)]))
        np.testing.assert_allclose(
            np.sort(model.variances[i, :-1].numpy()), np.linalg.eigvalsh(tied) * 5 / 6, rtol=1e-4
        )
        assert min(model.scale[1:]) <= model.scale[i] <= max(model.scale[1:])
        assert score(model, x[-1:], z[-1:])[0] == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("case", ["one atom", "equal atoms", "one group", "zeros"])
    def test_degenerate_training_sets(self, case: str) -> None:
        x, z, groups = atoms(60)
        if case == "one atom":
            x, z, groups = x[:1], z[:1], groups[:1]
        elif case == "equal atoms":
            x = np.where(z[:, None] == 8, x[z == 8][:1], x[z == 14][:1])
        elif case == "one group":
            groups = ["all"] * 60
        else:
            x = np.zeros_like(x)
        model = FeatureDistance.fit(x, z, groups)
        near, far = score(model, x, z), score(model, x + 10, z)
        assert np.isfinite(near).all()
        assert np.isfinite(far).all()
        assert far.min() > 3 * max(near.max(), 0.1)

    @given(st.integers(0, 10**6), st.integers(1, 8), st.floats(1e-2, 1e2))
    def test_does_not_depend_on_axes_units_or_order(self, seed: int, f: int, unit: float) -> None:
        x, z, groups = atoms(60, f, seed=seed)
        rng = np.random.default_rng(seed)
        model = FeatureDistance.fit(x, z, groups)
        turn = np.linalg.qr(rng.normal(size=(f, f)))[0]
        turned = FeatureDistance.fit(unit * x @ turn, z, groups)
        new = rng.normal(size=(20, f)) * 4
        elements = rng.choice([8, 14], size=20)
        np.testing.assert_allclose(
            score(turned, unit * new @ turn, elements), score(model, new, elements), rtol=2e-4
        )
        order = rng.permutation(60)
        shuffled = FeatureDistance.fit(x[order], z[order], [groups[i] for i in order])
        np.testing.assert_allclose(score(shuffled, new, elements), score(model, new, elements), rtol=1e-4)
        order = rng.permutation(20)
        np.testing.assert_allclose(
            score(model, new[order], elements[order]), score(model, new, elements)[order]
        )


class TestStorage:
    def test_what_scores_is_what_is_stored(self) -> None:
        x, z, groups = atoms()
        model = FeatureDistance.fit(x, z, groups)
        again = FeatureDistance.from_tensors(model.tensors())
        assert np.array_equal(score(again, x, z), score(model, x, z))

    @pytest.mark.parametrize(("elements", "f"), [(2, 128), (12, 128), (89, 128), (5, 640), (89, 1024)])
    def test_size(self, elements: int, f: int) -> None:
        rank = distance._rank(elements, f)
        size = 4 * elements * ((1 + rank) * f + rank + 2)
        assert rank >= 1
        assert rank == 32 or elements * f > 1200
        assert size < 200_000 or rank == 1

    def test_fewer_directions_leave_the_rest_a_common_variance(self) -> None:
        x, z, groups = atoms(4000, 12)
        x[:, :9] *= 0.03
        whole = FeatureDistance.fit(x, z, groups)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distance, "RANK", 3)
            few = FeatureDistance.fit(x, z, groups)
        assert few.directions.shape == (2, 3, 12)
        far = x.copy()
        far[:, 0] += 3.0  # along a direction of little variance: seen by what was left over
        assert np.median(score(few, far, z)) > 5
        assert np.corrcoef(score(few, x, z), score(whole, x, z))[0, 1] > 0.5

    def test_shapes_that_do_not_fit(self) -> None:
        x, z, groups = atoms()
        tensors = FeatureDistance.fit(x, z, groups).tensors()
        with pytest.raises(ValueError, match=r"ood\.scale"):
            FeatureDistance.from_tensors(tensors | {"scale": torch.ones(3)})
        with pytest.raises(TypeError):
            FeatureDistance.from_tensors({"scale": torch.ones(2)})


class TestLedoitWolf:
    def test_weight_against_the_definition(self) -> None:
        x = np.random.default_rng(3).normal(size=(15, 6)) * [1, 2, 3, 1, 1, 0.1]
        S = x.T @ x / 15
        mu = np.trace(S) / 6
        d2 = np.sum((S - mu * np.eye(6)) ** 2)
        b2 = sum(np.sum((np.outer(r, r) - S) ** 2) for r in x) / 15**2
        weight = min(b2, d2) / d2
        np.testing.assert_allclose(ledoit_wolf(x), (1 - weight) * S + weight * mu * np.eye(6), rtol=1e-12)

    def test_many_rows_are_hardly_shrunk_and_few_are_full_rank(self) -> None:
        rng = np.random.default_rng(4)
        many, few = rng.normal(size=(50_000, 4)) * [1, 2, 3, 4], rng.normal(size=(3, 10))
        np.testing.assert_allclose(ledoit_wolf(many), many.T @ many / 50_000, atol=0.02)
        assert np.linalg.eigvalsh(ledoit_wolf(few)).min() > 0.05


class TestSelection:
    class Rows:
        def __init__(self, numbers: list[list[int]]) -> None:
            self.frames = {"numbers": numbers}

    def test_all_frames_of_a_small_set(self) -> None:
        rows: Any = self.Rows([[8, 8]] * 10)
        assert ood._selection(rows) == list(range(10))

    def test_a_large_set_is_thinned_but_keeps_every_element(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ood, "MAX_ATOMS", 50)
        numbers = [[8, 14]] * 200
        numbers[33] = [8, 79]
        rows: Any = self.Rows(numbers)
        chosen = ood._selection(rows)
        assert 33 in chosen
        assert 45 <= 2 * len(chosen) <= 54


class TestOfTrainingFrames:
    def data(self) -> tuple[BayesianPotential, Any]:
        options = ModelConfig(adapter="fake", checkpoint="tiny")
        potential = BayesianPotential(
            FakeBackbone(), options, PosteriorConfig(family="weight", prior_scale=0.1)
        )
        items = []
        for seed in range(6):
            atoms = bulk("SiO", "rocksalt", 4.6)
            atoms.rattle(0.1, seed=seed)
            items.append(Item(atoms, potential.backbone.graph(atoms), {}, seed))

        class Frames(list[Item]):
            frames = {"numbers": [i.atoms.numbers.tolist() for i in items]}

        return potential, Frames(items)

    def test_features_of_the_mean_weights(self) -> None:
        potential, train = self.data()
        groups = list("aabbcc")
        model = fit_distance(potential, train, groups)
        batch = potential.backbone.batch([i.atoms for i in train])
        features = potential(batch).node_features.detach().numpy()
        owners = [groups[i] for i in batch.structure.tolist()]
        expected = FeatureDistance.fit(features, batch.numbers.numpy(), owners)
        assert model is not None
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(model.tensors()[name].abs(), tensor.abs(), rtol=1e-4, atol=1e-6)

    def test_a_backbone_without_features_has_no_score(self, monkeypatch: pytest.MonkeyPatch) -> None:
        potential, train = self.data()
        monkeypatch.setattr(
            potential.backbone,
            "forward",
            lambda batch, **options: Prediction(torch.zeros(batch.n_structures)),
        )
        assert fit_distance(potential, train, list("aabbcc")) is None

    def test_frames_are_turned_for_a_backbone_that_is_not_equivariant(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        potential, train = self.data()
        seen: list[Any] = []
        collate = potential.backbone.collate

        def remember(atoms: Any, graphs: Any) -> Any:
            seen.extend(atoms)
            return collate(atoms, graphs)

        monkeypatch.setattr(potential.backbone, "collate", remember)
        monkeypatch.setattr(FakeBackbone, "equivariant", False)
        both = fit_distance(potential, train, list("aabbcc"))
        assert len(seen) == 12
        for one, other in zip(seen[:6], seen[6:], strict=True):
            assert np.abs(one.positions - other.positions).max() > 0.1
            np.testing.assert_allclose(
                one.get_all_distances(mic=True), other.get_all_distances(mic=True), atol=1e-9
            )
        monkeypatch.undo()
        once = fit_distance(potential, train, list("aabbcc"))
        assert once is not None
        assert both is not None
        torch.testing.assert_close(both.mean, once.mean)  # the fake model is invariant
