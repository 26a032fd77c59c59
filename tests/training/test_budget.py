"""The byte budget of the subspace posterior: what is given up, in which order, and what a run holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import blip_ft
from blip_ft.cli import main
from blip_ft.closed_form.budget import fit_to_budget
from blip_ft.config import Recipe, load_recipe, parse_recipe
from blip_ft.errors import RecipeError
from blip_ft.families.base.budget import MIN_PROJECTIONS, MIN_RANK, megabytes, row_bytes
from blip_ft.families.registry import without_foreign_keys
from blip_ft.testing.fake import FakeBackbone
from blip_ft.variational.convert import plan

from .labelled import frames

FRAMES = 10


def recipe(max_bytes: Any = None, *, noise: Any = "all", dtype: str = "float32", **posterior: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "run",
            "data": {"train": "x.extxyz"},
            "model": {"adapter": "fake", "checkpoint": "tiny", "noise": noise, "dtype": dtype},
            "posterior": without_foreign_keys(
                {"family": "subspace", "max_bytes": max_bytes, "rank": 64, **posterior}
            ),
        }
    )


def weights(noise: Any) -> int:
    return plan(FakeBackbone(), noise=noise).counts["noisy"]


P = {name: weights(name) for name in ("all", "scalar", "readout")}


def reduced(*args: Any, **kwargs: Any) -> tuple[Recipe, list[str]]:
    said: list[str] = []
    return fit_to_budget(recipe(*args, **kwargs), FakeBackbone(), [3] * FRAMES, 0, said.append), said


def test_no_budget_changes_nothing() -> None:
    asked = recipe()
    assert fit_to_budget(asked, FakeBackbone(), [3] * FRAMES, 0, pytest.fail) is asked


def test_room_for_all_stores_float32() -> None:
    out, said = reduced("1 GB")
    assert (out.posterior.rank, out.posterior.projections, out.posterior.storage) == (64, 8, "float32")
    assert out.model.noise == "all"
    assert len(said) == 1
    assert "gradients" in said[0]


def test_the_order_in_which_things_are_given_up() -> None:
    """Few projections asked for, so that directions are what is large; then many, so that rows are."""
    p = P["all"]
    half = 64 * p * 2
    narrow = {"projections": 1}
    frames_fit = row_bytes(p, FRAMES, 1, 4)
    assert frames_fit < half, "else the rows would decide"
    out, said = reduced(2 * half - 1, **narrow)
    assert (out.posterior.rank, out.posterior.storage) == (64, "float16")
    assert "float16 instead of float32" in said[0]
    out, said = reduced(half - 1, **narrow)
    assert (out.posterior.rank, out.posterior.storage) == (63, "float16")
    assert any("rank 63 instead of 64" in line for line in said)
    rows = row_bytes(p, FRAMES, 8, 4)
    out, said = reduced(rows - 1)
    assert (out.posterior.rank, out.posterior.projections) == (64, 7)
    assert any("7 projections instead of 8" in line and f"({FRAMES} frames)" in line for line in said)


def test_narrower_scopes() -> None:
    least = max(MIN_RANK * P["all"] * 2, row_bytes(P["all"], FRAMES, MIN_PROJECTIONS, 4))
    out, _ = reduced(least)
    assert out.model.noise == "all"
    out, said = reduced(least - 1)
    assert out.model.noise == "scalar"
    assert f"({P['scalar']:,} weights) instead of all ({P['all']:,} weights)" in said[0]
    assert out.posterior.projections >= MIN_PROJECTIONS, "counted anew for the narrower scope"
    # a scope that the recipe does not contain is no way out
    with pytest.raises(RecipeError, match="at least"):
        reduced(1000, noise="radial")


@given(
    limit=st.integers(1, 2_000_000),
    rank=st.integers(1, 200),
    projections=st.integers(1, 12),
    storage=st.sampled_from(["auto", "float32", "float16"]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_what_comes_out_fits_and_an_error_names_the_least_that_would(
    limit: int, rank: int, projections: int, storage: str, dtype: str
) -> None:
    options: dict[str, Any] = {"rank": rank, "projections": projections, "storage": storage, "dtype": dtype}
    try:
        out, _ = reduced(limit, **options)
    except RecipeError as error:
        least = int(re.search(r"at least (\d+)", str(error)).group(1))
        assert least > limit
        reduced(least, **options)
        with pytest.raises(RecipeError):
            reduced(least - 1, **options)
        return
    p, number = weights(out.model.noise), {"float32": 4, "float64": 8}[dtype]
    assert min(out.posterior.rank, p) * p * {"float32": 4, "float16": 2}[out.posterior.storage] <= limit
    assert row_bytes(p, FRAMES, out.posterior.projections, number) <= limit
    assert out.posterior.rank <= rank
    assert out.posterior.projections <= projections
    assert storage in ("auto", out.posterior.storage)
    # what came out fits as it is: the recipe of a run can be run again
    again = fit_to_budget(out, FakeBackbone(), [3] * FRAMES, 0, lambda _: None)
    assert again == out


@pytest.mark.parametrize(("value", "number"), [("200 MB", 200_000_000), ("1.5GiB", 3 * 2**29), (4096, 4096)])
def test_budgets_are_numbers_or_words(value: Any, number: int) -> None:
    assert recipe(value).posterior.max_bytes == number


@pytest.mark.parametrize(
    "override", ["posterior.max_bytes=lots", "posterior.max_bytes=0", "posterior.storage=int8"]
)
def test_nonsense_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match=override.partition("=")[0]):
        load_recipe("sio2_sevennet", [override])


@pytest.mark.parametrize("key", ["max_bytes=1e6", "storage=float32"])
def test_other_families_have_no_directions(key: str) -> None:
    with pytest.raises(RecipeError, match="subspace"):
        load_recipe(
            "sio2_sevennet",
            [
                "posterior.family=weight",
                "posterior.prior_scale=0.1",
                "objective.temperature=1e-4",
                f"posterior.{key}",
            ],
        )


def test_bytes_in_words() -> None:
    assert [megabytes(n) for n in (12, 1000, 1_234_567, 12_345_678, 999_999_999, 2 * 10**9)] == [
        "12 bytes",
        "1 kB",
        "1.24 MB",
        "12.4 MB",
        "1000 MB",
        "2 GB",
    ]


def test_a_run_within_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from ase.io import write

    from blip_ft.closed_form.gradients import GradientRows

    monkeypatch.chdir(tmp_path)
    write("train.extxyz", frames(24))
    tree: dict[str, Any] = {
        "name": "run",
        "output": "runs",
        "data": {"train": "train.extxyz"},
        "model": {"adapter": "fake", "checkpoint": "tiny", "dtype": "float64"},
        "posterior": {
            "family": "subspace",
            "rank": 40,
            "projections": 6,
            "perturbed_share": 0.2,
            "max_bytes": "60 kB",
            "storage": "float16",
        },
        "uncertainty": {"linearity_frames": 0},
        "plain": {"enabled": False},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    held: list[int] = []
    rows = GradientRows.rows

    def spy(self: GradientRows, *args: Any, **kwargs: Any) -> Any:
        out = rows(self, *args, **kwargs)
        held.append(out.gradients.untyped_storage().nbytes())
        return out

    monkeypatch.setattr(GradientRows, "rows", spy)
    Path("recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "recipe.yaml"]) == 0, capsys.readouterr().err
    said = " ".join(capsys.readouterr().err.split())
    assert "posterior.max_bytes 60 kB" in said
    assert max(held) <= 60_000
    receipt = json.loads(Path("runs/run/receipt.json").read_text())
    assert any("projections" in line or "noise on" in line for line in receipt["budget"])
    tensors = load_file("runs/run/model/model.safetensors")
    stored = tensors["posterior.directions"]
    assert stored.nbytes <= 60_000
    used = yaml.safe_load(Path("runs/run/recipe.yaml").read_text())
    assert stored.shape[0] == used["posterior"]["rank"]
    assert not Path("runs/run/linearity.json").exists()
    potential = blip_ft.load("runs/run")
    assert potential.posterior.ready
    assert (potential.posterior.directions == stored.double()).all()
    # too little even for the narrowest
    assert main(["fit", "recipe.yaml", "name=other", "posterior.max_bytes=1 kB"]) == 2
    assert "at least" in capsys.readouterr().err
    assert not Path("runs/other").exists()


def test_directions_in_single_precision_are_stored_so(tmp_path: Path) -> None:
    from blip_ft.config import ModelConfig, PosteriorConfig
    from blip_ft.families.base.linear import ClosedFormData, LinearizedModel
    from blip_ft.potential.bayesian import BayesianPotential

    def of(storage: str) -> torch.Tensor:
        potential = BayesianPotential(
            FakeBackbone(),
            ModelConfig(adapter="fake", checkpoint="tiny"),
            PosteriorConfig(family="subspace", rank=5, storage=storage),
        )
        generator = torch.Generator().manual_seed(0)
        p = potential.posterior.directions.shape[1]
        gradients = torch.randn(9, p, generator=generator, dtype=torch.float64)
        targets = np.arange(9.0)
        potential.posterior.fit(
            ClosedFormData(LinearizedModel(gradients, targets, np.arange(9) % 3, np.ones(9, bool)), 0.3, 1.0)
        )
        saved = potential.state_dict()["posterior.directions"]
        assert (saved.double() == potential.posterior.directions).all(), "saving loses nothing"
        return saved

    half, single = of("auto"), of("float32")
    assert (half.dtype, single.dtype) == (torch.float16, torch.float32)

    def defect(v: torch.Tensor) -> float:
        return float((v.double() @ v.double().T - torch.eye(5)).abs().max())

    assert defect(single) < 1e-6 < defect(half)


class TestFullCovariance:
    """Families that hold one row per force component: 1 + 3 * 3 of each of the ten frames."""

    EVERY = FRAMES * 10

    @pytest.mark.parametrize(("family", "number"), [("pathwise", 4), ("posthoc_laplace", 8)])
    def test_every_component_while_the_rows_fit(self, family: str, number: int) -> None:
        """To the byte; the Laplace covariance takes its rows to float64."""
        room = self.EVERY * P["all"] * number
        options = {"family": family, "projections": "all", "rank": 32}
        out, said = reduced(room, **options)
        assert (out.posterior.projections, said) == ("all", [])
        out, (line,) = reduced(room - 1, **options)
        assert out.posterior.projections == 8  # the energy's row and 8 of the forces are 9 of 10
        assert "8 random projections" in line

    def test_fewer_projections_than_asked_for(self) -> None:
        room = FRAMES * 5 * P["all"] * 4 + 17
        out, (line,) = reduced(room, family="pathwise", projections=6, rank=32)
        assert out.posterior.projections == 4
        assert "instead of 6" in line

    def test_fewer_samples(self) -> None:
        """Few frames of few atoms: the samples are what is large."""
        room = 100 * P["all"] * 4
        out, (line,) = reduced(room, family="pathwise", projections=2, rank=128)
        assert out.posterior.rank == 100
        assert "100 samples instead of 128" in line
        assert fit_to_budget(out, FakeBackbone(), [3] * FRAMES, 0, pytest.fail) is out

    @pytest.mark.parametrize("family", ["pathwise", "posthoc_laplace"])
    def test_too_little_names_what_would_do(self, family: str) -> None:
        number = 4 if family == "pathwise" else 8
        least = row_bytes(P["all"], FRAMES, MIN_PROJECTIONS, number)
        with pytest.raises(RecipeError) as caught:
            reduced(least - 1, family=family, projections="all", rank=32)
        assert caught.value.field == "posterior.max_bytes"
        assert str(least) in str(caught.value)

    def test_too_little_for_the_samples(self) -> None:
        least = row_bytes(P["all"], FRAMES, MIN_PROJECTIONS, 4)
        with pytest.raises(RecipeError, match=f"{MIN_RANK} samples") as caught:
            reduced(least, family="pathwise", projections=2, rank=64)
        assert str(MIN_RANK * P["all"] * 4) in str(caught.value)
