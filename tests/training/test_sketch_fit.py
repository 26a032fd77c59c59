"""The sketched posterior through a whole fit: rows that are not held, its files, and updates of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write
from rich.console import Console

from blip_ft.backbones.registry import get_adapter
from blip_ft.closed_form import gradients
from blip_ft.closed_form.budget import fit_to_budget
from blip_ft.closed_form.fitter import ClosedFormFitter
from blip_ft.closed_form.gradients import GradientRows
from blip_ft.closed_form.statistics_file import NAME, read_statistics
from blip_ft.config import PosteriorConfig, Recipe, load_recipe, parse_recipe
from blip_ft.data.batch.dataset import FrameDataset, GraphCache
from blip_ft.data.frame import to_atoms
from blip_ft.data.read.sources import load_source
from blip_ft.errors import CheckpointError, RecipeError
from blip_ft.families.base.linear import ClosedFormData
from blip_ft.families.sketch.budget import ALL_ROWS, PROJECTIONS, file_bytes
from blip_ft.families.sketch.posterior import SketchPosterior
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.potential.checkpoint import load_model
from blip_ft.testing.fake import FakeBackbone
from blip_ft.training.fit import fit
from blip_ft.training.prepare import Prepared, prepare
from blip_ft.uncertainty.jacobian import all_components, output_gradients, random_orthonormal
from blip_ft.uncertainty.linearized import predict_linearized

from .labelled import frames, small_run

QUIET = Console(quiet=True)
WEIGHTS = 472


def recipe_of(folder: Path, n: int = 24, **posterior: Any) -> Recipe:
    write(folder / "train.extxyz", frames(n, other=True))
    tree = small_run(folder, "train.extxyz")
    tree["posterior"] = {"family": "sketch", "buckets": 128, "rank": 8} | posterior
    tree["optimizer"] = {"learning_rate": 0.01}
    return parse_recipe(tree)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sketch")
    fit(recipe_of(folder), QUIET)
    return folder / "runs/run"


@pytest.fixture
def ready(tmp_path: Path) -> Prepared:
    return prepare(recipe_of(tmp_path), QUIET)


def law(potential: BayesianPotential) -> SketchPosterior:
    assert isinstance(potential.posterior, SketchPosterior)
    return potential.posterior


class TestRun:
    def test_receipt_and_files(self, run: Path) -> None:
        report = json.loads((run / "receipt.json").read_text())["posterior"][-1]
        assert report["buckets"] == 128
        assert 0 < report["absorbed"] < 1
        assert report["absorbed"] == pytest.approx(report["effective_parameters"] / 128, rel=1e-6)
        assert report["bytes"] == file_bytes(128, 8, 8)
        assert len(report["left_out_nll"]) > 10
        assert (run / NAME).stat().st_size < 128 * 129 // 2 * 8 + 24 * 16 + 2000
        assert sorted(p.name for p in (run / "model").iterdir()) == ["model.json", "model.safetensors"]

    def test_energy_std_is_exact(self, run: Path) -> None:
        """From the triangle in the file, without samples; that of the forces from the 8 samples."""
        potential = load_model(run)
        posterior, batch = law(potential), potential.backbone.batch(frames(3, seed=9))
        _, gradient = next(iter(output_gradients(potential, batch, [])))
        features = posterior.features(gradient)
        found = predict_linearized(potential, batch, method="linear")
        torch.testing.assert_close(found.energy_std, posterior.covariance(features).diagonal().sqrt())
        sampled = (features @ posterior.samples.T).square().sum(dim=1).sqrt()
        assert not torch.allclose(found.energy_std, sampled, rtol=1e-3)
        columns = [f for _, f in output_gradients(potential, batch, all_components(batch))][1:]
        variance = torch.stack(
            [(posterior.features(g) @ posterior.samples.T).square().sum(dim=1) for g in columns]
        )
        assert found.forces_cov is not None
        own = torch.diagonal(found.forces_cov, dim1=1, dim2=2).reshape(3, -1).T
        torch.testing.assert_close(own, variance, rtol=1e-6, atol=1e-12)

    def test_is_the_fit_of_rows_that_are_held(self, run: Path) -> None:
        """The same covariance from all gradients side by side."""
        potential = load_model(run)
        before = law(potential).factor.clone()
        recipe = recipe_of(run.parent.parent)
        prepared = prepare(recipe, QUIET)
        rows = GradientRows(
            recipe.objective, potential, prepared.sets["train"], seed=recipe.seed, orthonormal=True
        )
        report = json.loads((run / "receipt.json").read_text())["posterior"][-1]
        made = report["rows_of"]
        again = law(potential).fit(ClosedFormData(rows.rows(made["projections"], number=made["number"])))
        torch.testing.assert_close(law(potential).factor, before, rtol=1e-8, atol=1e-10)
        assert again["prior_scale"] == report["prior_scale"]

    def test_other_hash(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("blip_ft.families.sketch.buckets.VERSION", 2)
        monkeypatch.setattr("blip_ft.families.sketch.posterior.VERSION", 2)
        with pytest.raises(CheckpointError, match="version 1 of the sketch") as caught:
            load_model(run)
        assert "train again" in str(caught.value)


class TestRows:
    def test_features_are_those_of_the_rows(self, ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
        """In pieces of a few frames, whatever their number; with and without projections."""
        recipe = ready.recipe
        rows = GradientRows(recipe.objective, ready.potential, ready.sets["train"], orthonormal=True)
        collected = law(ready.potential).collect()
        monkeypatch.setattr(gradients, "CHUNK", 1)
        monkeypatch.setattr(gradients, "BATCH", 2)
        for projections in (None, 4):
            whole = rows.rows(projections, number=1)
            pieces = list(rows.features(collected.features, collected.width, projections, number=1))
            assert len(pieces) > 1
            torch.testing.assert_close(
                torch.cat([p.gradients for p in pieces]), collected.features(whole.gradients)
            )
            for name in ("targets", "errors", "groups", "scored", "keys"):
                parts = np.concatenate([getattr(p, name) for p in pieces])
                np.testing.assert_array_equal(parts, getattr(whole, name), err_msg=name)
        train = ready.sets["train"]
        assert set(whole.keys.tolist()) == {train.key(i) for i in range(len(train))}

    def test_more_projections_than_components_are_all_components(self, ready: Prepared) -> None:
        args = ready.recipe.objective, ready.potential, ready.sets["train"]
        rows = GradientRows(*args, orthonormal=True)
        many, every = rows.rows(50), rows.rows(None)
        assert len(many.gradients) == len(every.gradients)
        assert torch.equal(many.gradients, every.gradients)

    def test_orthonormal_projections_stand_for_all(self, ready: Prepared) -> None:
        batch = ready.potential.backbone.batch([frames(1)[0], frames(1)[0][:2], frames(1)[0][:1]])
        batch.keys = [3, 4, 5]
        found = torch.stack(random_orthonormal(batch, 4, "seed")).flatten(1)
        for columns, n in ((slice(0, 9), 9), (slice(9, 15), 6), (slice(15, 18), 3)):
            mine = found[:, columns]
            k = min(4, n)
            torch.testing.assert_close(mine @ mine.T, n / k * torch.diag((torch.arange(4) < k).double()))
        sums = sum(
            (v := torch.stack(random_orthonormal(batch, 4, seed)).flatten(1)[:, :9]).T @ v
            for seed in range(2000)
        )
        torch.testing.assert_close(sums / 2000, torch.eye(9, dtype=torch.float64), rtol=0, atol=0.1)

    def test_graphs_beyond_the_cache_are_not_held(self, ready: Prepared) -> None:
        train = ready.sets["train"]
        bare = FrameDataset(train.frames, ready.potential.backbone, GraphCache(0.0))
        rows = GradientRows(ready.recipe.objective, ready.potential, bare)
        collected = law(ready.potential).collect()
        for _ in rows.features(collected.features, collected.width, 2):
            assert not any(bare._items)

    def test_a_fit_holds_no_rows(self, ready: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
        def never(self: GradientRows, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("rows are held")

        monkeypatch.setattr(GradientRows, "rows", never)
        ClosedFormFitter(ready.recipe, ready.potential, ready.sets, QUIET).fit(final=True)
        assert ready.potential.posterior.ready


class TestUpdates:
    """Of a run on the disk: its frames taken out, others put in."""

    @staticmethod
    def features(potential: BayesianPotential, folder: Path, atoms: list[Atoms], made: dict[str, Any]) -> Any:
        write(folder / "new.extxyz", atoms)
        recipe = recipe_of(folder)
        source = FrameDataset(load_source(str(folder / "new.extxyz")), potential.backbone)
        rows = GradientRows(recipe.objective, potential, source, orthonormal=True)
        (found,) = rows.features(law(potential).features, law(potential).buckets, **made)
        return found

    def test_equal_a_fresh_fit_at_the_same_mean(self, run: Path, tmp_path: Path) -> None:
        potential, fresh = load_model(run), load_model(run)
        made = read_statistics(potential, run)
        posterior = law(potential)
        before, s = posterior.factor.clone(), posterior.known.scale
        new = self.features(potential, tmp_path, frames(8, seed=3, other=True), made)
        report = posterior.add(new)
        assert report["n_train_rows"] == posterior.known.rows

        # a fit of the training frames and the new ones, whose number of buckets and scale are given
        recipe = recipe_of(tmp_path)
        train = prepare(recipe_of(run.parent.parent), QUIET).sets["train"]
        old = GradientRows(recipe.objective, fresh, train, seed=recipe.seed, orthonormal=True)
        collected = law(fresh).collect()
        for rows in (*old.features(collected.features, collected.width, **made), new):
            collected.add(rows)
        law(fresh).fit(ClosedFormData(collected, prior_scale=s))
        torch.testing.assert_close(posterior.factor, law(fresh).factor, rtol=1e-8, atol=1e-10)
        assert not torch.allclose(posterior.factor, before, rtol=1e-3)
        posterior.remove(new)
        torch.testing.assert_close(posterior.factor, before, rtol=1e-8, atol=1e-9)

    def test_a_mean_that_has_moved(self, run: Path) -> None:
        potential = load_model(run)
        with torch.no_grad():
            potential.mean_parameters[0].add_(1e-3)
        with pytest.raises(CheckpointError, match="other weights") as caught:
            read_statistics(potential, run)
        assert caught.value.file == str(run / NAME)

    def test_files_that_cannot_be_read(self, run: Path, tmp_path: Path) -> None:
        potential = load_model(run)
        with pytest.raises(CheckpointError, match="no sums") as caught:
            read_statistics(potential, tmp_path)
        assert "sketch" in caught.value.remedy
        (tmp_path / NAME).write_bytes((run / NAME).read_bytes()[:5000])
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            read_statistics(potential, tmp_path)
        assert caught.value.file == str(tmp_path / NAME)


class TestBudget:
    @staticmethod
    def reduced(
        folder: Path, n_frames: int = 30, atoms: int = 3, **posterior: Any
    ) -> tuple[Recipe, list[str]]:
        said: list[str] = []
        recipe = recipe_of(folder, **posterior)
        return fit_to_budget(recipe, FakeBackbone(), [atoms] * n_frames, 0, said.append), said

    def test_more_buckets_than_weights(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="473 buckets are more than the 472") as caught:
            self.reduced(tmp_path, buckets=473)
        assert caught.value.field == "posterior.buckets"
        self.reduced(tmp_path, buckets=472)

    @pytest.mark.parametrize(("buckets", "least"), [(128, 128), ("auto", WEIGHTS)])
    def test_a_bound_that_is_too_small_names_the_smallest(
        self, tmp_path: Path, buckets: Any, least: int
    ) -> None:
        room = file_bytes(least, 8, 8)
        with pytest.raises(RecipeError) as caught:
            self.reduced(tmp_path, buckets=buckets, max_bytes=room - 1)
        assert caught.value.field == "posterior.max_bytes"
        assert str(room) in caught.value.remedy
        assert self.reduced(tmp_path, buckets=buckets, max_bytes=room)[1] == []

    def test_projections_for_large_sets(self, tmp_path: Path) -> None:
        small, said = self.reduced(tmp_path, 32, 20)
        assert (small.posterior.projections, said) == ("all", [])
        assert 32 * 61 < ALL_ROWS < 33 * 61
        middle, (line,) = self.reduced(tmp_path, 100, 20)
        assert "19 orthonormal projections" in line
        large, _ = self.reduced(tmp_path, 5000, 20)
        assert large.posterior.projections == PROJECTIONS
        for recipe, last, first in ((small, None, 8), (middle, 19, 8), (large, 8, 4)):
            of_fit = recipe.posterior.projections_of_fit
            assert (of_fit(last=True), of_fit(last=False)) == (last, first)
        assert self.reduced(tmp_path, 5000, 20, projections=60)[0].posterior.projections == 60
        few_atoms, _ = self.reduced(tmp_path, 5000, 2)
        assert few_atoms.posterior.projections == "all", "there are 6 components"


@pytest.mark.backend("sevennet")
def test_beside_all_weights_of_a_real_model() -> None:
    """Stds of seen and unseen frames over the exact ones, within the law of the sketch; `pathwise` beside it."""
    recipe = load_recipe("sio2_sevennet", [])
    source = load_source("sio2_polymorphs@train").select([0, 20])
    far = [to_atoms(load_source(f"sio2_polymorphs@{name}")[0]) for name in ("test", "stishovite")]
    s, found, exact = 0.3, {}, np.zeros(0)
    for family, options in (("pathwise", {"rank": 128}), ("sketch", {"buckets": 2048})):
        potential = BayesianPotential(
            get_adapter("sevennet").load("7net-0"),
            recipe.model,
            PosteriorConfig(family=family, **options),
        ).to_dtype("float32")
        rows = GradientRows(
            recipe.objective, potential, FrameDataset(source, potential.backbone), orthonormal=True
        ).rows(8)
        posterior = potential.posterior
        report = posterior.fit(ClosedFormData(rows, prior_scale=s))
        batch = potential.backbone.batch(far)
        batch.keys = [1, 2]
        made = output_gradients(potential, batch, random_orthonormal(batch, 3, "far"))
        g = torch.cat([gradient for _, gradient in made])
        if not len(exact):  # in the space of outputs, all weights
            gram, cross = (a.double() @ rows.gradients.T.double() for a in (rows.gradients, g))
            solved = torch.linalg.solve(gram + torch.eye(len(gram), dtype=gram.dtype) / s**2, cross.T)
            exact = s * (g.double().square().sum(dim=1) - (cross * solved.T).sum(dim=1)).sqrt().numpy()
        parts = {
            site.name: part.reshape(-1, *site.shape) / potential.prior.rms(site.name)
            for site, part in zip(
                posterior.sites, g.split([s.numel for s in posterior.sites], dim=1), strict=True
            )
        }
        found[family] = posterior.linear_variance(parts).double().sqrt().numpy() / exact
    left = 2048 - report["effective_parameters"]
    assert np.abs(found["sketch"] - 1).max() < 4 / math.sqrt(2 * left)
    assert np.abs(found["pathwise"] - 1).max() < 4 / math.sqrt(2 * 128)
