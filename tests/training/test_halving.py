"""Trainings on a machine with little memory: the same model, and a word about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase.io import write
from rich.console import Console

from blip_ft import cli
from blip_ft.backbones.parts_in_turn import evaluate_in_turn
from blip_ft.backbones.protocol import Batch
from blip_ft.closed_form.gradients import GradientRows
from blip_ft.closed_form.row_order import merged, places
from blip_ft.config import parse_recipe
from blip_ft.data.batch.dataset import Item, collate
from blip_ft.errors import RecipeError
from blip_ft.potential.bayesian import BayesianPotential
from blip_ft.training.halving import AtomLimit
from blip_ft.training.prepare import Prepared, prepare
from blip_ft.variational.noise import OFF

from ..potential.around_fake import make
from ..small_memory import memory_for
from ..test_side_by_side import items_of, loss_and_gradients
from .labelled import frames

QUIET = Console(quiet=True)


def recipe_of(folder: Path, **posterior: Any) -> dict[str, Any]:
    write(folder / "frames.extxyz", frames(16, scale=1.1))
    return {
        "output": str(folder / "runs"),
        "name": "run",
        "data": {"train": str(folder / "frames.extxyz"), "batch_size": 4},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": posterior,
        "objective": {"temperature": 1e-3} if "family" in posterior else {},
        "uncertainty": {"n_draws": 4, "linearity_frames": 0},
        "plain": {"enabled": True},
        "verify": {"enabled": False},  # many small calls; tests/verify has them by halves
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1},
    }


def metrics_of(recipe: dict[str, Any], folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | changes), encoding="utf-8")
    assert cli.main(["fit", str(path), f"name={name}"]) == 0
    out: dict[str, Any] = json.loads((folder / "runs" / name / "metrics.json").read_text())
    return out


def close(one: Any, other: Any, where: str = "") -> None:
    if isinstance(other, dict):
        assert one.keys() == other.keys()
        for key, value in other.items():
            close(one[key], value, f"{where}/{key}")
    elif isinstance(other, float):
        # pairs of nearly equal errors change their ranks by rounding
        assert "spearman" in where or one == pytest.approx(other, rel=1e-5, abs=1e-7), where
    else:
        assert one == other, where


@pytest.mark.default
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "posterior", [{"family": "weight", "prior_scale": 0.1}, {"rank": 8}], ids=["weight", "pathwise"]
)
def test_a_fit_with_little_memory_is_the_same_fit(
    tmp_path: Path, posterior: dict[str, Any], backward: bool, caplog: pytest.LogCaptureFixture
):
    """Batches have 12 atoms; 11 fit, and so the parts have two structures."""
    recipe = recipe_of(tmp_path, **posterior)
    want = metrics_of(recipe, tmp_path, "whole")
    assert "out of memory" not in caplog.text
    with memory_for(11, backward=backward) as seen:
        got = metrics_of(recipe, tmp_path, "halves")
    assert seen.failed
    assert max(seen.fitted) <= 11
    assert "of 4 structures (12 atoms): going on in parts of up to 6 atoms" in caplog.text
    close(got, want)


@pytest.mark.default
@pytest.mark.parametrize(
    "posterior", [{"family": "weight", "prior_scale": 0.1}, {"rank": 8}], ids=["weight", "pathwise"]
)
def test_a_fit_in_parts_from_the_start_is_the_same_fit(tmp_path: Path, posterior: dict[str, Any]):
    """A step has 12 atoms, its parts six: what does not fit is never tried in training."""
    recipe = recipe_of(tmp_path, **posterior)
    want = metrics_of(recipe, tmp_path, "whole")
    recipe["data"]["atoms_at_once"] = 6
    sizes: list[int] = []
    take = AtomLimit.parts

    def parts(self: AtomLimit, batch: Batch) -> Batch:
        out = take(self, batch)
        sizes.extend(p.n_structures for p in out.parts)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtomLimit, "parts", parts)
        got = metrics_of(recipe, tmp_path, "parts")
    assert set(sizes) == {2}
    close(got, want)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"posterior": {"family": "adaptive", "prior_scale": 0.1}}, "all structures of a batch"),
        ({"data": {"num_workers": 1}}, "workers"),
    ],
)
def test_what_cannot_be_divided_is_said_before_any_work(
    tmp_path: Path, sections: dict[str, Any], message: str
):
    recipe = recipe_of(tmp_path, family="weight", prior_scale=0.1)
    recipe["data"]["atoms_at_once"] = 6
    for name, section in sections.items():
        recipe[name] |= section
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(recipe)
    assert caught.value.field == "data.atoms_at_once"


@pytest.mark.default
def test_gradients_that_were_there_before_stay(tmp_path: Path):
    recipe = recipe_of(tmp_path, family="weight", prior_scale=0.1)
    recipe["trainer"] |= {"accumulate_grad_batches": 2, "max_epochs": 1}
    want = metrics_of(recipe, tmp_path, "whole")
    with memory_for(11, backward=True) as seen:
        got = metrics_of(recipe, tmp_path, "halves")
    assert seen.failed
    close(got, want)


def test_a_structure_that_does_not_fit_ends_the_fit_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(tmp_path, family="weight", prior_scale=0.1)), encoding="utf-8")
    with memory_for(2, backward=True):
        assert cli.main(["fit", str(path)]) == 2
    err = capsys.readouterr().err
    assert "does not fit into memory, structure by structure: the largest has 3 atoms" in err
    assert "What to do" in err


def test_a_family_that_cannot_be_divided_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "recipe.yaml"
    recipe = recipe_of(tmp_path, family="adaptive", prior_scale=0.1) | {"plain": {"enabled": False}}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with memory_for(7, backward=True):
        assert cli.main(["fit", str(path)]) == 2
    assert "'adaptive' depends on all structures of a batch" in capsys.readouterr().err


# ---- parts one after the other -----------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("weight", "off"),
        ("weight", "structure"),
        ("weight", "local"),
        ("channel", "flipout"),
        ("subspace", "structure"),
        ("subspace", "draw"),
    ],
)
def test_loss_and_gradients_are_those_of_the_whole_batch(family: str, mode: Any, parts: int):
    potential = make(family=family, mode=mode if mode in ("local", "flipout") else "structure", init_std=0.2)
    whole, expected = loss_and_gradients(potential, 1, mode)
    before = BayesianPotential.forward

    def in_turn(self: Any, batch: Any, *noise: Any, **options: Any) -> Any:
        if batch.parts:
            batch.in_turn = True
        return before(self, batch, *noise, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BayesianPotential, "forward", in_turn)
        value, gradients = loss_and_gradients(potential, parts, mode)
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    for name, gradient in expected.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


def reversed_items(potential: BayesianPotential) -> list[Item]:
    return items_of(potential.backbone)[::-1]


@pytest.mark.parametrize("how", ["side by side", "in turn"])
def test_forces_have_gradients_behind_an_atom_alone(how: str):
    """The first part is an atom without neighbours, whose forces depend on nothing."""
    potential = make()
    items = reversed_items(potential)
    assert len(items[0].atoms) == 1
    batch = collate(potential.backbone, items)

    def gradient(out: Any) -> torch.Tensor:
        (grad,) = torch.autograd.grad(
            out.forces.square().sum(), [potential.mean_parameters[0]], allow_unused=True
        )
        assert grad is not None
        return grad

    want = gradient(potential(batch, OFF, create_graph=True))
    batch.parts = tuple(collate(potential.backbone, some) for some in (items[:1], items[1:]))
    if how == "in turn":
        batch.in_turn = True
        got = gradient(potential(batch, OFF, create_graph=True))
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            got = gradient(potential(batch, OFF, create_graph=True))
        finally:
            torch.set_num_threads(threads)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_no_graph_is_kept_between_the_calls():
    """Each part is evaluated twice: once for its numbers, once for its gradient."""
    potential = make()
    items = items_of(potential.backbone)
    calls: list[int] = []

    def evaluate(part: Any) -> Any:
        calls.append(part.n_structures)
        return potential.backbone(part, create_graph=True), None

    parts = [collate(potential.backbone, some) for some in (items[:1], items[1:])]
    out, _ = evaluate_in_turn(evaluate, parts, potential.parameters())
    assert calls == [1, 3]
    out.energy.sum().backward()
    assert calls == [1, 3, 1, 3]


# ---- gradient rows -----------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    recipe = recipe_of(tmp_path, rank=8)
    return prepare(parse_recipe(recipe), QUIET)


@pytest.mark.parametrize("projections", [None, 3])
def test_rows_made_by_halves_stand_where_they_would(prepared: Prepared, projections: int | None):
    made = GradientRows(prepared.recipe.objective, prepared.potential, prepared.sets["train"])
    want = made.rows(projections)
    with memory_for(7) as seen:
        got = made.rows(projections)
    assert seen.failed
    torch.testing.assert_close(got.gradients, want.gradients, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got.targets, want.targets, rtol=1e-7, atol=1e-9)
    assert got.groups.tolist() == want.groups.tolist()
    assert got.scored.tolist() == want.scored.tolist()


def test_the_hessian_by_halves(prepared: Prepared):
    made = GradientRows(prepared.recipe.objective, prepared.potential, prepared.sets["train"])
    basis = torch.eye(5, sum(s.numel for s in prepared.potential.posterior.sites), dtype=torch.float64)
    want = made.hessian(basis, 2, 0)
    with memory_for(7) as seen:
        got = made.hessian(basis, 2, 0)
    assert seen.failed
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_places_of_rows():
    counts = np.array([9, 2, 3, 1, 9])
    part = range(1, 4)  # rows: 1 2 3 | 1 2 | 2
    assert places(part, range(1, 4), counts).tolist() == [0, 1, 2, 3, 4, 5]
    assert places(part, range(1, 2), counts).tolist() == [0, 3]
    assert places(part, range(2, 4), counts).tolist() == [1, 2, 4, 5]


def test_nothing_is_merged_of_one_piece():
    whole = object()
    assert merged([(np.arange(3), whole)]) is whole
